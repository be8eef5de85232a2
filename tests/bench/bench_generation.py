"""How fast are answers made, against transformers' `generate`, with the same ids coming out?

    pip install -e '.[dev]'
    python tests/bench/bench_generation.py                                # fp32 and bf16, all of transformers' batch sizes, one round
    python tests/bench/bench_generation.py --rounds 3 --rows ours_fp32 hf_fp32_110 ours_bf16 hf_bf16_16
    python tests/bench/bench_generation.py --model runs/default/model     # a tuned model, whose answers are shorter

The work: the prompts of the record set's test part, greedy, at most 128 new ids each, by the default model. Every row is a process of its own, and rows
alternate, so that a machine that others use too is fair to all. Timed is everything from lists of ids to lists of ids, after one short call to warm up;
for ours that includes laying out the weights. transformers gets its prompts sorted by length, which spares it padding. One by one it
answers every fifth prompt only, because all of them take a quarter of an hour. Before anything is believed, the ids of all float32 rows must agree.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench_training import peak_gib

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
STOPS = {0, 2}
SIZES = 1, 16, 32, 64, 110
ROWS = {f'hf_{d}_{n}': (d, n) for d in ('fp32', 'bf16') for n in SIZES} | {f'ours_{d}': (d, None) for d in ('fp32', 'bf16')}
MAIN = [r for d in ('fp32', 'bf16') for r in (f'ours_{d}', *(f'hf_{d}_{n}' for n in SIZES))]


def prepare(work, model):
    "The model as a folder, and the prompts as ids"
    sys.path.insert(0, str(ROOT))
    from sft_nb.readers import default_data_file, load_records
    from sft_nb.split import split_records
    from sft_nb.rows import encode_prompt
    from sft_nb.loading import load_model
    from sft_nb.saving import save_model
    loaded = load_model(model)
    folder = work/'smollm2' if model is None else Path(model)
    if not folder.exists(): save_model(folder, loaded.model, loaded.tokenizer, loaded.template)
    prompts = [encode_prompt(r, loaded.template, loaded.tokenizer) for r in split_records(load_records(default_data_file())).test]
    (work/'prompts.json').write_text(json.dumps(prompts))
    return folder


def run_ours(folder, dtype, _, max_new):
    from sft_nb.loading import load_model
    from sft_nb.choices import Stops
    from sft_nb.generation import generate
    loaded = load_model(folder, dtype=dtype)
    until = Stops(max_new, ids=STOPS)
    return lambda prompts: [list(a.ids) for a in generate(loaded.model, loaded.tokenizer, prompts, until=until)]


def run_hf(folder, dtype, size, max_new):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    def batch(prompts):
        T = max(map(len, prompts))
        ids = torch.tensor([[2]*(T-len(p))+p for p in prompts])
        mask = torch.tensor([[0]*(T-len(p))+[1]*len(p) for p in prompts])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False, eos_token_id=sorted(STOPS), pad_token_id=2)
        rows = out[:, T:].tolist()
        return [r[:next((i for i,t in enumerate(r) if t in STOPS), len(r)-1)+1] for r in rows]
    def answer(prompts):
        order, out = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [None]*len(prompts)
        for s in range(0, len(order), size):
            part = order[s:s+size]
            for i,ids in zip(part, batch([prompts[i] for i in part])): out[i] = ids
        return out
    return answer


def child(a):
    import torch
    torch.set_num_threads(a.threads)
    sys.path.insert(0, str(ROOT))
    dtype, size = ROWS[a.child]
    prompts = json.loads((a.work/'prompts.json').read_text())[:a.prompts]
    if size==1: prompts = prompts[::5]
    make = run_ours if size is None else run_hf
    answer = make(a.folder, dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype], size, a.max_new)
    with torch.no_grad():
        answer([p[:8] for p in prompts[:2]])
        wall, cpu = time.perf_counter(), time.process_time()
        ids = answer(prompts)
        wall, cpu = time.perf_counter()-wall, time.process_time()-cpu
    n = sum(map(len, ids))
    print('RESULT '+json.dumps(dict(row=a.child, n_prompts=len(prompts), n_tokens=n, secs=wall, cpu_secs=cpu, tokens_per_sec=n/wall,
        tokens_per_cpu_sec=n/cpu, peak_gib=peak_gib(), ids=ids)))


def same(a, b):
    "How many of the prompts both rows answered got the same ids, and how many there were"
    if a['n_prompts']<b['n_prompts']: a, b = b, a
    rows = a['ids'] if a['n_prompts']==b['n_prompts'] else a['ids'][::5]
    return sum(x==y for x,y in zip(rows, b['ids'])), len(b['ids'])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', nargs='+', default=MAIN, choices=list(ROWS))
    p.add_argument('--rounds', type=int, default=1)
    p.add_argument('--prompts', type=int, default=110)
    p.add_argument('--max-new', type=int, default=128)
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--model', help='a model folder; the default model if not given')
    p.add_argument('--work', type=Path, default=Path.home()/'.cache/sft_nb/bench')
    p.add_argument('--out', type=Path, default=HERE.parent/'results/generation.json')
    p.add_argument('--child')
    p.add_argument('--folder', type=Path)
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    if a.child: return child(a)
    folder, results = prepare(a.work, a.model), []
    env = dict(os.environ, OMP_NUM_THREADS=str(a.threads), HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', PYTHONPATH=str(ROOT))
    for r in range(a.rounds):
        for name in a.rows:
            done = subprocess.run([sys.executable, str(HERE), '--child', name, '--threads', str(a.threads), '--work', str(a.work), '--prompts', str(a.prompts),
                '--max-new', str(a.max_new), '--folder', str(folder)], env=env, capture_output=True, text=True)
            line = next((l for l in done.stdout.splitlines() if l.startswith('RESULT ')), None)
            if line is None: sys.exit(f'{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}')
            x = dict(json.loads(line[7:]), round=r, load=os.getloadavg()[0])
            results.append(x)
            print(f"round {r} {name:12} {x['tokens_per_sec']:6.1f} tokens/s, {x['tokens_per_cpu_sec']:6.1f} a processor second, {x['n_tokens']} tokens in "
                  f"{x['secs']:.0f} s, peak {x['peak_gib']:.2f} GiB, load {x['load']:.1f}", flush=True)
    report = dict(machine=platform.processor() or platform.machine(), threads=a.threads, date=time.strftime('%Y-%m-%d'), max_new=a.max_new, prompts=a.prompts,
        model=a.model or 'default', versions={m: __import__('importlib.metadata').metadata.version(m) for m in ('torch', 'transformers')},
        equality=gate(results), ratios=show(results), results=[{k: v for k,v in x.items() if k!='ids'} for x in results])
    a.out.write_text(json.dumps(report, indent=1)+'\n')


def gate(results):
    "No speed without equality: all float32 rows have the same ids"
    first = next((x for x in results if x['row'].endswith('fp32') or '_fp32_' in x['row']), None)
    if first is None: return {}
    counts = {x['row']: '%d of %d' % same(first, x) for x in results}
    for row,n in counts.items(): print(f'{row:12} {n} answers are those of {first["row"]}')
    for x in results:
        if 'fp32' in x['row']: assert len(set(same(first, x)))==1, f"{x['row']} differs from {first['row']}: {counts[x['row']]}"
    return counts


def show(results):
    "Ratios of rows of the same round, by the clock and by processor time"
    ratios = {}
    for d in ('fp32', 'bf16'):
        mine = {x['round']: x for x in results if x['row']==f'ours_{d}'}
        for peer in dict.fromkeys(x['row'] for x in results if x['row'].startswith(f'hf_{d}')):
            theirs = [x for x in results if x['row']==peer and x['round'] in mine]
            if not theirs: continue
            clock, cpu = ([mine[x['round']][k]/x[k] for x in theirs] for k in ('tokens_per_sec', 'tokens_per_cpu_sec'))
            ratios[peer] = dict(clock=statistics.median(clock), processor=statistics.median(cpu), rounds=len(theirs))
            print(f"ours_{d} / {peer}: {statistics.median(clock):.2f} by the clock ({min(clock):.2f} to {max(clock):.2f}), {statistics.median(cpu):.2f} by processor time")
    return ratios


if __name__ == '__main__': main()
