"Settings: every field has a flag, every flag lands in its field, files and flags agree, and what a run wrote gives the same run."
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
from test_cli import FAST, ROOT, complaint, home, sft_nb # noqa: F401

from sft_nb.choices import JobConfig, JudgePlace, Judging, LoraConfig, Patience, Sampling, Stops, TrainConfig
from sft_nb.cli import _build_parser, choose
from sft_nb.option_claims import other_value, words_for
from sft_nb.options import OPTIONS, make_job, read_settings, settings_of, settings_text
from sft_nb.settings import load_log

CLASSES = TrainConfig, LoraConfig, Sampling, Stops, JudgePlace, Judging, Patience, JobConfig
PARTS = 'train', 'lora', 'how', 'until', 'judge', 'judging'
BESIDE = { # what an option needs beside itself
    'lora_': ['--lora', '8'], 'top_': ['--temperature', '1'], 'min_p': ['--temperature', '1'], 'judge_': ['--judge-url', 'http://127.0.0.1:9/v1']}


def field_of(cfg, option):
    "What the configuration holds for an option"
    if option.owner is JudgePlace: return {'url': cfg.judge.place.base, 'model': cfg.judge.model, 'api': cfg.judge.place.api}[option.field]
    if option.owner is Patience: return getattr(cfg.judge.patience, option.field)
    part = {TrainConfig: cfg.train, LoraConfig: cfg.lora, Sampling: cfg.how, Stops: cfg.until, Judging: cfg.judging, JobConfig: cfg}[option.owner]
    return getattr(part, option.field)


def test_every_field_of_every_settings_class_has_one_flag():
    there = {(owner, f.name) for owner in CLASSES for f in fields(owner) if not (owner is JobConfig and f.name in PARTS)}
    assert {(o.owner, o.field) for o in OPTIONS.values()} == there
    assert len({o.flag for o in OPTIONS.values()}) == len(there)
    flags = {flag for action in _build_parser()._subparsers._group_actions[0].choices['run']._actions for flag in action.option_strings}
    assert {o.flag for o in OPTIONS.values()} <= flags
    assert all(o.about for o in OPTIONS.values()), [o.name for o in OPTIONS.values() if not o.about]


@pytest.mark.parametrize('name', OPTIONS)
def test_a_flag_lands_in_its_field_and_nowhere_else(name):
    option = OPTIONS[name]
    value = other_value(option)
    beside = next((words for start, words in BESIDE.items() if name.startswith(start) and name not in ('judge_url', 'lora')), [])
    parse = _build_parser().parse_args
    values, sources = choose(parse(['run', *beside, *words_for(option, value)]))
    assert sources[name] == option.flag
    before = make_job(choose(parse(['run', *beside]))[0]) if name not in ('judge_url', 'lora') else make_job({'lora': 1, 'judge_url': 'localhost'})
    after = make_job({'lora': 1, 'judge_url': 'localhost'} | values if name in ('judge_url', 'lora') else values)
    got = field_of(after, option)
    assert set(got) == set(value) if name == 'stop_ids' else got == value, (got, value)
    if option.owner in (JudgePlace, Patience): return
    assert field_of(before, option) != got
    plain = [settings_of(cfg) for cfg in (before, after)]
    changed = {k for k in plain[0] if plain[0][k] != plain[1][k]}
    assert changed <= {name} | ({'lr', 'lora'} if name == 'lora' else {'lr'} if name == 'adapter' else set()), changed


@pytest.mark.parametrize('name', OPTIONS)
def test_a_file_says_the_same_as_a_flag_and_a_flag_wins(name, tmp_path):
    option = OPTIONS[name]
    if option.group == 'folder': return
    value = other_value(option)
    needed = {'lora_': {'lora': 8}, 'top_': {'temperature': 1.}, 'min_p': {'temperature': 1.}, 'judge_': {'judge_url': 'http://127.0.0.1:9/v1'}}
    beside = next((v for start, v in needed.items() if name.startswith(start)), {})
    job = make_job(beside | {name: value})
    text = settings_text(settings_of(job), {})
    for file, content in (('a.toml', text), ('a.json', json.dumps(settings_of(job)))):
        (tmp_path/file).write_text(content, encoding='utf-8')
        assert read_settings(tmp_path/file)[name] == settings_of(job)[name]
        assert settings_of(make_job(read_settings(tmp_path/file))) == settings_of(job)
    if name in ('top_k', 'top_p', 'min_p', 'judge_url', 'lora') or option.default in (None, '', ()): return
    args = _build_parser().parse_args(['config', '--config', str(tmp_path/'a.json'), *words_for(option, option.default)])
    values, sources = choose(args)
    assert sources[name] == option.flag and settings_of(make_job(values))[name] == settings_of(JobConfig())[name]


def test_config_shows_sources_and_refuses_unknown_keys(home): # noqa: F811
    (home/'my.toml').write_text('epochs = 2\n[lora]\nrank = 4\n', encoding='utf-8')
    done = sft_nb('config', '--config', 'my.toml', '--seed', '5', cwd=home)
    lines = {line.split(' = ')[0]: line for line in done.stdout.splitlines()}
    assert lines['epochs'].endswith('# my.toml') and lines['seed'].endswith('# --seed') and lines['clip'].endswith('# default'), done.stderr
    assert lines['lr'].startswith('lr = 0.001') and lines['lr'].endswith('# default with --lora')
    (home/'again.toml').write_text(done.stdout, encoding='utf-8')
    again = sft_nb('config', '--config', 'again.toml', '--json', cwd=home)
    assert json.loads(again.stdout) == settings_of(make_job({'epochs': 2, 'lora': 4, 'seed': 5, 'lr': 1e-3}))
    (home/'bad.toml').write_text('epoch = 2', encoding='utf-8')
    assert "bad.toml: unknown setting 'epoch'; did you mean 'epochs'" in complaint(sft_nb('run', '--config', 'bad.toml', cwd=home))
    assert 'did you mean --epochs' in complaint(sft_nb('run', '--epoch-s', '2', cwd=home))
    assert '--lora-alpha: does nothing without --lora' in complaint(sft_nb('run', '--lora-alpha', '3', cwd=home))


def test_all_settings_of_a_run_given_back_make_the_same_weights(home): # noqa: F811
    words = ['--data', 'toy.json', '--model', 'tiny', *FAST, '--epochs', '3', '--lr', '2e-3', '--schedule', 'wsd', '--decay', '0.4', '--betas', '0.8,0.9',
             '--split-seed', '3', '--loss-on', 'all', '--prompt-weight', '0.3', '--lora', '2', '--lora-alpha', '7', '--lora-dropout', '0.1',
             '--lora-targets', 'c_attn', '--best', '--eval-every', '2', '--clip', '0.5', '--micro-batch-size', '3', '--batch-size', '6', '--temperature', '0.9']
    first = sft_nb('run', *words, '--name', 'first', cwd=home)
    assert first.returncode == 0, first.stderr
    for name, file in (('second', 'config.json'), ('third', 'model/sft_nb.json')):
        done = sft_nb('run', '--config', f'runs/first/{file}', '--name', name, cwd=home)
        assert done.returncode == 0, done.stderr
        for made in ('model/model.safetensors', 'responses.json', 'config.json'):
            assert (home/'runs'/name/made).read_bytes() == (home/'runs/first'/made).read_bytes(), (name, made)


def test_the_parser_needs_no_torch():
    code = "import sys; from sft_nb.cli import _build_parser; _build_parser(); print('torch' in sys.modules, 'httpx' in sys.modules)"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, env={'PYTHONPATH': str(ROOT), 'PATH': ''})
    assert done.stdout.split() == ['False', 'False'], done.stdout + done.stderr


def test_each_line_comes_when_it_happens_and_is_kept(home): # noqa: F811
    "As `sft_nb run | cat` would see it: the first lines are there while the process is still at work"
    words = ['train', '--data', 'toy.json', '--model', 'tiny', '--epochs', '60', *FAST[:2], '--no-preflight', '--name', 'piped']
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    env.pop('PYTHONUNBUFFERED', None)
    process = subprocess.Popen([sys.executable, '-m', 'sft_nb.cli', *words], cwd=home, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = ['']
    while not lines[-1].startswith('model '): lines.append(process.stdout.readline())
    assert process.poll() is None and not (home/'runs/piped/model').exists(), lines
    rest, complaints = process.communicate()
    assert process.returncode == 0, complaints
    assert (home/'runs/piped/terminal.log').read_text(encoding='utf-8') == ''.join(lines) + rest
    again = sft_nb(*words, '--resume', '--quiet', cwd=home)
    assert (again.returncode, again.stdout, again.stderr) == (0, '', '')
    assert (home/'runs/piped/terminal.log').read_text(encoding='utf-8').count('training ') == 2


def test_json_is_one_object_a_line_and_errors_are_among_them(home): # noqa: F811
    done = sft_nb('run', '--data', 'toy.json', '--model', 'tiny', '--name', 'told', '--json', *FAST, cwd=home)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    stages = {t['stage'] for t in told}
    assert {'data', 'split', 'model', 'rows', 'answers', 'training', 'score', 'verdict', 'report'} <= stages, stages
    assert next(t for t in told if t['stage'] == 'training')['steps'] == 5 and done.stderr == ''
    assert [t['text'] for t in told if t['stage'] == 'split'] == ['train 34, test 4, validation 2']
    done = sft_nb('run', '--data', 'toy.json', '--model', 'tiny', '--name', 'told', '--json', cwd=home)
    assert done.returncode == 2 and json.loads(done.stdout)['stage'] == 'error'


def test_a_dry_run_checks_everything_and_writes_nothing(home): # noqa: F811
    before = sorted(home.rglob('*'))
    done = sft_nb('run', '--data', 'toy.json', '--model', 'tiny', '--name', 'dry', '--dry-run', '--epochs', '2', '--no-preflight', cwd=home)
    assert done.returncode == 0, done.stderr
    for said in ('memory', 'disk', 'time', 'x 2 epochs = 10 steps', 'nothing was written'): assert said in done.stdout
    assert sorted(home.rglob('*')) == before
    assert 'lr must be above 0' in complaint(sft_nb('run', '--dry-run', '--lr', '0', cwd=home))


def test_a_shell_completes_options_and_their_values(tmp_path):
    script = sft_nb('completion', 'bash', cwd=tmp_path)
    assert script.returncode == 0, script.stderr
    (tmp_path/'done.sh').write_text(script.stdout)
    for typed, wanted in (('sft_nb ru', 'run'), ('sft_nb run --patie', '--patience'), ('sft_nb run --schedule w', 'wsd')):
        code = f"""source done.sh; COMP_WORDS=({typed}); COMP_CWORD={len(typed.split())-1}; COMP_LINE='{typed}'; COMP_POINT=${{#COMP_LINE}}
        $(complete -p sft_nb | sed 's/.*-F \\([^ ]*\\).*/\\1/') sft_nb {typed.split()[-1]} {typed.split()[-2]}; echo "${{COMPREPLY[@]}}" """
        done = subprocess.run(['bash', '-c', code], cwd=tmp_path, capture_output=True, text=True)
        assert wanted in done.stdout.split(), (typed, done.stdout, done.stderr)


def test_a_time_budget_fits_the_steps_and_is_kept(home): # noqa: F811
    words = ['train', '--data', 'toy.json', '--model', 'tiny', '--minutes', '0.1', *FAST[:2], '--name', 'timed']
    process = subprocess.Popen([sys.executable, '-m', 'sft_nb.cli', *words], cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    deadline = time.time() + 200
    while time.time() < deadline and not list((home/'runs/timed').glob('checkpoints/*')): time.sleep(.02)
    process.send_signal(signal.SIGINT)
    said, complaints = process.communicate()
    assert process.returncode == 130, (said, complaints)
    kept = json.loads((home/'runs/timed/config.json').read_text())
    assert kept['minutes'] == .1 and kept['steps'] > 5 and f"{kept['steps']} steps for 0.1 minutes" in said, said
    done = sft_nb(*words, '--resume', cwd=home)
    assert done.returncode == 0 and f"{kept['steps']} steps for 0.1 minutes: as when it began; the rate ends at 0" in done.stdout, done.stderr
    log = load_log(home/'runs/timed')
    assert len(log.steps) == kept['steps'] and log.steps[-1].lr < .02*kept['lr']
    again = sft_nb('train', '--config', 'runs/timed/config.json', '--name', 'timed-again', cwd=home)
    assert again.returncode == 0 and len(load_log(home/'runs/timed-again').steps) == kept['steps'], again.stderr
    assert '--minutes and --steps: each says' in complaint(sft_nb('train', '--minutes', '1', '--steps', '3', cwd=home))


@pytest.mark.slow
def test_three_minutes_are_three_minutes(tmp_path):
    done = sft_nb('train', '--minutes', '3', '--name', 'timed', cwd=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stderr
    log = load_log(tmp_path/'runs/timed')
    assert 150 < log.secs < 210 and log.steps[-1].lr < 1e-3*log.cfg.lr, (log.secs, log.steps[-1].lr)
