"Files from strangers: nothing of them is run, waited for without end, or taken for what it is not."
import ast
import hashlib
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from test_training import CFG, DATA, tiny
from sft_nb.basics import InputError
from sft_nb.run import train

ROOT = Path(__file__).resolve().parent.parent


class Bomb:
    "Whoever unpickles this makes a folder"
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.mkdir, (self.mark,)


SHORT = replace(CFG, best=False, epochs=1, batch_size=6)


def half_run(folder):
    "A run that was stopped after step 3, with checkpoints of the steps 2 and 3"
    def stop(entry, model): return 'enough' if entry.step == 3 else None
    train(tiny(), *DATA, SHORT, folder, hooks=[stop], say=list)
    return sorted((folder/'checkpoints').iterdir())


def go_on(folder, said=None): return train(tiny(), *DATA, SHORT, folder, resume=True, say=(said if said is not None else []).append)


def seal(path, **changes):
    "What somebody writes who knows how a `meta.json` is sealed"
    meta = json.loads((path/'meta.json').read_text())
    del meta['digest']
    meta = {k: v for k, v in (meta | changes).items() if v is not ...}
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (path/'meta.json').write_text(json.dumps(meta | dict(digest=digest)))


def lay_shards(path, mark, names=('.metadata',)):
    (path/'shards').mkdir()
    for name in names: (path/'shards'/name).write_bytes(pickle.dumps(Bomb(mark)))


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp('half')/'run'
    half_run(folder)
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    import shutil
    shutil.copytree(stopped, tmp_path/'run')
    return tmp_path/'run'


@pytest.mark.parametrize('names', [('.metadata',), ('__0_0.distcp', '.metadata'), ('00000.safetensors',)])
@pytest.mark.parametrize('listed', [False, True])
def test_a_pickle_in_a_checkpoint_is_never_opened(run, tmp_path, names, listed):
    "Added to an honest checkpoint, or in one whose meta.json has been sealed anew"
    *_, newest = sorted((run/'checkpoints').iterdir())
    lay_shards(newest, tmp_path/'went off', names)
    files = {f'shards/{n}': dict(bytes=(newest/'shards'/n).stat().st_size, sha256=hashlib.sha256((newest/'shards'/n).read_bytes()).hexdigest()) for n in names}
    if listed: seal(newest, files=json.loads((newest/'meta.json').read_text())['files'] | files)
    said = []
    if listed:
        with pytest.raises(InputError, match='shard|cannot be read|do not hold') as e: go_on(run, said)
        assert '\n' not in str(e.value)
    else:
        go_on(run, said)
        assert any('which it does not list' in line for line in said)
    assert not (tmp_path/'went off').exists()


META = dict(files=[..., 3, ['a'], {'a': 3}, {'a': {'bytes': '3', 'sha256': 'x'}}, {'../../run/log.jsonl': {'bytes': 3, 'sha256': ''}}],
    identity=[..., 'x', 3, []], step=[..., -1, 'x', 9.5, None, 99999], n_updates=[..., 'x', -3, 99], secs=['x', None, -1, True], dtype=[..., 3, 'load', 'int64x'],
    torch=[..., 3], threads=[..., 'x'], processes=[..., None])


@pytest.mark.parametrize(('name', 'value'), [(k, v) for k, values in META.items() for v in values])
def test_a_sealed_meta_of_the_wrong_kind_is_one_line(run, name, value):
    "The checkpoint before it is taken, or one line says what is wrong"
    *_, newest = sorted((run/'checkpoints').iterdir())
    seal(newest, **{name: value})
    try: log = go_on(run)
    except InputError as e: assert '\n' not in str(e) and 'step-' in str(e)
    else: assert [s.step for s in log.steps] == list(range(1, len(log.steps)+1))


@pytest.mark.parametrize('content', [b'\xff\xfe\x00bad\n', b'['*100_000 + b'\n', b'{"kind": "step"}\n', b'[]\n', b'{"kind": "run", "cfg": 3}\n',
    b'{"kind": "run", "cfg": {}, "dtype": "float32", "n_rows": 2}\n' + b'{"kind": "val", "step": "3", "epoch": 1, "seen_tokens": 3, "loss": 1}\n'])
def test_a_log_of_the_wrong_kind_is_one_line(run, content):
    (run/'log.jsonl').write_bytes(content)
    with pytest.raises(InputError) as e: go_on(run)
    assert '\n' not in str(e.value) and 'log.jsonl' in str(e.value)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes here')
def test_a_pipe_in_a_checkpoint_does_not_wait(run):
    *_, newest = sorted((run/'checkpoints').iterdir())
    (newest/'meta.json').unlink()
    os.mkfifo(newest/'meta.json')
    go_on(run)


EXECUTES = {'eval', 'exec', 'compile', '__import__', 'pickle', 'cPickle', 'dill', 'marshal', 'shelve', 'joblib', 'cloudpickle'}
LOADS = {'torch.load', 'np.load', 'numpy.load', 'yaml.load', 'torch.jit.load', 'dcp.load', 'torch.hub.load', 'torch.package', 'runpy.run_path'}

# the learner's own code; an optional package by a name of ours; records in a nameless file that this very process has written
ALLOWED = {('exercises.py', 'eval'), ('readers.py', '__import__'), ('streaming.py', 'pickle')}


def test_nothing_in_the_package_can_run_a_file():
    "No unpickler, no eval, no remote code: read off the syntax trees, imports inside functions too"
    for path in sorted((ROOT/'sft_nb').glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            where = f'{path.name}:{getattr(node, "lineno", 0)}'
            if isinstance(node, ast.Import):
                for a in node.names: assert (path.name, a.name) in ALLOWED or a.name.split('.')[0] not in EXECUTES, where
            if isinstance(node, ast.ImportFrom):
                assert (node.module or '').split('.')[0] not in EXECUTES and 'distributed.checkpoint' not in (node.module or ''), where
            if not isinstance(node, ast.Call): continue
            name = ast.unparse(node.func)
            assert (path.name, name) in ALLOWED or name not in EXECUTES | LOADS, (where, name)
            for k in node.keywords: assert k.arg not in ('allow_pickle', 'trust_remote_code'), (where, k.arg)


CHATML = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
ENDLESS = ['{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}', "{{ 'a'*2000000000 }}", "{{ 'a'|center(5000000000) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}", '{{ 10**100000 }}', '{{ lipsum(n=10**7) }}',
    '{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}', '{% set x = [1] %}' + '{% set x = [x, x] %}'*40 + '{{ x }}',
    "{{ 'x'.join(range(99999)|map('string')|map('replace', '9', 'x'*999999)) }}", '{% for i in range(30000) %}' + 'literal text '*1000 + '{% endfor %}',
    "{{ '%*d' % (10**9, 1) }}", "{{ '{:>{}}'.format('a', 10**9) }}", "{% for x in [[[1]]] recursive %}{{ loop(range(99999)) }}{% endfor %}"]
UNREADABLE = ['{% for a in b %}'*30 + '{% endfor %}'*30, '{{ ' + '['*5000 + ']'*5000 + ' }}', '{{ ' + '('*5000 + ')'*5000 + ' }}', '{{ 1' + '+1'*20000 + ' }}',
    '{% if a %}'*2000 + '{% endif %}'*2000, '{{ ' + '1'*10000 + ' }}', '\r\r{% if %}\r', '{{ x', '{% for %}', "{{ 'a' | nothing }}"]


@pytest.mark.parametrize('source', ENDLESS + UNREADABLE, ids=lambda s: s[:30])
def test_a_template_that_goes_on_for_ever_or_cannot_be_read_is_one_line(source):
    "Counted in steps and characters, so that no clock decides"
    from sft_nb.chat import ChatTemplate
    from sft_nb.data import Message
    with pytest.raises(InputError) as e: ChatTemplate('strange', source).render((Message('user', 'Hi'),), 'x.json record 0')
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


def test_long_conversations_are_rendered_as_often_as_short_ones(monkeypatch):
    from sft_nb import chat
    from sft_nb.data import as_records
    from sft_nb.templates import render_record
    plain = chat.render_jinja
    counts = []
    def counted(*args):
        counts[-1] += 1
        return plain(*args)
    monkeypatch.setattr(chat, 'render_jinja', counted)
    for n in (100, 200, 400):
        counts.append(0)
        turns = [{'role': ('user', 'assistant')[i%2], 'content': f'words {i}'} for i in range(n)]
        render_record(as_records([{'messages': turns}])[0], chat.ChatTemplate(f'mine{n}', CHATML))
    assert max(counts) <= min(counts)+2 < 20, counts


def test_an_audit_of_nothing_is_no_audit():
    from audited import counts
    pins = '# pins\na==1\nb==2\n'
    assert counts({'dependencies': [{'name': 'a', 'version': '1', 'vulns': []}, {'name': 'b', 'skip_reason': 'not found'}]}, pins) == (2, 1)
