"""Export and reading of GGUF files: memory and time beside a plain copy.

    python tests/bench/bench_export.py                     a random model of 0.5 billion weights
    python tests/bench/bench_export.py --model FILE        any model that load_model knows

Each line: the kind, seconds of the processor for writing, for a copy of that file and for reading it, and how far memory rose above what stood before, in
parts of the model. Seconds are of all threads together, so that other work on the machine weighs less."""
import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from sft_nb.decoder import Decoder
from sft_nb.export import gguf_settings, write_gguf
from sft_nb.gguf_file import read_gguf
from sft_nb.loading import load_model
from sft_nb.model import ModelConfig

SIZES = dict(n_layers=12, width=1536, n_heads=12, n_kv_heads=2, head_dim=128, mlp_width=8960, max_length=2048, tied=True)


def resident(entry):
    "GiB of this process"
    line = next(line for line in open('/proc/self/status') if line.startswith(entry))
    return int(line.split()[1])/2**20


def forget_peak():
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')


def measured(work):
    "Processor seconds, and GiB by which memory rose above what stood before"
    forget_peak()
    before, start = resident('VmRSS'), time.process_time()
    work()
    return time.process_time() - start, resident('VmHWM') - before


def copy(source, to):
    with open(source, 'rb') as a, open(to, 'wb') as b:
        while piece := a.read(2**24): b.write(piece)
        b.flush()
        os.fsync(b.fileno())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model')
    parser.add_argument('--kinds', nargs='+', default=['f16', 'q8_0', 'q4_0'])
    args = parser.parse_args()
    loaded = load_model(args.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    if not args.model:
        torch.manual_seed(0)
        model = Decoder(ModelConfig('llama', vocab_size=model.cfg.vocab_size, **SIZES))
    size = sum(p.numel()*p.element_size() for p in model.parameters())/2**30
    print(f'{size:.2f} GiB of weights, {torch.get_num_threads()} threads')
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)/'m.gguf'
            settings = gguf_settings(model.cfg, kind, tokenizer)
            write_secs, write_gib = measured(lambda: write_gguf(path, model, settings, kind))
            copy_secs, _ = measured(lambda: copy(path, Path(folder)/'copy'))
            held = read_gguf(path)
            places = {n: torch.empty_like(p) for n, p in zip(held.names, [held.read(n) for n in held.names])}
            clone_secs, _ = measured(lambda: [p.clone() for p in places.values()])
            read_secs, _ = measured(lambda: [held.fill(n, torch.empty_like(p)) for n, p in places.items()])
            print(f'{kind}: written in {write_secs:.1f} s, copied in {copy_secs:.1f} s ({write_secs/copy_secs:.1f}x), memory +{write_gib/size:.1%}; '
                  f'unpacked in {read_secs:.1f} s, {read_secs/clone_secs:.1f}x of a copy of the numbers', flush=True)


if __name__=='__main__': main()
