"Nothing may stay behind on the processor when the model is elsewhere: a device made for this test (second_device.cpp) finds what does, without a GPU."
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which('g++') and shutil.which('ninja')), reason='needs g++ and ninja')
def test_second_device(tmp_path):
    "Training, resuming, adapters, saving and answering give there what they give on the processor"
    done = subprocess.run([sys.executable, str(HERE/'test_device.py'), str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def second_device(folder):
    "Build the device and tell torch its name"
    import contextlib
    import types
    import torch
    from torch.utils.cpp_extension import load
    load('second_device', [str(HERE/'second_device.cpp')], build_directory=str(folder), extra_cflags=['-O0'])
    torch.utils.rename_privateuse1_backend('second')
    module = types.ModuleType('torch.second')
    for name, value in dict(is_available=True, is_initialized=True, device_count=1, current_device=0, _is_in_bad_fork=False, manual_seed_all=None,
                            get_amp_supported_dtype=[torch.bfloat16]).items(): setattr(module, name, lambda *_, value=value: value)
    module.device = contextlib.nullcontext
    torch._register_device_module('second', module)
    return torch.device('second:0')


def main(folder):
    import types
    import torch
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from test_training import CFG, DATA, tiny
    from sft_nb.loading import load_model
    from sft_nb.saving import save_model
    from sft_nb.choices import LoraConfig, Stops
    from sft_nb.lora import add_lora, merge_lora
    from sft_nb.generation import generate
    from sft_nb.run import train
    torch.set_num_threads(1)
    second = second_device(folder)
    quiet = dict(say=lambda *_: None)

    def model(device, lora=None):
        m = tiny().to(device)
        m.shortcuts = replace(m.shortcuts, one_gradient=False)  # sparse gradients are too much for a device of a hundred lines
        return add_lora(m, lora, seed=1) if lora else m

    def losses(log): return [e.loss for e in (*log.steps, *log.vals)]

    for cfg, lora, within in ((replace(CFG, micro_batch_size=2), None, 1e-4), (replace(CFG, dtype='bfloat16'), LoraConfig(4, dropout=0.), 2e-2)):
        here, there = (losses(train(model(d, lora), *DATA, cfg, **quiet)) for d in ('cpu', second))
        torch.testing.assert_close(there, here, rtol=within, atol=0.)

    def stop(entry, _): return 'enough' if entry.step == 3 else None
    whole, cut = model(second), model(second)
    train(whole, *DATA, CFG, **quiet)
    train(cut, *DATA, CFG, folder/'run', hooks=[stop], **quiet)
    cut = model(second)
    train(cut, *DATA, CFG, folder/'run', resume=True, **quiet)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(whole.parameters(), cut.parameters()))

    save_model(folder/'model', whole)
    saved = load_model(folder/'model').model
    tokenizer = types.SimpleNamespace(eos_id=None, token_id=lambda _: None, decode_content=lambda ids: ' '.join(map(str, ids)))
    prompts = [[1, 2, 3, *range(4, 4+n)] for n in (1, 5, 9)]
    here, there = (generate(m, tokenizer, prompts, until=Stops(6, ids=())) for m in (saved, whole))
    assert [a.ids for a in here] == [a.ids for a in there]
    merge_lora(add_lora(whole, LoraConfig(4)))
    assert all(p.device == second for p in whole.parameters())


if __name__ == '__main__': main(Path(sys.argv[1]))
