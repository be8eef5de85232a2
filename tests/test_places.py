"""Other systems, as far as they can be played on this one: what only Linux has is taken away, folders have spaces and letters of many scripts, and
output goes to a pipe in a narrow encoding."""
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=50257, n_embd=16, n_layer=1, n_head=2, n_positions=128)

POORER = '''
import builtins, io, mmap, os, pathlib, signal, sys
# libraries that look at the system while they are imported
import torch, numpy, matplotlib.pyplot, tiktoken, sacrebleu, httpx, filelock, gguf, tqdm.auto, scipy.stats, tenacity, ftfy, jsonschema, tokenizers, safetensors.torch, huggingface_hub, huggingface_hub.repocard_data, torch.distributed.fsdp, torch.distributed.checkpoint
sys.modules['fcntl'] = sys.modules['resource'] = sys.modules['pwd'] = None     # importing them fails

def refuse(*args, **kw): raise AssertionError('not on this system')
for name in ('fork', 'sysconf', 'killpg', 'getuid', 'geteuid', 'sched_getaffinity', 'fchmod', 'chown', 'setsid'): vars(os).pop(name, None)
os.execve = os.symlink = os.link = os.getloadavg = refuse
os.chmod = lambda path, mode, **kw: None                                       # modes mean little there
for name in ('MAP_PRIVATE', 'MAP_ANONYMOUS', 'MAP_ANON', 'MAP_SHARED', 'MADV_DONTNEED', 'PROT_READ', 'PROT_WRITE'): vars(mmap).pop(name, None)
for name in ('SIGKILL', 'SIGHUP', 'SIGUSR1', 'SIGALRM'): vars(signal).pop(name, None)
fsync = os.fsync
def fsync_of_writers(handle):
    try: os.write(handle, b'')                                                 # Windows has none for who only reads
    except OSError: raise PermissionError('fsync of a file that is only read') from None
    fsync(handle)
os.fsync = fsync_of_writers
open_ = os.open
def no_folders(path, *args, **kw):
    if os.path.isdir(path) and 'dir_fd' not in kw: raise PermissionError(f'{path}: is a folder') # with it: shutil, which has another way there
    return open_(path, *args, **kw)
os.open = no_folders
exists, is_file = pathlib.Path.exists, pathlib.Path.is_file
def unless_proc(path, *args, **kw):
    if str(path).startswith(('/proc', '/sys', '/dev')): return False
    return exists(path, *args, **kw)
pathlib.Path.exists = unless_proc
read_text = pathlib.Path.read_text
def no_proc(path, *args, **kw):
    if str(path).startswith(('/proc', '/sys')): raise FileNotFoundError(str(path))
    return read_text(path, *args, **kw)
pathlib.Path.read_text = no_proc
from sft_nb import checkpoints
checkpoints._sync_folder.__globals__['os'] = type('nt', (), dict(vars(os), name='nt'))   # only there the name is asked for
sys.platform = 'win32'
'''


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with spaces and letters of many scripts, with forty records and a tiny random model in it"
    import torch

    from sft_nb.decoder import Decoder
    from sft_nb.families import config_from_hf
    from sft_nb.saving import save_model
    from sft_nb.tokenizer import get_gpt2_tokenizer
    path = tmp_path_factory.mktemp('a b')/"Größe & Maß, 数据 'q' #1"
    path.mkdir()
    torch.manual_seed(7)
    save_model(path/'kleines Modell é', Decoder(config_from_hf(TINY)), get_gpt2_tokenizer())
    rows = [dict(instruction=f'Add {i} and {i+1}. Сложи. 加.', input='', output=f'{2*i+1} é') for i in range(40)]
    (path/'fragen für alle ⏎.json').write_text(json.dumps(rows, ensure_ascii=False), encoding='utf-8')
    return path


def python(code, home, *words, **more):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PYTHONIOENCODING='cp1252') | more
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code), *map(str, words)], cwd=home, env=env, capture_output=True, timeout=600)
    assert b'Traceback' not in done.stderr, done.stderr.decode('cp1252')[-3000:]
    return done.returncode, done.stdout.decode('cp1252'), done.stderr.decode('cp1252')


COMMAND = '''
from sft_nb import cli
sys.argv[0] = 'sft_nb'
sys.exit(cli.main())'''


ON_LINUX = pytest.mark.skipif(sys.platform != 'linux', reason='takes away what Linux has')


@pytest.mark.parametrize('system', ['', pytest.param(POORER, marks=ON_LINUX)], ids=['this system', 'a poorer one'])
def test_everything_with_spaces_and_scripts(system, home):
    "run, respond, compare, inspect; a run that is stopped goes on"
    data, model, name = 'fragen für alle ⏎.json', 'kleines Modell é', f"Läufe {'arm' if system else 'reich'}"
    start = 'import sys\n'+system+COMMAND
    code, out, err = python(start, home, 'run', '--data', data, '--model', model, '--out', f'{name}/ein Lauf', '--dtype', 'float32', '--max-new', '4')
    assert code == 0, err
    run = home/name/'ein Lauf'
    assert {p.name for p in run.iterdir()} >= {'report.html', 'report.md', 'responses.json', 'model', 'log.jsonl'}
    answers = json.loads((run/'responses.json').read_text(encoding='utf-8'))
    assert len(answers) == 4 and answers[0]['instruction'].endswith('Сложи. 加.')
    for words in (['respond', '--data', data, '--model', f'{name}/ein Lauf/model', '--max-new', '3', '--out', f'{name}/antworten é.jsonl'],
                  ['compare', f'{name}/ein Lauf/responses-before.json', f'{name}/ein Lauf/responses.json', '--out', f'{name}/vergleich ü'],
                  ['inspect', data, '--model', model]):
        code, out, err = python(start, home, *words)
        assert code == 0, (words, err)
    assert len((home/name/'antworten é.jsonl').read_text(encoding='utf-8').splitlines()) == 40

    stop = 'import sys\n'+system+'''
import signal
from sft_nb import run
notes = []
say = run._append
def note(plan, entry):
    say(plan, entry)
    notes.append(entry)
    if len(notes) == 3: signal.raise_signal(signal.SIGINT)
run._append = note''' + COMMAND
    words = ['train', '--data', data, '--model', model, '--out', f'{name}/gestoppt ß', '--dtype', 'float32', '--no-preflight']
    code, out, err = python(stop, home, *words)
    assert code == 130 and '--resume goes on' in err, (code, err)
    code, out, err = python(start, home, *words, '--resume')
    assert code == 0, err
    assert json.loads((home/name/'gestoppt ß/model/sft_nb.json').read_text(encoding='utf-8'))['weights'] == json.loads((run/'model/sft_nb.json').read_text(encoding='utf-8'))['weights']


@ON_LINUX
def test_the_poorer_system_is_poorer(home):
    "What is taken away is really missed, or the test above would show nothing"
    checks = '''
    import sys
    %s
    for missing in ('import fcntl', 'import resource', 'os.fork()', 'os.sysconf', 'os.symlink("a", "b")', 'mmap.MAP_PRIVATE', 'signal.SIGKILL', 'os.fsync(open(sys.argv[1], "rb").fileno())', 'os.open(".", os.O_RDONLY)'):
        try: exec(missing)
        except (ImportError, AttributeError, AssertionError, PermissionError): continue
        sys.exit(f'{missing} works')
    from sft_nb import machine
    print(machine.peak_memory(), machine.free_memory(), machine.describe_allocator(), repr(machine.find_tcmalloc()))''' % POORER.replace('\n', '\n    ')
    code, out, err = python(checks, home, 'fragen für alle ⏎.json')
    assert code == 0, err
    assert out.split()[:2] == ['0', str(4*2**30)] and "the system's own ''" in out


def test_a_locked_file_needs_no_lock_where_there_is_none(tmp_path):
    from unittest.mock import patch
    from sft_nb.basics import lock_file
    with open(tmp_path/'x', 'w') as one, open(tmp_path/'x', 'w') as two, patch.dict(sys.modules, fcntl=None):
        lock_file(one, 'x')
        lock_file(two, 'x')
