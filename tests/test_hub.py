"Models by their name, from a hub on this machine: GPT-2 as it is published, whatever folders stand in the working directory."
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiktoken
import torch
import transformers
from toy_hub import toy_hub

from sft_nb.fetch import HUB_NAMES
from sft_nb.gguf_file import open_gguf
from sft_nb.gpt2 import GPT2_FILES
from sft_nb.loading import load_model

ROOT = Path(__file__).resolve().parent.parent
BOMB_WENT_OFF = 'a pickle was opened'


class Bomb:
    def __reduce__(self): return (exec, (f'raise SystemExit({BOMB_WENT_OFF!r})',))


@pytest.fixture(scope='module')
def repo(tmp_path_factory):
    "The files of GPT-2 as its hub folder has them: no chat template, no word in front of names, masks among the weights, a pickle beside them"
    from safetensors.torch import save_file
    folder = tmp_path_factory.mktemp('hub')/'gpt2'
    folder.mkdir()
    torch.manual_seed(3)
    cfg = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=256, n_ctx=256)
    hf = transformers.GPT2LMHeadModel(cfg).eval()
    tensors = {n.removeprefix('transformer.'): t.contiguous() for n, t in hf.state_dict().items() if n != 'lm_head.weight'}
    tensors |= {f'h.{i}.attn.bias': torch.tril(torch.ones(1, 1, 256, 256)) for i in range(2)}
    save_file(tensors, folder/'model.safetensors', metadata={'format': 'pt'})
    about = dict(activation_function='gelu_new', architectures=['GPT2LMHeadModel'], attn_pdrop=0.1, bos_token_id=50256, embd_pdrop=0.1, eos_token_id=50256,
                 initializer_range=0.02, layer_norm_epsilon=1e-5, model_type='gpt2', n_ctx=256, n_embd=16, n_head=2, n_layer=2, n_positions=256, resid_pdrop=0.1,
                 summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type='cls_index', summary_use_proj=True,
                 task_specific_params={'text-generation': {'do_sample': True, 'max_length': 50}}, vocab_size=50257)
    (folder/'config.json').write_text(json.dumps(about))
    (folder/'generation_config.json').write_text(json.dumps(dict(bos_token_id=50256, eos_token_id=50256, transformers_version='4.26.0.dev0', _from_model_config=True)))
    (folder/'vocab.json').write_bytes((GPT2_FILES/'encoder.json').read_bytes())
    (folder/'merges.txt').write_bytes((GPT2_FILES/'vocab.bpe').read_bytes())
    (folder/'README.md').write_text('---\nlanguage: en\nlicense: mit\n---\n# GPT-2\n')
    with open(folder/'pytorch_model.bin', 'wb') as f: pickle.dump(Bomb(), f)
    (folder/'modeling_gpt2.py').write_text('raise SystemExit')
    with pytest.raises(SystemExit, match=BOMB_WENT_OFF): pickle.loads((folder/'pytorch_model.bin').read_bytes())
    return folder, hf


def run(words, cwd, env):
    return subprocess.run([sys.executable, *words], cwd=cwd, env=os.environ | {'PYTHONPATH': str(ROOT)} | env, capture_output=True, text=True, timeout=600)


def unwanted(asked): return [p for p in asked if '.bin' in p or p.endswith('.py')]


FOLDERS = {'none': [], 'names': ['gpt2', 'gpt2-xl', 'own/tiny'], 'owners': ['openai-community', 'own'], 'whole': ['openai-community/gpt2', 'openai-community/gpt2-xl', 'own/tiny']}


@pytest.mark.parametrize('folders', FOLDERS.values(), ids=FOLDERS)
def test_every_name_with_folders_in_the_way(folders, repo, tmp_path):
    folder, hf = repo
    here = tmp_path/'working directory'
    here.mkdir()
    for name in folders: (here/name).mkdir(parents=True)
    names = [*HUB_NAMES, *HUB_NAMES.values(), 'own/tiny', 'own/tiny@v2']
    code = textwrap.dedent('''
        import sys, torch
        from sft_nb.loading import load_model
        out = {}
        ids_BT = torch.arange(12).view(2, 6)*4000
        for name in sys.argv[2:]:
            got = load_model(name)
            out[name] = got.source, got.model(ids_BT).detach(), got.tokenizer.encode('Every effort moves you')
        torch.save(out, sys.argv[1])''')
    with toy_hub({**{r: folder for r in HUB_NAMES.values()}, 'own/tiny': folder}, tmp_path/'hf') as (env, asked):
        done = run(['-c', code, str(tmp_path/'out'), *names], here, env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert BOMB_WENT_OFF not in done.stdout+done.stderr and not unwanted(asked), asked
    out = torch.load(tmp_path/'out')
    wanted = hf(torch.arange(12).view(2, 6)*4000).logits.detach()
    for name in names:
        source, logits, ids = out[name]
        assert source == HUB_NAMES.get(name, name)
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
        assert ids == [6109, 3626, 6100, 345]


def test_a_model_here_is_meant_before_the_hub(repo, tmp_path, monkeypatch):
    folder, hf = repo
    (tmp_path/'own').mkdir()
    for name in ('gpt2', 'own/tiny'): (tmp_path/name).symlink_to(folder, target_is_directory=True) if os.name != 'nt' else __import__('shutil').copytree(folder, tmp_path/name)
    monkeypatch.chdir(tmp_path)
    for name in ('gpt2', 'own/tiny'):
        got = load_model(name)                                   # no hub is up: HF_HUB_OFFLINE is set
        assert Path(got.source) == Path(name)
        torch.testing.assert_close(got.model(torch.arange(6)[None]), hf(torch.arange(6)[None]).logits, atol=1e-5, rtol=0)


def test_what_the_hub_does_not_have(repo, tmp_path):
    folder, _ = repo
    (tmp_path/'own/tiny').mkdir(parents=True)
    (tmp_path/'own/tiny/config.json').write_text('{}')
    with toy_hub({}, tmp_path/'hf') as (env, _):
        for name in ('own/tyny', 'gpt2'):
            done = run(['-m', 'sft_nb.cli', 'respond', '--model', name, '--out', 'x.json'], tmp_path, env)
            lines = done.stderr.splitlines()
            assert done.returncode == 2 and len(lines) == 1 and 'the hub did not give it' in lines[0], done.stderr
            assert ("did you mean 'own" in lines[0]) == (name == 'own/tyny')


def test_run_gpt2_by_its_name(repo, tmp_path):
    "Trains, answers, reports; what it saves is read by transformers, and the notes' own cells run on what it loads"
    folder, _ = repo
    for name in ('gpt2', 'openai-community'): (tmp_path/name).mkdir()
    rows = [dict(instruction=f'Add {i} and {i+1}.', input='', output=f'{2*i+1}') for i in range(40)]
    (tmp_path/'toy.json').write_text(json.dumps(rows))
    with toy_hub({'openai-community/gpt2': folder}, tmp_path/'hf') as (env, asked):
        done = run(['-m', 'sft_nb.cli', 'run', '--model', 'gpt2', '--data', 'toy.json', '--dtype', 'float32', '--max-new', '4', '--lr', '3e-3', '--export', 'f16'], tmp_path, env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not unwanted(asked) and 'openai-community/gpt2' in done.stdout
    out = tmp_path/'runs/default'
    meta = json.loads((out/'model/sft_nb.json').read_text())
    assert meta['base'] == 'openai-community/gpt2' and meta['validation_loss'][1] < meta['validation_loss'][0]
    get, _ = open_gguf(out/'model-f16.gguf')                      # the licence of the base goes wherever the model goes
    assert meta['license'] == get('general.license') == 'mit' and '\nlicense: mit\n' in (out/'model/README.md').read_text()
    assert get('general.base_model.0.repo_url') == 'https://huggingface.co/openai-community/gpt2'
    answers = json.loads((out/'responses.json').read_text())
    assert len(answers) == 4 and all(isinstance(r['model_response'], str) for r in answers) and (out/'report.html').is_file()
    assert transformers.AutoModelForCausalLM.from_pretrained(out/'model').config.model_type == 'gpt2'

    from sft_nb.collate import custom_collate_fn
    from sft_nb.dataset import InstructionDataset
    loaded = load_model(out/'model')
    train_dataset = InstructionDataset(rows[:34], loaded.tokenizer)
    assert list(train_dataset) == list(InstructionDataset(rows[:34], tiktoken.get_encoding('gpt2')))
    loader = torch.utils.data.DataLoader(train_dataset, batch_size=8, collate_fn=lambda batch: custom_collate_fn(batch, device='cpu'), drop_last=True)
    for inputs, targets in loader:
        logits = loaded.model(inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert torch.isfinite(loss)
