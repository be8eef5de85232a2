"""Weights in their blocks: memory, speed and difference beside the unpacked way, and llama.cpp.

    python tests/bench/bench_blocks.py --model FILE.gguf                         unpacked and in blocks, in float32
    python tests/bench/bench_blocks.py --model FILE.gguf --ways blocks/bfloat16  one way; --threads 2 for both cores
    python tests/bench/bench_blocks.py --kinds                                   a matrix of each kind, without a file
    python tests/bench/bench_blocks.py --model FILE.gguf --llama PYTHON          also llama-cpp-python, with that Python

Every way runs in a process of its own. Speeds are tokens a second of the processor, of all threads together, so that other work on the machine weighs
less: a prompt of 256 tokens, 16 tokens one by one, and an optimizer step on adapters of rank 8 (8 rows of 64 tokens). Each line is JSON."""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IDS = [100 + 7*i%3000 for i in range(256)]
LLAMA = """
import json, sys, time, resource
from llama_cpp import Llama
path, n_threads, ids = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
start = time.process_time()
model = Llama(path, n_ctx=512, n_threads=n_threads, n_threads_batch=n_threads, n_batch=512, verbose=False)
found = dict(way='llama.cpp', load=time.process_time() - start)
for name, work in dict(prompt=[ids], answer=[[300 + i] for i in range(16)]).items():
    start = time.process_time()
    for piece in work: model.eval(piece)
    found[name] = sum(map(len, work))/(time.process_time() - start)
found['peak_gib'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
print(json.dumps(found))
"""


def secs(work):
    "Processor seconds of a call, and what it returns"
    start = time.process_time()
    got = work()
    return time.process_time() - start, got


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20


def held_bytes(model):
    "Bytes of all weights as they are stored"
    from sft_nb.settings import plain_parts
    return sum(t.numel()*t.element_size() for p in model.parameters() for t in plain_parts(p))


def measure(path, way, logits):
    "One way to hold a model, in this process"
    import numpy as np
    import torch

    from sft_nb.batches import collate_examples
    from sft_nb.choices import LoraConfig, Stops
    from sft_nb.decoder import batch_loss
    from sft_nb.generation import generate
    from sft_nb.loading import load_model
    from sft_nb.lora import add_lora
    from sft_nb.optimizer import FlatAdamW
    from sft_nb.rows import Example
    weights, dtype = way.split('/')
    load, loaded = secs(lambda: load_model(path, dtype=getattr(torch, dtype), weights=weights))
    model = loaded.model.eval()
    found = dict(way=way, load=load, weights_gib=held_bytes(model)/2**30)
    with torch.no_grad(): said = model(torch.tensor([IDS[:64]])).float()
    torch.save(said, logits/way.replace('/', '_'))
    if (logits/'full_float32').exists():
        full = torch.load(logits/'full_float32')
        found['apart'] = ((said - full).norm()/full.norm()).item()
    def answer(ids, n): return generate(model, loaded.tokenizer, [ids], until=Stops(n, ids=[]))
    answer(IDS[:5], 3) # what is laid out once
    first, _ = secs(lambda: answer(IDS, 1))
    both, _ = secs(lambda: answer(IDS, 17))
    found |= dict(prompt=len(IDS)/first, answer=16/(both - first), peak_answer_gib=peak())
    for p in model.parameters():
        if hasattr(p, 'bags'): p.bags = None # as a process that only trains
    add_lora(model, LoraConfig(8))
    flat = FlatAdamW(model, getattr(torch, dtype))
    rows = [Example(np.array(IDS[i:i+65], np.int32), np.ones(65, np.float32), 'row') for i in range(8)]
    batch = collate_examples(rows)
    times = []
    for _ in range(2):
        start = time.process_time()
        (batch_loss(model, batch)[0]/batch.n_targets).backward()
        flat.step(1e-3, 1.)
        times.append(time.process_time() - start)
    found |= dict(lora_step=min(times), lora_tokens=len(batch.ids_N)/min(times), peak_gib=peak())
    print(json.dumps(found))


def measure_kinds():
    "A matrix of 8960 x 1536 in each kind: bytes a number, and nanoseconds a number for 1, 8 and 256 rows and back"
    import gguf
    import torch
    import torch.nn.functional as F

    from sft_nb.packed import PackedWeight
    from sft_nb.planes import KEPT_KINDS, as_planes
    chance = torch.Generator().manual_seed(1)
    def pace(work):
        work()
        return round(min(secs(work)[0] for _ in range(5))/(8960*1536)*1e9, 3)
    plain = torch.randn(8960, 1536, generator=chance)
    for kind in (None, *KEPT_KINDS):
        n_numbers, n_bytes = gguf.GGML_QUANT_SIZES[kind] if kind else (1, 4)
        weight = plain
        if kind:
            raw = torch.randint(0, 256, (8960, 1536//n_numbers, n_bytes), dtype=torch.uint8, generator=chance)
            raw[...,[1, 3, -1]] = 0x24
            weight = PackedWeight([as_planes(raw.flatten(1), kind)])
        found = dict(kind=kind.name if kind else 'float32', bytes=n_bytes/n_numbers)
        for n in (1, 8, 256):
            x = torch.randn(n, 1536, generator=chance)
            with torch.no_grad(): found[f'rows_{n}'] = pace(lambda x=x: F.linear(x, weight))
        g = torch.randn(256, 8960, generator=chance)
        found['back_256'] = pace(lambda: torch.mm(g, weight))
        if kind:
            exact = torch.from_numpy(gguf.dequantize(raw.flatten(1).numpy(), kind))
            with torch.no_grad(): found['apart'] = max(((F.linear(y, weight) - y@exact.T).norm()/(y@exact.T).norm()).item() for y in (x, x[:1]))
        print(json.dumps(found), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model')
    parser.add_argument('--ways', nargs='+', default=['full/float32', 'blocks/float32'])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--llama', help='a Python with llama-cpp-python')
    parser.add_argument('--kinds', action='store_true')
    parser.add_argument('--one', help=argparse.SUPPRESS)
    parser.add_argument('--logits', help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch
    torch.set_num_threads(args.threads)
    if args.kinds: measure_kinds()
    if args.one: measure(args.model, args.one, Path(args.logits))
    if args.one or not args.model: return
    with tempfile.TemporaryDirectory() as logits:
        own = [sys.executable, __file__, '--model', args.model, '--threads', str(args.threads), '--logits', logits]
        for way in args.ways: subprocess.run([*own, '--one', way])
        if args.llama: subprocess.run([args.llama, '-c', LLAMA, args.model, str(args.threads), json.dumps(IDS)], stderr=subprocess.DEVNULL)


if __name__ == '__main__': main()
