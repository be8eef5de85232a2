"""Change one thing: a small model is tuned again and again, with one setting different, and five seeds each.

    pip install -e '.[dev]'
    python tests/bench/bench_one_thing.py --out tests/bench/results/one_thing.json

The model has 350,000 weights. It is first pretrained on plain lines about numbers (how they follow each other, which is larger), which takes half a minute,
and then taught to answer questions about them, which takes seconds. A seed decides which records are learned from and in which order. Runs that the file
has already are not made again.
"""
import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
import tokenizers
import torch

from sft_nb.choices import LoraConfig, Stops, TrainConfig
from sft_nb.data import as_records
from sft_nb.dataset import InstructionDataset
from sft_nb.decoder import Decoder
from sft_nb.evaluation import exact
from sft_nb.generation import answer_records
from sft_nb.lora import add_lora
from sft_nb.model import ModelConfig, count_parameters
from sft_nb.rows import Example
from sft_nb.run import train
from sft_nb.shelf import get_template
from sft_nb.templates import render_record
from sft_nb.tokenizer import JsonTokenizer

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2, 3, 4)
N_LINES, N_TRAIN, N_VAL, N_TEST = 20_000, 935, 55, 300
STANDARD = dict(lr=1e-3, epochs=4., steps=0, loss_on='response', prompt_weight=0., rank=0, template='verbatim', n_records=N_TRAIN)
CHANGES = {
    'lr': [3e-4, 3e-3, 1e-2],
    'epochs': [1., 2.],
    'loss_on': ['all'],
    'prompt_weight': [.1, .3],
    'template': ['alpaca', 'scratchpad'],
    'n_records': [50, 200, 400],
    'rank': [2, 8, 32]}


def line_of(kind, a, b):
    "A plain line about two numbers, as the model reads it before it is asked anything"
    low, high = min(a, b), max(a, b)
    if kind == 0: return f"From {low} up to {high} : {' '.join(map(str, range(low+1, high+1)))}"
    if kind == 1: return f"From {high} down to {low} : {' '.join(map(str, range(high-1, low-1, -1)))}"
    return f'Of {a} and {b} the larger is {high}'


def question_of(kind, a, b):
    "A record about two numbers"
    low, high = min(a, b), max(a, b)
    if kind == 0: return f'Count on from {low} to {high} .', ' '.join(map(str, range(low+1, high+1)))
    if kind == 1: return f'Count back from {high} to {low} .', ' '.join(map(str, range(high-1, low-1, -1)))
    return f'Which is larger , {a} or {b} ?', f'It is {high}'


def pairs(rng, n):
    "(Kind, two different numbers), those of counting at most seven apart"
    for _ in range(n):
        kind, a = int(rng.integers(3)), int(rng.integers(10, 60))
        b = int(rng.integers(10, 60)) if kind == 2 else int(np.clip(a + rng.integers(-7, 8), 10, 59))
        yield kind, a, b if b != a else (a+1 if a < 59 else a-1)


def make_world():
    "(Plain lines, records to learn from, to validate and to test), no record twice"
    rng = np.random.default_rng(7)
    lines = [line_of(*p) for p in pairs(rng, N_LINES)]
    questions = list(dict.fromkeys(question_of(*p) for p in pairs(rng, 12_000)))
    records = as_records({'instruction': q, 'output': a} for q, a in questions)
    return lines, records[N_VAL+N_TEST:], records[:N_VAL], records[N_VAL:N_VAL+N_TEST]


def make_tokenizer(texts):
    "A token is a word, a number or a sign"
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token='<unk>'))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tok.train_from_iterator(texts, tokenizers.trainers.WordLevelTrainer(special_tokens=['<end>', '<unk>'], show_progress=False))
    return JsonTokenizer(tok, 'words', eos='<end>')


def pretrain(lines, tokenizer):
    "A model that knows how such lines go on"
    torch.manual_seed(3)
    cfg = ModelConfig('llama', vocab_size=tokenizer.n_vocab, max_length=160, n_layers=2, width=128, n_heads=8, n_kv_heads=8,
                      head_dim=16, mlp_width=256, tied=True)
    model = Decoder(cfg)
    ids = [np.array([*tokenizer.encode(line), tokenizer.eos_id]) for line in lines]
    rows = [Example(i, np.ones(len(i))) for i in ids]
    train(model, rows, (), TrainConfig(lr=3e-3, batch_size=32, epochs=1, dtype='float32', seed=3), say=lambda *_: None)
    return model


def tune(start, tokenizer, world, setting, seed):
    "One run: (share of exact answers in percent, validation loss, steps, seconds of the processor)"
    _, pool, val, test = world
    s = STANDARD | setting
    template = get_template(s['template'])
    order = np.random.default_rng(seed).permutation(len(pool))
    learned = [pool[i] for i in order[:s['n_records']]]
    rows = InstructionDataset(learned, tokenizer, template, s['loss_on'], s['prompt_weight'])
    model = Decoder(start.cfg)
    model.load_state_dict(start.state_dict())
    if s['rank']: add_lora(model, LoraConfig(rank=s['rank'], alpha=2*s['rank']), seed=seed)
    cfg = TrainConfig(lr=s['lr'], epochs=s['epochs'], steps=s['steps'], dtype='float32', seed=seed)
    began = time.process_time()
    log = train(model, rows, InstructionDataset(val, tokenizer, template), cfg, say=lambda *_: None)
    secs = time.process_time() - began
    answers = answer_records(model, tokenizer, template, test, until=Stops(max_new=40))
    score = 100*np.mean([exact(r.output, a.text) == 100 for r, a in zip(test, answers)])
    return dict(score=round(float(score), 2), val=round(log.vals[-1].loss, 4), steps=len(log.steps), secs=round(secs, 2),
                stopped=round(100*float(np.mean([a.finish == 'stop' for a in answers])), 1))


def plan():
    "Every setting to be tried, as the changes from the standard"
    steps = TrainConfig(epochs=STANDARD['epochs']).n_steps(N_TRAIN)
    yield {}
    for name, values in CHANGES.items():
        for value in values:
            yield {name: value} | ({'steps': steps} if name == 'n_records' else {})
            if name == 'rank': yield {name: value, 'lr': 10*STANDARD['lr']}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=ROOT/'tests/bench/results/one_thing.json')
    parser.add_argument('--seeds', type=int, nargs='+', default=SEEDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = make_world()
    texts = world[0] + [f'{r.instruction} {r.output}' for r in world[1]]
    tokenizer = make_tokenizer(texts + [str(s.text) for name in ('alpaca', 'scratchpad') for s in render_record(world[1][0], get_template(name)).segments]*50)
    start = pretrain(world[0], tokenizer)
    runs = json.loads(args.out.read_text())['runs'] if args.out.exists() else []
    done = {(json.dumps(r['change'], sort_keys=True), r['seed']) for r in runs}
    about = dict(date=str(date.today()), machine=platform.machine(), threads=1, torch=torch.__version__, n_test=N_TEST,
                 n_parameters=count_parameters(start.cfg)['total'], standard=STANDARD)
    for seed in args.seeds:
        for change in plan():
            if (json.dumps(change, sort_keys=True), seed) in done: continue
            runs.append(dict(change=change, seed=seed) | tune(start, tokenizer, world, change, seed))
            print(runs[-1], flush=True)
            args.out.write_text(json.dumps(about | {'runs': runs}, indent=1))


if __name__ == '__main__': main()
