"""What a model does on another device, found without a GPU: a make-believe one (second_device.cpp) computes on the processor and is otherwise as poor as
Apple's. It refuses float64, sparse tensors, tensors of two devices, and each operation that torch's own table does not list for MPS."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PARTS = ('refusals', 'choice', 'training', 'answers', 'adapters', 'command')
pytestmark = pytest.mark.skipif(not (sys.platform == 'linux' and shutil.which('g++')), reason='needs Linux and g++')


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    "The device, compiled"
    from torch.utils import cpp_extension
    made = tmp_path_factory.mktemp('device')/'second_device.so'
    folders = [*cpp_extension.include_paths(), sysconfig.get_paths()['include']]
    places = cpp_extension.library_paths()
    words = ['g++', '-O0', '-std=c++20', '-fPIC', '-shared', '-DTORCH_EXTENSION_NAME=second_device', *(f'-I{f}' for f in folders), str(HERE/'second_device.cpp'),
             *(f'-L{p}' for p in places), *(f'-Wl,-rpath,{p}' for p in places), '-ltorch', '-ltorch_cpu', '-lc10', '-ltorch_python', '-o', str(made)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return made


@pytest.mark.parametrize('part', PARTS)
def test_second_device(part, library, tmp_path):
    "There everything gives what it gives on the processor, and nothing refused is reached"
    env = dict(os.environ, OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, str(HERE/'test_device.py'), part, str(library), str(tmp_path)], capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def lacking_on_mps():
    "The operations that have a kernel for CPUs and none for MPS, by the table from which torch itself is built"
    import torchgen
    from torchgen.gen import parse_native_yaml
    from torchgen.model import DispatchKey
    table = Path(torchgen.__file__).parent/'packaged/ATen/native'
    parsed = parse_native_yaml(str(table/'native_functions.yaml'), str(table/'tags.yaml'))
    known = {str(f.func.name): f for f in parsed.native_functions}

    def has(key, f):
        kernels = parsed.backend_indices[key]
        return kernels.has_kernel(f) or (f.structured_delegate is not None and kernels.has_kernel(known[str(f.structured_delegate)]))
    return {f'aten::{name}' for name, f in known.items() if has(DispatchKey.CPU, f) and not has(DispatchKey.MPS, f) and not f.has_composite_kernel}


def second_device(library):
    "Tell torch of the device; gives it and its module"
    import contextlib
    import types
    import torch
    spec = importlib.util.spec_from_file_location('second_device', library)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    lacking = lacking_on_mps()
    assert len(lacking) > 100 and 'aten::segment_reduce' in lacking and 'aten::mm' not in lacking
    native.refuse(lacking)
    torch.utils.rename_privateuse1_backend('second')
    module = types.ModuleType('torch.second')
    for name, value in dict(is_available=True, is_initialized=True, device_count=1, current_device=0, _is_in_bad_fork=False, manual_seed_all=None,
                            get_amp_supported_dtype=[torch.bfloat16]).items(): setattr(module, name, lambda *_, value=value: value)
    module.device = contextlib.nullcontext
    torch._register_device_module('second', module)
    return torch.device('second:0'), native


def expect_refusal(text, act):
    "`act` must be refused with `text`"
    try: act()
    except (RuntimeError, TypeError) as e: assert text in str(e), e
    else: raise AssertionError(f'not refused: {text}')


def check_refusals(second, native, folder):
    "The device refuses what it should, or nothing below would mean anything"
    import torch
    from sft_nb.optimizer import _scales_inside
    ones = torch.ones(4, device=second)
    expect_refusal('no float64', lambda: ones.double())
    expect_refusal('no float64', lambda: torch.ones(4, dtype=torch.float64).to(second))
    expect_refusal('segment_reduce is not implemented', lambda: torch.segment_reduce(ones, 'sum', lengths=torch.tensor([4], device=second)))
    expect_refusal('two devices', lambda: ones + torch.ones(4))
    expect_refusal('', lambda: torch.nn.functional.embedding(torch.tensor([1], device=second), ones.view(2, 2).requires_grad_(), sparse=True).sum().backward())
    assert ones.mul(2).sum().item() == 8 and native.reached()
    assert _scales_inside(torch.device('cpu')) and not _scales_inside(second)


def check_choice(second, native, folder):
    "A device is found sound, and a wrong one is not; precision, the widest float and memory are what it has"
    import contextlib
    import io
    import torch
    from unittest.mock import patch
    from sft_nb import machine
    assert machine.find_fault('second') == machine.find_fault('second', torch.bfloat16) == ''
    assert machine.widest_float(second) == torch.float32
    native.refuse({'aten::_softmax', 'aten::_log_softmax', 'aten::_log_softmax.out', 'aten::_softmax.out'})
    machine.find_fault.cache_clear()
    assert 'is not implemented on this device' in machine.find_fault('second')
    machine._sound_mps.cache_clear()
    said = io.StringIO()
    fault = machine.find_fault('second')
    with patch('torch.backends.mps.is_available', return_value=True), patch('torch.cuda.is_available', return_value=False), \
            patch.object(machine, 'find_fault', lambda device: fault), contextlib.redirect_stderr(said):
        assert [machine.choose_device().type for _ in range(2)] == ['cpu', 'cpu']
    assert said.getvalue().count('\n') == 1 and 'mps is not used (the operator aten::' in said.getvalue()


def tiny_model(device, lora=None):
    from test_training import tiny
    from sft_nb.lora import add_lora
    model = tiny().to(device)
    return add_lora(model, lora, seed=1) if lora else model


def check_training(second, native, folder):
    "Losses of a run are those of the processor; a run that is stopped and resumed ends with the weights of one that never stopped"
    import torch
    from test_training import CFG, DATA
    from sft_nb.loading import load_model
    from sft_nb.choices import LoraConfig
    from sft_nb.lora import merge_lora
    from sft_nb.run import train
    from sft_nb.saving import save_model
    quiet = dict(say=lambda *_: None)

    def losses(log): return [e.loss for e in (*log.steps, *log.vals)]

    for cfg, lora, within in ((replace(CFG, micro_batch_size=2), None, 1e-4), (replace(CFG, clip=.01, weight_decay=.1), None, 1e-4), (replace(CFG, recompute=True), None, 1e-4),
                              (replace(CFG, dtype='bfloat16'), LoraConfig(4, dropout=0.), 2e-2)):
        here, there = (losses(train(tiny_model(d, lora), *DATA, cfg, **quiet)) for d in ('cpu', second))
        torch.testing.assert_close(there, here, rtol=within, atol=0.)

    def stop(entry, _): return 'enough' if entry.step == 3 else None
    for name, lora in (('whole', None), ('lora', LoraConfig(4, dropout=.1))):
        one, cut = tiny_model(second, lora), tiny_model(second, lora)
        train(one, *DATA, CFG, **quiet)
        train(cut, *DATA, CFG, folder/name, hooks=[stop], **quiet)
        cut = tiny_model(second, lora)
        train(cut, *DATA, CFG, folder/name, resume=True, **quiet)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.parameters(), cut.parameters()))
        assert all(p.device == second for p in cut.parameters())
        if lora: merge_lora(cut)
        save_model(folder/f'{name}-saved', cut)
        saved = load_model(folder/f'{name}-saved').model
        torch.testing.assert_close(cut(torch.arange(6, device=second)[None]).cpu(), saved(torch.arange(6)[None]), rtol=1e-4, atol=1e-5)


def check_answers(second, native, folder):
    "Answers are the processor's, greedy or drawn"
    import types
    import torch
    from sft_nb.generation import generate
    from sft_nb.choices import Sampling, Stops
    here, there = tiny_model('cpu'), tiny_model(second)
    tokenizer = types.SimpleNamespace(eos_id=None, token_id=lambda _: None, decode_content=lambda ids: ' '.join(map(str, ids)))
    prompts = [[1, 2, 3, *range(4, 4+n)] for n in (1, 5, 9)]
    for how in (Sampling(), Sampling(.7), Sampling(1., top_k=5), Sampling(1., top_p=.8), Sampling(1.3, min_p=.05, repetition_penalty=1.2)):
        a, b = (generate(m, tokenizer, prompts, how=how, until=Stops(12, ids=()), generator=torch.Generator().manual_seed(4)) for m in (here, there))
        assert [x.ids for x in a] == [x.ids for x in b], how


def check_adapters(second, native, folder):
    "Adapters are saved and loaded there, merged there, and give what they give on the processor"
    import torch
    from sft_nb.adapters import load_adapter, save_adapter
    from sft_nb.choices import LoraConfig
    from sft_nb.lora import merge_lora
    there = tiny_model(second, LoraConfig(4))
    with torch.no_grad():
        for p in there.parameters():
            if p.requires_grad: p.add_(.01)
    save_adapter(folder/'adapter', there)
    here = load_adapter(folder/'adapter', tiny_model('cpu'))
    again = load_adapter(folder/'adapter', tiny_model(second))
    ids_BT = torch.arange(6)[None]
    for model in (there, again): torch.testing.assert_close(model(ids_BT.to(second)).cpu(), here(ids_BT), rtol=1e-4, atol=1e-5)
    merge_lora(again)
    torch.testing.assert_close(again(ids_BT.to(second)).cpu(), here(ids_BT), rtol=1e-4, atol=1e-5)
    assert all(p.device == second for p in again.parameters())


def check_command(second, native, folder):
    "`sft_nb run` with the device that `auto` chooses, all weights and LoRA: it reports, and its numbers are the processor's"
    import torch
    from test_cli import TINY
    from sft_nb import machine
    from sft_nb.cli import main
    from sft_nb.decoder import Decoder
    from sft_nb.families import config_from_hf
    from sft_nb.saving import save_model
    from sft_nb.tokenizer import get_gpt2_tokenizer
    torch.manual_seed(7)
    save_model(folder/'tiny', Decoder(config_from_hf(TINY)), get_gpt2_tokenizer())
    rows = [dict(instruction=f'Add {i} and {i+1}.', input='', output=f'{2*i+1}') for i in range(40)]
    (folder/'toy.json').write_text(json.dumps(rows))
    os.chdir(folder)
    machine._fastest = lambda: second.type
    for name, words in (('whole', ['--dtype', 'float32']), ('lora', ['--lora', '4', '--dtype', 'float32']), ('short', ['--dtype', 'bfloat16'])):
        for device in ('auto', 'cpu'):
            done = main(['run', '--model', 'tiny', '--data', 'toy.json', '--max-new', '4', '--device', device, '--name', f'{name}-{device}', *words])
            assert done == 0 and (folder/f'runs/{name}-{device}/report.html').is_file()
        there, here = (json.loads((folder/f'runs/{name}-{d}/model/sft_nb.json').read_text())['validation_loss'] for d in ('auto', 'cpu'))
        torch.testing.assert_close(there, here, rtol=2e-2 if name == 'short' else 1e-4, atol=0.)
    assert main(['respond', '--model', 'runs/whole-auto/model', '--data', 'toy.json', '--max-new', '4', '--out', 'answers.json']) == 0
    if native: assert 'aten::_fused_adamw_' in native.reached()


def main(part, library, folder):
    import torch
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    torch.set_num_threads(1)
    second, native = second_device(library)
    globals()[f'check_{part}'](second, native, folder)
    sys.stdout.flush()
    os._exit(0) # a thread of autograd's may still be on this device, and Python's end would tear it down under it


if __name__ == '__main__': main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
