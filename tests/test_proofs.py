"`sft_nb prove` turns red, and names what broke, whatever is broken in the package; whole, it is green."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = { # what is broken -> (module, old text, new text, the claim that has to turn red)
    'shifted mask': ('layout.py', 'hidden = (back<0) if window is None', 'hidden = (back<-1) if window is None', 'engine == plain decoder'),
    'mean of means': ('steps.py', '        loss.backward()\n        total', '        (loss/batch.n_targets).backward()\n        total', 'accumulation == full batch'),
    'dropped end': ('templates.py', "Segment('', stop=True, **own)", "Segment('', **own)", 'every answer ends'),
    'dropout at validation': ('steps.py', '    model.eval()\n    try:\n        with torch.no_grad():', '    try:\n        with torch.no_grad():', 'validation == evaluation'),
    'seed ignored': ('settings.py', 'cfg.batch_size, cfg.seed, epoch)', 'cfg.batch_size, 0, epoch)', 'one seed repeats, two differ'),
    'scale of adapters': ('choices.py', '(math.sqrt(self.rank) if self.root_scale else self.rank)', '(self.rank if self.root_scale else math.sqrt(self.rank))',
                          'LoRA == its formula'),
    'cache off by one': ('generation.py', '[d.n - 1 for d in seats.drafts]', '[d.n for d in seats.drafts]', 'cached, batched == naive'),
    'clip before the sum': ('optimizer.py', 'if world.size>1: world.add(_whole_gradient(self.flat))',
                            'if world.size>1: world.add(_whole_gradient(self.flat).mul_(1/_whole_gradient(self.flat).norm().item()))', 'two processes == one'),
    'averages lost': ('run.py', "kinds:tuple=('master', 'mean', 'square')", "kinds:tuple=('master', 'square')", 'resume == never stopped'),
    'places behind a prefix': ('batches.py', '*(np.arange(P, n) for n in sizes)', '*(np.arange(n - P) for n in sizes)', 'shared prefix == none'),
    'stop is printed': ('sampling.py', 'ids[:-1] if ids and ids[-1] in stop_ids else ids', 'ids', 'answers end at stops'),
    'one chance for all processes': ('run.py', 'SeedSequence([cfg.seed, step, rank])', 'SeedSequence([cfg.seed, step])', 'two processes == one'),
    'last micro-batch lost': ('optimizer.py', '    if flat.banked: _bank(flat)\n', '    if flat.banked: _forget(flat)\n', 'accumulation in bfloat16'),
    'saved in 16 bits': ('saving.py', 't.detach().cpu().contiguous()', 't.detach().bfloat16().float().cpu().contiguous()', 'saved == loaded')}
TOY = '''
import json, sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from sft_nb.tokenizer import JsonTokenizer
from sft_nb.model import ModelConfig
from sft_nb.decoder import Decoder
from sft_nb.saving import save_model
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tok = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tok.add_special_tokens(['<e>'])
torch.manual_seed(7)
toy = Decoder(ModelConfig('llama', vocab_size=260, n_layers=2, width=16, n_heads=4, n_kv_heads=2, head_dim=4, mlp_width=24, max_length=256, tied=True))
for p in toy.parameters():
    if p.dim()==2: torch.nn.init.normal_(p, std=0.2)
save_model('toy', toy, JsonTokenizer(tok, 'bytes', '<e>'))
json.dump([{'instruction': f'Add {i} and {i + 1}.', 'input': '', 'output': f'{2*i + 1}'*(1 + i%3)} for i in range(40)], open('mine.json', 'w'))
'''


def python(package, *words, cwd):
    env = dict(os.environ, PYTHONPATH=str(package), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


def prove(package, cwd):
    done = python(package, '-m', 'sft_nb.cli', 'prove', '--model', 'toy', '--data', 'mine.json', '--template', 'plain', '--out', 'told.json', cwd=cwd)
    return done, json.loads((cwd/'told.json').read_text(encoding='utf-8')) if (cwd/'told.json').exists() else {}


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp('proofs')
    done = python(ROOT, '-c', TOY, cwd=path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.slow
@pytest.mark.parametrize('name', MUTANTS)
def test_a_mutation_changes_one_place(name):
    module, old, new, _ = MUTANTS[name]
    text = (ROOT/'sft_nb'/module).read_text(encoding='utf-8')
    assert text.count(old) == 1 and old != new


@pytest.mark.slow
def test_the_package_is_green(home):
    done, told = prove(ROOT, home)
    assert done.returncode == 0 and told['holds'], done.stdout + done.stderr
    assert {'versions', 'machine', 'hashes', 'settings'} <= set(told) and len(told['claims']) >= 26


@pytest.mark.slow
@pytest.mark.parametrize('name', MUTANTS)
def test_a_broken_package_is_red_and_named(name, home, tmp_path):
    module, old, new, claim = MUTANTS[name]
    shutil.copytree(ROOT/'sft_nb', tmp_path/'sft_nb', ignore=shutil.ignore_patterns('__pycache__'))
    file = tmp_path/'sft_nb'/module
    file.write_text(file.read_text(encoding='utf-8').replace(old, new), encoding='utf-8')
    for thing in ('toy', 'mine.json'): shutil.copytree(home/thing, tmp_path/thing) if (home/thing).is_dir() else shutil.copy(home/thing, tmp_path)
    done, told = prove(tmp_path, tmp_path) # the others may be red as well; this one says what broke
    red = [c['name'] for c in told.get('claims', []) if not (c['holds'] or c['left_out'])]
    assert done.returncode == 1 and claim in red and not told['holds'], (red, done.stdout[-2000:], done.stderr[-2000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith('RED ')]
    assert any(line.startswith(f'RED       {claim}: ') for line in lines[:-1]) and claim in lines[-1], lines
