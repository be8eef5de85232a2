"The command line as a user meets it: processes, exit statuses, one-line complaints, and a run that is killed and goes on."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripted_server import Scripted

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=50257, n_embd=16, n_layer=1, n_head=2, n_positions=128)
FAST = ['--dtype', 'float32', '--max-new', '4', '--no-preflight']


def sft_nb(*words, cwd, stdin=None, timeout=300):
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, '-m', 'sft_nb.cli', *map(str, words)], cwd=cwd, env=env, input=stdin, text=True,
                          capture_output=True, timeout=timeout)


def complaint(done):
    "The one line of a refused command"
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and 'Traceback' not in done.stderr, done.stderr
    return lines[0]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with forty records and a tiny random model"
    import torch

    from sft_nb.tokenizer import get_gpt2_tokenizer
    from sft_nb.decoder import Decoder
    from sft_nb.families import config_from_hf
    from sft_nb.saving import save_model
    path = tmp_path_factory.mktemp('home')
    torch.manual_seed(7)
    save_model(path/'tiny', Decoder(config_from_hf(TINY)), get_gpt2_tokenizer())
    rows = [dict(instruction=f'Add {i} and {i+1}.', input='', output=f'{2*i+1}', source='toy') for i in range(40)]
    (path/'toy.json').write_text(json.dumps(rows))
    return path


def test_help_is_quick_and_complete():
    start = time.perf_counter()
    done = sft_nb('--help', cwd=ROOT)
    secs = time.perf_counter() - start
    assert done.returncode == 0 and secs < 20                # a bound against hanging; the promise of 1 s is for a quiet machine
    for command in ('run', 'train', 'respond', 'judge', 'compare', 'inspect', 'chat'):
        assert command in done.stdout
        assert sft_nb(command, '--help', cwd=ROOT).returncode == 0


@pytest.mark.parametrize('name,text,said', [
    ('nowhere.json', None, 'no such file'),
    ('words.json', 'hello', 'JSON'),
    ('cut.json', '[{"instruction": "a", "output": "b"', 'the file is cut off'),
    ('object.json', '{"rows": 3}', 'format not recognised'),
    ('number.json', '3', 'record'),
    ('empty.json', '[]', 'holds no records'),
    ('void.json', '', 'holds no records'),
    ('noinstruction.json', '[{"input": "", "output": "b"}]', 'instruction'),
    ('nooutput.json', '[{"instruction": "a", "input": ""}]', "'output' is missing"),
    ('type.json', '[{"instruction": 3, "output": "b"}]', "'instruction' must be text, got 3"),
    ('null.json', '[{"instruction": "a", "output": null}]', "'output' must be text"),
    ('one.json', '[{"instruction": "a", "output": "b"}]', 'a part would be empty'),
])
def test_bad_data(home, name, text, said):
    if text is not None: (home/name).write_text(text)
    line = complaint(sft_nb('run', '--model', 'tiny', '--data', name, '--name', 'bad', cwd=home))
    assert said in line and name.split('.')[0] in line or 'split' in line
    assert not (home/'runs/bad').exists()


@pytest.mark.parametrize('words,said', [
    (['--template', 'alpacca'], "did you mean 'alpaca'"),
    (['--model', 'tinny'], "did you mean 'tiny'"),
    (['--model', 'nowhere/at/all'], 'nowhere/at/all'),
    (['--lr', '-1'], 'lr must be above 0'),
    (['--lr', 'fast'], 'invalid float'),
    (['--epochs', '0'], 'epochs must be above 0'),
    (['--loss-on', 'everything'], 'loss_on'),
    (['--schedule', 'cosin'], 'schedule must be one of'),
    (['--max-length', '20'], 'longer'),
    (['--max-length', '0'], 'max_length'),
    (['--max-new', '0'], 'max_new'),
    (['--data', ''], 'no such file'),
    (['--out', 'elsewhere'], 'give one of them'),
    (['--judge-model', 'x'], '--judge-url'),
    (['--judge-url', 'http://127.0.0.1:9/v1', '--judge-model', 'x'], '127.0.0.1:9'),
    (['--judge-url', 'http://127.0.0.1:9/v1', '--judge-protocol', 'leveles'], "did you mean 'levels'"),
    (['--judge-protocol', 'leveles'], "did you mean 'levels'"),
    (['--span-weights', 'call=much'], 'call=much'),
    (['--bogus'], 'unrecognized arguments'),
])
def test_bad_options(home, words, said):
    base = [] if '--model' in words else ['--model', 'tiny']
    line = complaint(sft_nb('run', '--data', 'toy.json', '--name', 'bad', *base, *words, cwd=home))
    assert said in line, line
    assert not (home/'runs/bad').exists()


def test_a_question_that_is_too_long_is_refused_before_the_training(home):
    rows = json.loads((home/'toy.json').read_text())
    for r in rows[-7:]: r['instruction'] = 'and '*200 # test and validation rows stand last
    (home/'wordy.json').write_text(json.dumps(rows))
    line = complaint(sft_nb('run', '--model', 'tiny', '--data', 'wordy.json', '--over-long', 'drop', '--name', 'bad', cwd=home))
    assert 'wordy.json record 3' in line and 'leaves no room for an answer' in line
    assert not (home/'runs/bad').exists()


def test_no_folder_below_a_file(home):
    assert 'toy.json: is a file' in complaint(sft_nb('run', '--model', 'tiny', '--data', 'toy.json', '--out', 'toy.json/run', cwd=home))


def test_damaged_weights_are_refused(home, tmp_path):
    import shutil
    shutil.copytree(home/'tiny', tmp_path/'hurt')
    weights = tmp_path/'hurt/model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert 'hurt' in complaint(sft_nb('run', '--data', home/'toy.json', '--model', 'hurt', '--name', 'bad', cwd=tmp_path))


def test_folder_that_is_not_empty(home):
    (home/'runs/full').mkdir(parents=True, exist_ok=True)
    (home/'runs/full/mine.txt').write_text('keep me')
    line = complaint(sft_nb('run', '--data', 'toy.json', '--model', 'tiny', '--name', 'full', cwd=home))
    assert 'not empty' in line and 'mine.txt' in line
    assert [p.name for p in (home/'runs/full').iterdir()] == ['mine.txt']


def test_run_then_the_other_commands(home):
    done = sft_nb('run', '--data', 'toy.json', '--model', 'tiny', '--name', 'whole', '--epochs', '2', *FAST, cwd=home)
    assert done.returncode == 0, done.stderr
    out = home/'runs/whole'
    rows = json.loads((out/'responses.json').read_text())
    assert len(rows) == 4 and set(rows[0]) == {'instruction', 'input', 'output', 'source', 'model_response', 'id'}
    assert not (out/'checkpoints').exists()
    from transformers import AutoModelForCausalLM
    assert AutoModelForCausalLM.from_pretrained(out/'model').config.model_type == 'gpt2'
    done = sft_nb('respond', '--model', out/'model', '--data', 'toy.json', '--part', 'test', '--out', 'again.json', '--max-new', '4', cwd=home)
    assert done.returncode == 0, done.stderr
    assert [r['model_response'] for r in json.loads((home/'again.json').read_text())] == [r['model_response'] for r in rows]
    done = sft_nb('compare', out/'responses-before.json', out/'responses.json', '--out', 'compared', cwd=home)
    assert done.returncode == 0 and (home/'compared/report.html').exists(), done.stderr
    done = sft_nb('inspect', 'toy.json', '--model', 'tiny', '--rows', '1', cwd=home)
    assert done.returncode == 0 and 'tokens are learned' in done.stdout and 'nothing found' in done.stdout, done.stderr
    (home/'questions.jsonl').write_text('{"instruction": "Add 1 and 2."}\n{"instruction": "Add 2 and 3."}\n')
    done = sft_nb('respond', '--model', out/'model', '--data', 'questions.jsonl', '--out', 'new.json', '--max-new', '4', cwd=home)
    assert done.returncode == 0 and len(json.loads((home/'new.json').read_text())) == 2, done.stderr
    done = sft_nb('chat', '--model', out/'model', '--max-new', '3', cwd=home, stdin='Add 1 and 2.\n\n')
    assert done.returncode == 0, done.stderr
    done = sft_nb('chat', '--model', out/'model', '--max-new', '3', cwd=home, stdin='Add 1 and 2.\nAdd 1 and 2.\n\n')
    assert done.returncode == 0 and 'holds one question' in done.stderr, done.stderr
    assert done.stdout[:len(done.stdout)//2] == done.stdout[len(done.stdout)//2:]
    done = sft_nb('chat', '--model', 'tiny', '--template', 'chatml', '--max-new', '3', cwd=home, stdin='Add 1 and 2.\nAnd now?\n\n')
    assert done.returncode == 0 and 'one question' not in done.stderr, done.stderr
    line = complaint(sft_nb('chat', '--model', out/'model', '--template', 'chatml', cwd=home, stdin='hi\n'))
    assert 'was tuned with template' in line


def test_other_ways_to_train(home):
    for name, words in dict(lora=['--lora', '2'], tokens=['--template', 'chatml'], all=['--loss-on', 'all', '--prompt-weight', '0.5']).items():
        done = sft_nb('run', '--data', 'toy.json', '--model', 'tiny', '--name', name, '--epochs', '1', *words, *FAST, cwd=home)
        assert done.returncode == 0, done.stderr
    about = json.loads((home/'runs/lora/model/sft_nb.json').read_text())
    assert about['lora'] == 2 and about['data'] == 'toy.json' and about['prompt_weight'] == 0
    receipt = json.loads((home/'runs/lora/receipt.json').read_text())
    assert receipt['training']['rows_in'] == 34 and receipt['validation']['rows_in'] == 2


def test_adapters_learn_new_control_tokens(home):
    "Two tokens that begin alike must not stay alike: else no answer ever ends"
    from sft_nb.loading import load_model
    words = ['train', '--data', 'toy.json', '--model', 'tiny', '--template', 'chatml', '--lora', '2', '--lr', '1e-2', '--epochs', '2', *FAST[:2], '--no-preflight']
    done = sft_nb(*words, '--name', 'both', cwd=home)
    assert done.returncode == 0 and '2 control tokens added' in done.stdout, done.stderr
    table, old = load_model(home/'runs/both/model').model.embed.weight, load_model(home/'tiny').model.embed.weight
    assert (table[50257] - table[50258]).norm() > 1e-3 and (table[:50257] == old).all()
    assert '--weight-decay' in complaint(sft_nb(*words, '--name', 'pulled', '--weight-decay', '0.1', cwd=home))


def test_a_killed_run_goes_on_as_if_never_stopped(home):
    words = ['run', '--data', 'toy.json', '--model', 'tiny', '--epochs', '12', *FAST]
    assert sft_nb(*words, '--name', 'straight', cwd=home).returncode == 0
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    process = subprocess.Popen([sys.executable, '-m', 'sft_nb.cli', *words, '--name', 'killed'], cwd=home, env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and not list((home/'runs/killed').glob('checkpoints/*')): time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sft_nb(*words, '--name', 'killed', '--resume', cwd=home)
    assert done.returncode == 0, done.stderr
    for name in ('model/model.safetensors', 'responses.json', 'responses-before.json'):
        assert (home/'runs/killed'/name).read_bytes() == (home/'runs/straight'/name).read_bytes(), name


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_goes_on_as_if_never_stopped(home, number):
    words = ['train', '--data', 'toy.json', '--model', 'tiny', '--epochs', '40', *FAST[:2], '--no-preflight']
    if not (home/'runs/whole-way').exists(): assert sft_nb(*words, '--name', 'whole-way', cwd=home).returncode == 0
    out, env = home/f'runs/asked-{number}', dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    process = subprocess.Popen([sys.executable, '-m', 'sft_nb.cli', *words, '--out', out], cwd=home, env=env, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while time.time() < deadline and not list(out.glob('checkpoints/*')): time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 130 and 'the same command with --resume goes on' in said, said
    assert not (out/'model').exists() and list(out.glob('checkpoints/*'))
    assert sft_nb(*words, '--out', out, '--resume', cwd=home).returncode == 0
    assert (out/'model/model.safetensors').read_bytes() == (home/'runs/whole-way/model/model.safetensors').read_bytes()
    again = sft_nb(*words, '--out', out, '--resume', cwd=home)
    assert again.returncode == 0 and not (out/'checkpoints').exists()
    assert 'lr: 0.0001 -> 0.5' in complaint(sft_nb(*words, '--out', out, '--resume', '--lr', '0.5', cwd=home))
    assert 'loss_on' in complaint(sft_nb(*words, '--out', out, '--resume', '--loss-on', 'all', cwd=home))


def test_broken_records_are_counted_and_left_out(home):
    rows = json.loads((home/'toy.json').read_text())
    (home/'mixed.json').write_text(json.dumps([*rows, {'instruction': 'no answer'}, {'instruction': 3, 'output': 'x'}]))
    assert 'record 40' in complaint(sft_nb('train', '--data', 'mixed.json', '--model', 'tiny', '--name', 'mixed', cwd=home))
    done = sft_nb('train', '--data', 'mixed.json', '--model', 'tiny', '--name', 'mixed', '--drop-broken', '--epochs', '1', *FAST[:2],
                  '--no-preflight', cwd=home)
    assert done.returncode == 0 and 'records dropped: 2' in done.stdout, done.stderr


def test_judge_and_compare_with_a_scripted_judge(home):
    rows = [dict(instruction=f'Say {i}.', input='', output=f'number {i}') for i in range(30)]
    for name, text in (('right', 'number {}'), ('wrong', 'something else {}')):
        (home/f'{name}.json').write_text(json.dumps([{**r, 'model_response': text.format(i)} for i, r in enumerate(rows)]))
    with Scripted('good') as server:
        judge = ['--judge-url', server.url, '--judge-model', 'scripted']
        done = sft_nb('judge', 'right.json', *judge, '--out', 'judged', cwd=home)
        assert done.returncode == 0 and '30 of 30 rows have a verdict' in done.stdout, done.stdout + done.stderr
        assert (home/'judged/report.html').exists()
        done = sft_nb('compare', 'wrong.json', 'right.json', *judge, '--out', 'both', cwd=home)
        assert done.returncode == 0 and 'verdict   The second model is better' in done.stdout, done.stdout + done.stderr
        assert 'judge     before' in done.stdout and 'judge     after' in done.stdout


def test_judge_without_a_server(home):
    (home/'answers.json').write_text(json.dumps([dict(instruction='a', input='', output='b', model_response='b')]))
    assert '--judge-url' in complaint(sft_nb('judge', 'answers.json', cwd=home))
    assert '127.0.0.1:9' in complaint(sft_nb('judge', 'answers.json', '--judge-url', 'http://127.0.0.1:9/v1', '--judge-model', 'x', cwd=home))
