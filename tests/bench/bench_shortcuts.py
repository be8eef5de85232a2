"""What does each shortcut bring? The same batch is learned with all of them, and with one of them off, in turn, in one process.

    pip install -e '.[dev]'
    python tests/bench/bench_shortcuts.py --batches 12

For each shortcut: how many times as long a step takes without it, as the median over the batches. Steps lie next to each other in time, so that a machine
whose speed drifts is fair to all. The work is that of bench_training.py: the default model, eight rows of the record set a step.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench_training import BATCH, ROOT, prepare, read_rows

WITHOUT = {
    'everything': 'padded rectangle, all logits, autograd only',
    'shared prefix': 'each row computes the prefix again',
    'ends at targets': 'the last block and the head compute every position',
    'derivatives by hand': "autograd's derivatives and torch's own products",
    "oneDNN's products": 'float32 products by the library torch prefers',
    'gradients in place': 'autograd adds each gradient to the flat one',
    'rows of like length': 'one rectangle of attention for the whole batch',
    'grouped attention': 'keys and values are repeated for each query head',
    'flat AdamW': 'a pass over all tensors for each of: to float32, scale, length, clip, update, round',
    'one gradient of the table': 'a tied table gets two gradients, which are added',
    'few shapes': 'batches are not filled up to a multiple of 16 tokens and targets',
    'keeping activations': 'blocks are computed again in the backward pass (`recompute`)'}


def repeated_keys(Attend):
    "`attend_rows` as it would be without grouping: one key head a query head"
    def attend_rows(heads, mask, window, cfg, cuts):
        (q, k, v), G = heads, cfg.n_heads//cfg.n_kv_heads
        B, K, n, d = q.shape
        k, v = (x.repeat_interleave(G, 1) for x in (k, v))
        return Attend.of(q.view(B, K*G, n//G, d), k, v, mask[:n//G], cfg.scale).view(q.shape)
    return attend_rows


def tensor_by_tensor(opt):
    "`FlatAdamW.step` with torch's functions for lists of tensors, on the same masters and moments"
    import torch
    from sft_nb import optimizer as O
    flat, how = opt.flat, opt.how
    cut = lambda flat_N: list(O.windows(opt.named, flat_N).values())
    def step(lr, scale=1.):
        O._gather(flat)
        grads = [g.float() for g in cut(flat.grad_N)]
        torch._foreach_mul_(grads, scale)
        norm = torch.stack(torch._foreach_norm(grads)).norm().item()
        if how.clip and norm>how.clip: torch._foreach_mul_(grads, how.clip/norm)
        flat.n_updates += 1
        rows = list(zip(cut(flat.master_N), grads, cut(flat.mean_N), cut(flat.square_N)))
        for decay, some in ((how.weight_decay, [r for r in rows if r[0].ndim>1]), (0., [r for r in rows if r[0].ndim<2])):
            torch._fused_adamw_(*map(list, zip(*some)), [], [torch.tensor(float(flat.n_updates)) for _ in some], lr=lr, beta1=how.betas[0],
                beta2=how.betas[1], weight_decay=decay, eps=how.eps, amsgrad=False, maximize=False)
        if flat.low: torch._foreach_copy_(cut(flat.work_N), cut(flat.master_N))
        O._forget(flat)
        return norm
    return step


def child(a):
    import torch
    torch.set_num_threads(a.threads)
    sys.path.insert(0, str(ROOT))
    import sft_nb.attention as A
    import sft_nb.decoder as D
    import sft_nb.kernels as K
    import sft_nb.run as R
    import sft_nb.steps as T
    from sft_nb.rows import Example
    from sft_nb.loading import load_model
    from sft_nb.choices import TrainConfig
    train = [Example(i, l, 'row') for i,l in read_rows(a.work)[0]]
    model = load_model(a.work/'smollm2').model
    cfg = TrainConfig(lr=2e-5, batch_size=BATCH, warmup=0, dtype=a.child)
    plans = {share: T.RunPlan(model, train, cfg=replace(cfg, share_prefix=share)) for share in (True, False)}
    plan, state = plans[True], R.begin_run(plans[True], getattr(torch, a.child))
    model.train()
    cuts, loss, onednn, hooks, attend = model.shortcuts, T.batch_loss, K._onednn, [], A.attend_rows
    slow_step, slow_attend = tensor_by_tensor(state.optimizer), repeated_keys(A.Attend)
    off = {'ends at targets': dict(ends_at_targets=False), 'derivatives by hand': dict(by_hand=False), 'rows of like length': dict(min_saving=math.inf),
           'one gradient of the table': dict(one_gradient=False), 'few shapes': dict(round_to=1), 'keeping activations': dict(recompute=True)}
    def set_up(name):
        nonlocal plan
        model.shortcuts, T.batch_loss, K._onednn = replace(cuts, **off.get(name, {})), loss, onednn and name!="oneDNN's products"
        plan = plans[name!='shared prefix']
        if name=='everything': T.batch_loss = lambda model, batch, *_: (D.naive_loss(model, batch), batch.n_targets)
        A.attend_rows = slow_attend if name=='grouped attention' else attend
        state.optimizer.__dict__.pop('step', None)
        if name=='flat AdamW': state.optimizer.step = slow_step
        while hooks: hooks.pop().remove()
        if name=='gradients in place': hooks.extend(p.register_hook(lambda g: g) for p in model.parameters()) # somebody else wants to see them
    names = [None, *(n for n in WITHOUT if a.child=='float32' or 'oneDNN' not in n)]
    secs = {n: [] for n in names}
    for b in range(a.batches+1):
        R.step_rows = lambda *_: list(range(b*BATCH, (b+1)*BATCH))
        for n in (names if b%2 else names[::-1]):
            set_up(n)
            begun = time.perf_counter()
            R.make_step(plan, state)
            if b: secs[n].append(time.perf_counter()-begun)
    ratios = {n: [x/y for x,y in zip(secs[n], secs[None])] for n in names[1:]}
    print('RESULT '+json.dumps(dict(dtype=a.child, step_secs=statistics.median(secs[None]),
        times={n: dict(median=statistics.median(r), low=sorted(r)[len(r)//4], high=sorted(r)[3*len(r)//4]) for n,r in ratios.items()})))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--batches', type=int, default=12)
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--preload', help='an allocator, for example libtcmalloc_minimal.so.4')
    p.add_argument('--work', type=Path, default=Path.home()/'.cache/sft_nb/bench')
    p.add_argument('--out', type=Path, default=Path(__file__).resolve().parent/'results/shortcuts.json')
    p.add_argument('--child', help=argparse.SUPPRESS)
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    if a.child: return child(a)
    prepare(a.work)
    env, results = dict(os.environ, OMP_NUM_THREADS=str(a.threads), PYTHONPATH=str(ROOT)), []
    if a.preload: env['LD_PRELOAD'] = a.preload
    for dtype in ('float32', 'bfloat16'):
        done = subprocess.run([sys.executable, __file__, '--child', dtype, '--batches', str(a.batches), '--threads', str(a.threads), '--work', str(a.work)],
            env=env, capture_output=True, text=True)
        line = next((l for l in done.stdout.splitlines() if l.startswith('RESULT ')), None)
        if line is None: sys.exit(f'{dtype} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}')
        results.append(json.loads(line[7:]))
        for n,r in results[-1]['times'].items(): print(f"{dtype:9} without {n:26} {r['median']:.2f} times as long ({r['low']:.2f} to {r['high']:.2f})", flush=True)
    report = dict(machine=platform.processor() or platform.machine(), threads=a.threads, preload=Path(a.preload).name if a.preload else None,
        date=time.strftime('%Y-%m-%d'), without=WITHOUT, results=results)
    a.out.write_text(json.dumps(report, indent=1)+'\n')


if __name__ == '__main__': main()
