"What a notebook cell cannot hold: processes that die at any moment, and every fast path against the slowest way there is."
import errno
import hashlib
import json
import multiprocessing
import os
import random
import signal
import stat
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sft_nb import checkpoints
from sft_nb import preflight
from sft_nb.basics import InputError
from sft_nb.rows import Example
from sft_nb.model import ModelConfig
from sft_nb.decoder import Decoder
from sft_nb.choices import LoraConfig
from sft_nb.lora import add_lora
from sft_nb.optimizer import FlatAdamW
from sft_nb.choices import TrainConfig
from sft_nb.settings import StepLog, ValLog, load_log, row_lengths, run_bytes, step_rows
from sft_nb.steps import accumulate, cut_step, micro_batches, processes, validate
from sft_nb import run as run_module
from sft_nb.run import train
from sft_nb.preflight import check_run, try_batch
from sft_nb.watch import live_plot, plot_losses, sample_answers, tensorboard, weights_and_biases

FORK = multiprocessing.get_context('fork')
LLAMA = dict(family='llama', vocab_size=31, n_layers=3, width=32, n_heads=4, n_kv_heads=2, head_dim=8, mlp_width=48, max_length=64, tied=True)
GPT2 = dict(family='gpt2', vocab_size=31, n_layers=2, width=32, n_heads=4, n_kv_heads=4, head_dim=8, mlp_width=64, max_length=64, norm='layer',
    positions='learned', act='gelu_tanh', gated_mlp=False, tied=True, qkv_bias=True, o_bias=True, mlp_bias=True)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(seed=1, shape=LLAMA):
    torch.manual_seed(seed)
    return Decoder(ModelConfig(**shape))


def row(prompt, answer, weight=1., prompt_weight=0.):
    learn = [prompt_weight]*len(prompt) + [weight]*len(answer)
    return Example(ids=np.array([*prompt, *answer], dtype=np.int32), learn=np.array(learn, dtype=np.float32), where='test')


def rows(n=24, seed=3, **kw):
    rng = np.random.default_rng(seed)
    draw = lambda lo, hi: rng.integers(1, 31, size=rng.integers(lo, hi)).tolist()
    return [row([*range(1, 12), *draw(1, 9)], draw(1, 7), **kw) for _ in range(n)]


def bits(model):
    return hashlib.sha256(b''.join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters())).hexdigest()


def quiet(*_): pass


# every fast path against one row at a time, all logits, plain cross-entropy

def naive_gradients(model, examples):
    model.zero_grad(set_to_none=True)
    total = 0.
    for e in examples:
        logits = model(torch.tensor(e.ids[None, :-1], dtype=torch.int64))[0]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(e.ids[1:], dtype=torch.int64), reduction='none')
        total = total + (nll*torch.tensor(e.learn[1:])).sum()
    total.backward()
    return total.item(), {n: p.grad.clone() for n,p in model.named_parameters()}


BATCHES = dict(
    ragged=rows(8), one_row=rows(1), identical=rows(1)*5, one_token_answers=[row([*range(1, 12), i], [7]) for i in range(12, 18)],
    no_common_preamble=[row([i, *range(1, 14)], [5, 7]) for i in range(14, 20)], everything_learned=rows(6, prompt_weight=1.),
    prompt_weighted=rows(6, prompt_weight=.1), some_rows_masked=[*rows(4), *rows(3, seed=9, weight=0.)],
    only_the_preamble_common=[row(range(1, 12), [i, 7]) for i in range(12, 18)])


@pytest.mark.parametrize('shape', [LLAMA, GPT2], ids=['llama', 'gpt2'])
@pytest.mark.parametrize('kind', BATCHES)
def test_fast_paths_equal_the_naive_one(kind, shape):
    examples = BATCHES[kind]
    model = tiny(shape=shape)
    want, grads = naive_gradients(model, examples)
    for share in (True, False):
        for size in (0, 1, 3):
            model.zero_grad(set_to_none=True)
            loss = accumulate(model, micro_batches(examples, size, share))
            assert loss == pytest.approx(want, rel=1e-5)
            for name,p in model.named_parameters():
                torch.testing.assert_close(p.grad, grads[name], rtol=1e-5, atol=1e-5*grads[name].abs().max().item()+1e-7, msg=f'{name} {share} {size}')


@pytest.mark.parametrize('kind', BATCHES)
def test_a_budget_of_tokens_cuts_a_step_and_changes_nothing(kind):
    examples, model = BATCHES[kind], tiny()
    want, grads = naive_gradients(model, examples)
    longest = max(len(e.ids)-1 for e in examples)
    for share in (True, False):
        for budget in (longest, longest+3, 2*longest+1, 10**6):
            cfg = TrainConfig(micro_batch_tokens=budget, share_prefix=share)
            pieces = cut_step(examples, cfg)
            assert max(b.n_tokens for b in pieces) <= budget and sum(b.n_rows for b in pieces) == len(examples)
            assert sum(b.n_targets for b in pieces) == pytest.approx(sum(float(e.learn[1:].sum()) for e in examples))
            model.zero_grad(set_to_none=True)
            assert accumulate(model, pieces) == pytest.approx(want, rel=1e-5)
            for name,p in model.named_parameters():
                torch.testing.assert_close(p.grad, grads[name], rtol=1e-5, atol=1e-5*grads[name].abs().max().item()+1e-7, msg=f'{name} {share} {budget}')


def test_validation_is_the_naive_mean():
    model, examples = tiny(), rows(9)
    want, _ = naive_gradients(model, examples)
    assert validate(model, examples, 4) == pytest.approx(want/sum(e.learn[1:].sum() for e in examples), rel=1e-6)


# kills

CFG = TrainConfig(lr=3e-3, epochs=4, batch_size=4, micro_batch_size=3, dtype='float32', save_every=1, eval_every=5, best=True)
DATA = rows(22), rows(6, seed=8)


def child(folder, cfg, prepare=None, crash=None):
    "What each killed process does: resume the run, or begin it"
    torch.set_num_threads(1)
    model = tiny()
    if prepare: prepare(model)
    if crash: crash()
    train(model, *DATA, cfg, folder, resume=True, say=quiet)
    (folder/'done').write_text(bits(model))


def run_child(*args):
    p = FORK.Process(target=child, args=args)
    p.start()
    return p


def only_mlp(model):
    for n,p in model.named_parameters(): p.requires_grad_('down' in n)


def adapters(model): add_lora(model, LoraConfig(rank=2, dropout=.2))


def unbroken(cfg, prepare=None):
    model = tiny()
    if prepare: prepare(model)
    log = train(model, *DATA, cfg, say=quiet)
    return bits(model), [(s.step, s.loss) for s in log.steps], [(v.step, v.loss) for v in log.vals]


def kill_often(folder, n_kills, seed, cfg, prepare=None):
    draw, kills, torn = random.Random(seed), 0, 0
    folder.mkdir()
    while not (folder/'done').exists():
        p = run_child(folder, cfg, prepare)
        p.join(timeout=None if kills>=n_kills else draw.uniform(.01, .35))
        if p.is_alive():
            os.kill(p.pid, signal.SIGKILL)
            kills += 1
        p.join()
        torn += any((folder/'checkpoints').glob('.part-*'))
    log = load_log(folder)
    return (folder/'done').read_text(), [(s.step, s.loss) for s in log.steps], [(v.step, v.loss) for v in log.vals], kills, torn


@pytest.mark.parametrize('dtype,prepare', [('float32', None), ('bfloat16', None), ('float32', only_mlp), ('bfloat16', adapters)],
    ids=['float32', 'bfloat16', 'part_of_the_weights', 'lora_with_dropout'])
def test_killed_and_resumed_is_never_stopped(tmp_path, dtype, prepare):
    cfg = replace(CFG, dtype=dtype)
    *got, kills, torn = kill_often(tmp_path/'run', 6, 1, cfg, prepare)
    assert tuple(got) == unbroken(cfg, prepare)
    assert kills > 0


def stop_after(n): return lambda entry, model: 'enough' if isinstance(entry, StepLog) and entry.step == n else None


@pytest.mark.parametrize('settings', [dict(micro_batch_size=0, micro_batch_tokens=40), dict(length_window=2)], ids=['tokens', 'lengths'])
def test_stopped_anywhere_and_resumed_is_never_stopped(tmp_path, settings):
    cfg = replace(CFG, **settings)
    whole = unbroken(cfg)
    for n in (1, 13):
        train(tiny(), *DATA, cfg, tmp_path/str(n), hooks=[stop_after(n)], say=quiet)
        model = tiny()
        log = train(model, *DATA, cfg, tmp_path/str(n), resume=True, say=quiet)
        assert (bits(model), [(s.step, s.loss) for s in log.steps], [(v.step, v.loss) for v in log.vals]) == whole


@pytest.mark.parametrize('settings', [{}, dict(length_window=1), dict(length_window=3), dict(length_window=3, micro_batch_tokens=40, micro_batch_size=0)])
def test_rows_sorted_by_length_are_trained_as_a_plain_loop_trains_them(settings):
    "Autograd, PyTorch's AdamW, one row at a time, in the order of `step_rows`: each row once an epoch, each target with the same weight"
    cfg = replace(CFG, best=False, epochs=2, lr=1e-4, schedule='constant', warmup=0., **settings)
    model, plain, lengths = tiny(), tiny(), row_lengths(DATA[0], cfg)
    log = train(model, *DATA, cfg, say=quiet)
    adam = torch.optim.AdamW(plain.parameters(), lr=cfg.lr, weight_decay=0.)
    order = [step_rows(s, len(DATA[0]), cfg, lengths) for s in range(len(log.steps))]
    assert all(sorted(sum(order[e*6:e*6+6], [])) == list(range(22)) for e in range(2)) and order[:6] != order[6:]
    for batch, done in zip(order, log.steps):
        examples = [DATA[0][i] for i in batch]
        total, _ = naive_gradients(plain, examples)
        n_targets = sum(float(e.learn[1:].sum()) for e in examples)
        assert done.loss == pytest.approx(total/n_targets, rel=1e-5) and done.n_targets == pytest.approx(n_targets)
        for p in plain.parameters(): p.grad /= n_targets
        torch.nn.utils.clip_grad_norm_(plain.parameters(), cfg.clip)
        adam.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()): torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, msg=name)


def test_a_row_over_the_budget_of_tokens_is_told_before_the_first_step(tmp_path):
    with pytest.raises(InputError, match=r'has \d+ tokens, more than a micro-batch may hold \(micro_batch_tokens=13\)'):
        train(tiny(), *DATA, TrainConfig(micro_batch_tokens=13), tmp_path/'run', say=quiet)
    assert not (tmp_path/'run').exists()


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    "Long enough a run that fifty processes can die in it; some die while they write"
    cfg = replace(CFG, epochs=80)
    *got, kills, torn = kill_often(tmp_path/'run', 50, 2, cfg)
    print(f'{kills} kills, {torn} of them while a checkpoint was being written')
    assert tuple(got) == unbroken(cfg)
    assert kills == 50 and torn > 0


def die_at(n):
    "Kill this process at the `n`-th act on the disk that a checkpoint consists of"
    count = [0]
    def guard(f):
        def acted(*args, **kw):
            count[0] += 1
            if count[0] == n: os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kw)
        return acted
    def crash():
        for name in ('fsync', 'rename', 'replace', 'rmdir', 'unlink', 'mkdir'): setattr(os, name, guard(getattr(os, name)))
        checkpoints.write_tensors = guard(checkpoints.write_tensors)
    return crash


def test_dying_at_each_act_of_writing(tmp_path):
    "Not random moments but all of them: between any two acts on the disk, and the run still ends with the same bits"
    cfg = replace(CFG, epochs=.4, eval_every=2, keep_last=1)
    want, n, alive = unbroken(cfg), 0, False
    while not alive:
        n += 1
        folder = tmp_path/f'run{n}'
        folder.mkdir()
        p = run_child(folder, cfg, None, die_at(n))
        p.join()
        alive = p.exitcode == 0
        if not alive: run_child(folder, cfg).join()
        log = load_log(folder)
        assert ((folder/'done').read_text(), [(s.step, s.loss) for s in log.steps], [(v.step, v.loss) for v in log.vals]) == want, n
    assert n > 30


def test_damaged_newest_falls_back_and_says_so(tmp_path):
    cfg, said = replace(CFG, epochs=2), []
    train(tiny(), *DATA, cfg, tmp_path/'run', hooks=[lambda e, m: 'stop' if e.step==7 else None], say=quiet)
    state = tmp_path/'run/checkpoints/step-00000007/state.safetensors'
    data = bytearray(state.read_bytes())
    data[len(data)//2] ^= 1
    state.write_bytes(data)
    model = tiny(5)
    train(model, *DATA, cfg, tmp_path/'run', resume=True, say=said.append)
    assert any('step-00000007: damaged' in line for line in said) and any('step-00000006 of' in line for line in said)
    assert bits(model) == unbroken(cfg)[0]
    for p in (tmp_path/'run/checkpoints').iterdir(): (p/'meta.json').write_text('')
    with pytest.raises(InputError, match='no checkpoint is whole'): train(tiny(), *DATA, cfg, tmp_path/'run', resume=True, say=quiet)


def test_a_full_disk_is_said_and_leaves_the_one_before(tmp_path, monkeypatch):
    real = checkpoints.write_tensors
    def full(path, tensors):
        if '-00000004' in str(path): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, tensors)
    monkeypatch.setattr(checkpoints, 'write_tensors', full)
    with pytest.raises(InputError, match='No space left'): train(tiny(), *DATA, replace(CFG, best=False), tmp_path/'run', say=quiet)
    assert sorted(os.listdir(tmp_path/'run/checkpoints')) == ['step-00000002', 'step-00000003']
    monkeypatch.undo()
    model, cfg = tiny(5), replace(CFG, best=False)
    train(model, *DATA, cfg, tmp_path/'run', resume=True, say=quiet)
    assert bits(model) == unbroken(cfg)[0]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_cleanly(tmp_path, number):
    cfg = replace(CFG, epochs=500, save_every=100_000, best=False)
    p = run_child(tmp_path/'run', cfg)
    while not (tmp_path/'run/log.jsonl').exists() or len((tmp_path/'run/log.jsonl').read_text().splitlines()) < 12: time.sleep(.02)
    os.kill(p.pid, number)
    p.join(30)
    log = load_log(tmp_path/'run')
    assert p.exitcode == 0 and log.stopped.startswith(signal.Signals(number).name)
    assert os.listdir(tmp_path/'run/checkpoints') == [f'step-{log.steps[-1].step:08d}']


def test_refusals_show_the_difference(tmp_path):
    cfg = replace(CFG, epochs=1)
    train(tiny(), *DATA, cfg, tmp_path/'run', say=quiet)
    again = lambda model=None, data=DATA, cfg=cfg: train(model or tiny(), *data, cfg, tmp_path/'run', resume=True, say=quiet)
    with pytest.raises(InputError, match=r'cfg.seed: 123 -> 5'): again(cfg=replace(cfg, seed=5))
    with pytest.raises(InputError, match='validation_rows'): again(data=(DATA[0], DATA[1][1:]))
    with pytest.raises(InputError, match='trained_weights'): again(tiny(shape=dict(LLAMA, n_layers=2)))
    frozen = tiny()
    frozen.embed.requires_grad_(False)
    with pytest.raises(InputError, match='frozen_weights.*trained_weights'): again(frozen)
    with pytest.raises(InputError, match=r'\(model.rope_theta: 10000.0 -> 500.0\)'): again(tiny(shape=dict(LLAMA, rope_theta=500.)))
    assert again(cfg=replace(cfg, keep_last=1, save_every=3)).steps[-1].step == 6  # these two may differ


def test_another_adapter_is_another_run(tmp_path):
    cfg, lora = replace(CFG, epochs=1), lambda **kw: add_lora(tiny(), LoraConfig(rank=2, **kw))
    again = lambda **kw: train(lora(**kw), *DATA, cfg, tmp_path/'run', resume=True, say=quiet)
    train(lora(), *DATA, cfg, tmp_path/'run', say=quiet)
    with pytest.raises(InputError, match=r'\(lora.alpha: 16.0 -> 4.0\)'): again(alpha=4.)
    with pytest.raises(InputError, match=r'\(lora.dropout: 0.0 -> 0.2\)'): again(dropout=.2)
    with pytest.raises(InputError, match=r'\(lora.root_scale: false -> true\)'): again(root_scale=True)
    assert again().steps[-1].step == 6


def stop(entry, model): return 'enough' if isinstance(entry, StepLog) else None


def kill(*_): os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('when', ['later', 'before_it_is_kept'])
def test_the_best_weights_are_those_of_a_logged_validation(tmp_path, when):
    "Validations between two checkpoints, a kill, and a stop soon after: what is kept as best stands in the log"
    cfg, folder, model = replace(CFG, save_every=10), tmp_path/'run', tiny()
    data = DATA[0], DATA[0][:6]  # seen rows become ever better
    def die():
        keep = run_module.keep_best
        if when=='before_it_is_kept':
            run_module.keep_best = lambda plan, state: kill() if state.step == 15 else keep(plan, state)
        train(tiny(), *data, cfg, folder, hooks=[lambda e, m: kill() if e.step == 17 else None], say=quiet)
    p = FORK.Process(target=die)
    p.start()
    p.join()
    log = train(model, *data, cfg, folder, hooks=[stop], resume=True, say=quiet)
    assert log.best_val.step == 15 and len(log.steps) == 16
    assert validate(model, data[1]) == pytest.approx(log.best_val.loss, rel=1e-6)


def test_best_weights_that_are_gone_are_not_replaced_by_others(tmp_path):
    folder = tmp_path/'run'
    log = train(tiny(), *DATA, CFG, folder, say=quiet)
    best = log.best_val.step
    assert best < log.steps[-1].step
    again = lambda: train(tiny(), *DATA, CFG, folder, resume=True, say=quiet)
    [kept] = (folder/'best').iterdir()
    kept.rename(folder/'elsewhere')
    with pytest.raises(InputError, match=f'step {best}, got nothing'): again()
    checkpoints.save_checkpoint(folder/'best', best+1, dict(master=torch.zeros(3)), {})
    with pytest.raises(InputError, match=f'step {best}, got step-0*{best+1};'): again()


def test_a_run_folder_that_cannot_be_written_leaves_the_model_as_it_was(tmp_path):
    model, cfg = tiny(), replace(CFG, dtype='bfloat16')
    before = bits(model)
    (tmp_path/'run/config.json').mkdir(parents=True)
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='run: cannot be written .Is a directory'): train(model, *DATA, cfg, tmp_path/'run', say=quiet)
    with pytest.raises(InputError, match='file: cannot be written .File exists'): train(model, *DATA, cfg, tmp_path/'file', say=quiet)
    assert bits(model) == before and all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())


@pytest.mark.skipif(os.name == 'nt', reason='what is checked here fails there by itself')
def test_files_are_synced_through_handles_that_may_write(tmp_path, monkeypatch):
    "Windows refuses others"
    import fcntl
    real, read_only = os.fsync, []
    def fsync(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode): read_only.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY)
        real(handle)
    monkeypatch.setattr(os, 'fsync', fsync)
    train(tiny(), *DATA, replace(CFG, epochs=.4), tmp_path/'run', say=quiet)
    assert read_only and not any(read_only)


def test_a_finished_run_resumes_to_its_end(tmp_path):
    cfg, model = replace(CFG, epochs=1), tiny(7)
    train(tiny(), *DATA, cfg, tmp_path/'run', say=quiet)
    log = train(model, *DATA, cfg, tmp_path/'run', resume=True, say=quiet)
    assert bits(model) == unbroken(cfg)[0] and len(log.steps) == 6
    kinds = [json.loads(line)['kind'] for line in (tmp_path/'run/log.jsonl').read_text().splitlines()]
    assert kinds.count('run') == kinds.count('end') == 1


def test_a_length_that_is_no_number_is_an_input_error():
    model = tiny()
    with torch.no_grad(): model.embed.weight[3] = float('inf')
    with pytest.raises(InputError, match='lower lr'): train(model, *DATA, CFG, say=quiet)


# several processes

def in_processes(n, folder, f):
    "Run `f(rank)` in `n` processes that know each other, and give their exit codes"
    def one(rank):
        dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=n)
        f(rank)
        dist.destroy_process_group()
    ps = [FORK.Process(target=one, args=(rank,)) for rank in range(n)]
    for p in ps: p.start()
    for p in ps: p.join(60)
    for p in ps: p.kill()
    return [p.exitcode for p in ps]


def test_a_stop_at_the_first_validation_stops_all_processes(tmp_path):
    def f(rank):
        log = train(tiny(), *DATA, CFG, tmp_path/'run', hooks=[lambda e, m: 'enough' if isinstance(e, ValLog) else None], say=quiet)
        assert log.stopped == 'enough' and not log.steps
    assert in_processes(2, tmp_path, f) == [0, 0]


def test_a_divided_model_is_not_sampled(tmp_path):
    from sft_nb.sharding import shard_model
    def f(rank):
        with pytest.raises(InputError, match='got shard=True'):
            sample_answers(None, [[1, 2]])(ValLog(0, 0., 0, 1.), shard_model(tiny()))
    assert in_processes(1, tmp_path, f) == [0]


def test_processes_must_be_able_to_sum_on_the_cpu(monkeypatch):
    group = lambda name: lambda: str(dist.distributed_c10d.BackendConfig(dist.Backend(name)))
    for name, value in dict(is_initialized=True, get_world_size=2, get_rank=1).items(): monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, 'get_backend_config', group('nccl'))
    with pytest.raises(InputError, match='cannot sum on the CPU, got cuda:nccl'), processes(): pass
    for name in 'gloo', 'cpu:gloo,cuda:nccl':
        monkeypatch.setattr(dist, 'get_backend_config', group(name))
        with processes() as world: assert (world.rank, world.size) == (1, 2)


# memory

def tensors_in(x):
    "All tensors that an object holds, in lists and dictionaries too"
    if isinstance(x, torch.Tensor): return [x]
    parts = [*x.values(), *x] if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [t for part in parts for t in tensors_in(part)]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('size', [0, 2])
@pytest.mark.parametrize('prepare', [lambda model: None, only_mlp, adapters, lambda model: adapters(model.to(torch.bfloat16))],
    ids=['all', 'part', 'lora', 'lora_on_16_bits'])
def test_the_bytes_of_a_run_are_those_it_takes(dtype, size, prepare):
    model, cfg = tiny(), TrainConfig(dtype=dtype, micro_batch_size=size)
    prepare(model)
    told, flat = run_bytes(model, cfg), FlatAdamW(model, getattr(torch, dtype))
    accumulate(model, micro_batches(rows(8), size), flat.bank)
    flat.step(lr=1e-3)
    held = [s.untyped_storage() for s in tensors_in(vars(flat.flat) | dict(scratch=()))+list(model.parameters())]
    assert told == sum({s.data_ptr(): s.nbytes() for s in held}.values())


def test_a_batch_that_does_not_fit_is_a_finding(monkeypatch):
    def full(*_): raise torch.OutOfMemoryError('CUDA out of memory')
    model = tiny()
    before = bits(model)
    monkeypatch.setattr(preflight, 'accumulate', full)
    for size, cure in (8, 'micro_batch_size=4'), (1, 'recompute=True'):
        found = check_run(model, DATA[0], DATA[1], TrainConfig(dtype='bfloat16', batch_size=size), stop_ids=range(31))
        with pytest.raises(InputError, match=f'memory: {size} rows at once do not fit .* {cure}'): found.raise_if_bad()
    assert bits(model) == before and model.embed.weight.dtype == torch.float32


def test_the_trial_recomputes_where_the_run_does(monkeypatch):
    seen, real = [], preflight.accumulate
    monkeypatch.setattr(preflight, 'accumulate', lambda model, *a: seen.append(model.shortcuts.recompute) or real(model, *a))
    model = tiny()
    for recompute in (False, True): try_batch(model, DATA[0][:4], TrainConfig(dtype='float32', recompute=recompute), 1)
    assert seen == [False, True] and not model.shortcuts.recompute


# hooks

def test_live_plot_draws_in_one_place(monkeypatch):
    shown = []
    class Place:
        def update(self, figure): shown.append(figure)
    def display(figure, display_id):
        shown.append(figure)
        return Place()
    monkeypatch.setattr('IPython.display.display', display)
    log = train(tiny(), *DATA, CFG, hooks=[live_plot(4)], say=quiet)
    assert len(shown) == 6 + 5  # every fourth of 24 steps, and the validations after 5, 10, 15, 20 and 24
    lines = [line.get_xdata() for line in shown[-1].axes[0].lines]
    assert [len(x) for x in lines] == [len(log.steps), len(log.vals)]


def test_a_part_of_a_log_has_the_same_two_rulers():
    log = train(tiny(), *DATA, CFG, say=quiet)
    def tokens_an_epoch(log):
        figure = plot_losses(log)
        figure.draw_without_rendering()
        lower, upper = figure.axes[0], figure.axes[0].child_axes[0]
        return upper.get_xlim()[1]/lower.get_xlim()[1]
    whole = tokens_an_epoch(log)
    assert whole == pytest.approx(log.seen_tokens/4)
    assert tokens_an_epoch(replace(log, steps=log.steps[12:])) == pytest.approx(whole)  # two whole epochs of four


def test_numbers_reach_tensorboard_and_wandb(monkeypatch, tmp_path):
    for name, hook in dict(tensorboard=lambda: tensorboard(tmp_path), wandb=weights_and_biases).items():
        monkeypatch.setitem(sys.modules, dict(tensorboard='torch.utils.tensorboard').get(name, name), None)
        with pytest.raises(InputError, match=f'pip install {name}'): hook()
    got = {}
    writer = SimpleNamespace(add_scalar=lambda name, value, step: got.setdefault(name, []).append((step, value)), flush=quiet)
    run = SimpleNamespace(log=lambda values, step: [writer.add_scalar(f'wandb {k}', v, step) for k,v in values.items()])
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=lambda folder: writer))
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=lambda **settings: run))
    log = train(tiny(), *DATA, CFG, hooks=[tensorboard(tmp_path), weights_and_biases(project='toy')], say=quiet)
    for prefix in '', 'wandb ':
        assert got[prefix+'training/loss'] == [(s.step, s.loss) for s in log.steps]
        assert got[prefix+'validation/loss'] == [(v.step, v.loss) for v in log.vals]
