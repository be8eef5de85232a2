"Several processes train what one process trains; one that dies leaves a run that can be resumed by any number."
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOY = Path(__file__).with_name('toy_run.py')
ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')


def run(folder, n=1, settings='{}', *more, ok=True):
    folder.mkdir(exist_ok=True)
    start = [sys.executable] if n == 1 else [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n)]
    p = subprocess.Popen([*start, str(TOY), str(folder), settings, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENV, start_new_session=True)
    try: out, err = p.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        raise
    assert (p.returncode == 0) == ok, out + err[-3000:]
    if not ok: return out
    said = dict(re.findall(r'process (\d+): ([0-9a-f]+)', out)) # two processes may write into one line
    assert len(said) == n and len(set(said.values())) == 1, said
    return torch.load(folder/'weights.pt'), json.loads((folder/'losses.json').read_text())


def same(a, b, tol):
    for x,y in zip(a[1], b[1]): assert x == pytest.approx(y, rel=tol)
    for n,w in a[0].items(): torch.testing.assert_close(w, b[0][n], rtol=0, atol=tol*max(1, w.abs().max().item()))


@pytest.fixture(scope='module')
def alone(tmp_path_factory): return run(tmp_path_factory.mktemp('alone'))


@pytest.mark.parametrize('n', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_equal_one(alone, tmp_path, n):
    "The last batch of an epoch has two rows, so with four processes two of them have none"
    same(run(tmp_path/'n', n), alone, 1e-5)


def test_one_dies_and_one_goes_on(alone, tmp_path):
    run(tmp_path/'n', 2, '{}', '', '9', ok=False)
    assert sorted(os.listdir(tmp_path/'n/run/checkpoints'))[-1] == 'step-00000008'
    same(run(tmp_path/'n', 1, '{}', 'resume'), alone, 1e-5)


@pytest.mark.parametrize('n', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_equals_one(alone, tmp_path, n):
    same(run(tmp_path/'n', n, '{"shard": true}'), alone, 1e-5)


@pytest.mark.slow
def test_sharded_pieces_by_tokens_equal_one(alone, tmp_path):
    "The two make a different number of pieces of a step, and wait for each other"
    same(run(tmp_path/'n', 2, '{"shard": true, "micro_batch_size": 0, "micro_batch_tokens": 22}'), alone, 1e-5)


def test_sharded_by_two_goes_on_with_one_and_back(alone, tmp_path):
    folder, two = tmp_path/'n', '{"shard": true}'
    run(folder, 2, two, '', '9', ok=False)
    shards = folder/'run/checkpoints/step-00000008/shards'
    assert sorted(p.name for p in shards.iterdir()) == ['00000.safetensors', '00001.safetensors']
    run(folder, 1, '{}', 'resume', '17', ok=False)
    assert (folder/'run/checkpoints/step-00000016/state.safetensors').exists()
    same(run(folder, 2, two, 'resume'), alone, 1e-5)


def test_weights_of_a_sharded_model_are_float32_whatever_it_computed_in(tmp_path):
    "The last validation leaves the embedding and the last norm gathered, in bfloat16; not that copy is handed out"
    weights, _ = run(tmp_path/'n', 2, '{"shard": true, "dtype": "bfloat16"}')
    for n,w in weights.items(): assert not torch.equal(w, w.bfloat16().float()), n


def test_sharded_ends_with_the_best_weights(tmp_path):
    settings = dict(best=True, lr=.03)
    one, two = run(tmp_path/'one', 1, json.dumps(settings)), run(tmp_path/'two', 2, json.dumps(settings | dict(shard=True)))
    vals = one[1][1]
    assert vals.index(min(vals)) < len(vals)-1
    same(two, one, 1e-4)


def test_a_disk_that_refuses_is_told_by_all_processes(tmp_path):
    (tmp_path/'n/run').mkdir(parents=True)
    (tmp_path/'n/run/checkpoints').write_text('not a folder')
    said = run(tmp_path/'n', 2, '{"shard": true}', ok=False)
    assert sorted(re.findall(r'process (\d+):', said)) == ['0', '1'] and said.count('could not be written') == 2
