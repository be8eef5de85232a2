"""How fast does the loop train, against TRL, a plain transformers loop and the book's style of loop, on the same work?

    pip install -e '.[dev]' -r tests/bench/requirements.txt
    python tests/bench/bench_training.py --rounds 3                      # 20 measured steps a row, alternating
    python tests/bench/bench_training.py --epoch --rounds 1              # the whole epoch: the sturdiest figures
    python tests/bench/bench_training.py --rows ours_bf16 trl_bf16 --preload /path/to/libtcmalloc_minimal.so.4

Same ids, same order, same eight rows a step, AdamW without decay, clipping at 1, learning rate 2e-5 falling in a line to zero. Every row is a
process of its own; rows alternate (A B C A B C ...), so that a machine that others use too is fair to all. Each step is timed from the end of one
to the end of the next, collation and optimizer included. Before anything is believed: validation losses of the untrained model must agree, and so must
the first three training losses of every float32 row (within 1e-4).
"""
import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
WARM, STEPS, BATCH, LR, SEED = 2, 20, 8, 2e-5, 123

ROWS = dict(
    ours_bf16=dict(run='ours', dtype='bfloat16'), ours_fp32=dict(run='ours', dtype='float32'),
    ours_bf16_compiled=dict(run='ours', dtype='bfloat16', compile=True), ours_fp32_compiled=dict(run='ours', dtype='float32', compile=True),
    trl_default=dict(run='trl'), trl_bf16=dict(run='trl', bf16=True, gradient_checkpointing=False, padding_free=True, max_length=None),
    trl_bf16_padded=dict(run='trl', bf16=True, gradient_checkpointing=False),
    trl_fp32=dict(run='trl', bf16=False, gradient_checkpointing=False, padding_free=True, max_length=None),
    plain_fp32=dict(run='plain'), plain_bf16=dict(run='plain', bf16=True),
    ours_lora_bf16=dict(run='ours', dtype='bfloat16', lora=True), ours_lora_fp32=dict(run='ours', dtype='float32', lora=True),
    trl_lora_default=dict(run='trl', lora=True),
    trl_lora_bf16=dict(run='trl', lora=True, bf16=True, gradient_checkpointing=False, padding_free=True, max_length=None),
    trl_lora_fp32=dict(run='trl', lora=True, bf16=False, gradient_checkpointing=False, padding_free=True, max_length=None),
    ours_gpt2_bf16=dict(run='ours', dtype='bfloat16', gpt2=True), ours_gpt2_fp32=dict(run='ours', dtype='float32', gpt2=True),
    book_gpt2_fp32=dict(run='book', gpt2=True),
    trl_gpt2_default=dict(run='trl', gpt2=True))
MAIN = ['ours_bf16', 'trl_bf16', 'plain_bf16', 'ours_fp32', 'trl_fp32', 'plain_fp32', 'trl_default']


# what every row works on

def prepare(folder):
    "Two model folders in the Hugging Face layout and the rows of the main job, written once"
    if (folder/'rows.npz').exists(): return
    for name in ('smollm2', 'gpt2'): shutil.rmtree(folder/name, ignore_errors=True)  # of a start that was stopped
    import torch
    sys.path.insert(0, str(ROOT))
    from sft_nb.readers import default_data_file, load_records
    from sft_nb.split import split_records
    from sft_nb.dataset import InstructionDataset
    from sft_nb.model import ModelConfig
    from sft_nb.decoder import Decoder
    from sft_nb.loading import load_model
    from sft_nb.saving import save_model
    loaded = load_model()
    save_model(folder/'smollm2', loaded.model, loaded.tokenizer, loaded.template)
    torch.manual_seed(1)
    gpt2 = Decoder(ModelConfig(family='gpt2', vocab_size=50257, n_layers=12, width=768, n_heads=12, n_kv_heads=12, head_dim=64, mlp_width=3072,
        max_length=1024, norm='layer', positions='learned', act='gelu_tanh', gated_mlp=False, tied=True, qkv_bias=True, o_bias=True, mlp_bias=True))
    save_model(folder/'gpt2', gpt2)
    split = split_records(load_records(default_data_file()))
    out = {}
    for name,part in (('train', split.train), ('val', split.val)):
        data = InstructionDataset(part, loaded.tokenizer, loaded.template)
        rows = [data[i] for i in range(len(data))]
        out |= {f'{name}_ids': np.concatenate([r.ids for r in rows]), f'{name}_learn': np.concatenate([r.learn for r in rows]),
                f'{name}_lengths': np.array([len(r.ids) for r in rows])}
    np.savez(folder/'rows.npz', **out)


def read_rows(folder, everything=False):
    "Lists of (ids, learn) for training, in the order of epoch 0, and for validation"
    f, parts = np.load(folder/'rows.npz'), []
    for name in ('train', 'val'):
        cuts = np.cumsum(f[f'{name}_lengths'])[:-1]
        ids, learn = np.split(f[f'{name}_ids'], cuts), np.split(f[f'{name}_learn'], cuts)
        parts.append([(i, np.concatenate([[0], np.ones(len(i)-1)]).astype(np.float32) if everything else l) for i,l in zip(ids, learn)])
    from sft_nb.loaders import batch_order
    order = sum(batch_order(len(parts[0]), BATCH, SEED, 0), [])
    return [parts[0][i] for i in order], parts[1][:int(os.environ.get('SFT_NB_BENCH_VAL', 55))]


def peak_gib():
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(l for l in lines if l.startswith('VmHWM')).split()[1])/2**20


class Clock:
    "Wall and processor seconds at the end of every step"
    def __init__(self): self.wall, self.cpu = [], []
    def tick(self):
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


# the rows

def run_ours(folder, row, n_steps, threads):
    import torch
    from sft_nb.rows import Example
    from sft_nb.loading import load_model
    from sft_nb.choices import TrainConfig
    from sft_nb.steps import RunPlan, block_options, validate
    train, val = ([Example(i, l, 'row') for i,l in part] for part in read_rows(folder, row.get('gpt2')))
    model = load_model(folder/('gpt2' if row.get('gpt2') else 'smollm2')).model
    if row.get('lora'):
        from sft_nb.choices import LoraConfig
        from sft_nb.lora import add_lora
        add_lora(model, LoraConfig(rank=8, alpha=16))
    cfg = TrainConfig(lr=LR, epochs=n_steps/math.ceil(len(train)/BATCH), batch_size=BATCH, schedule='linear', warmup=0, seed=SEED, dtype=row['dtype'],
        compile=row.get('compile', False))
    base = validate(model, val)
    import sft_nb.run as R
    R.step_rows = lambda step, n, cfg, *_: list(range(step*BATCH, min(n, (step+1)*BATCH)))  # the rows are in order already
    plan, clock = RunPlan(model, train, cfg=cfg), Clock()
    state = R.begin_run(plan, getattr(torch, row['dtype']))
    model.train()
    clock.tick()
    with block_options(model, cfg):
        for _ in range(n_steps):
            R.make_step(plan, state)
            clock.tick()
    peak = peak_gib()
    state.optimizer.finish()
    return clock, [s.loss for s in state.log.steps], base, validate(model, val), peak


def hf_validate(model, val, gpt2=False):
    import torch
    total = count = 0.
    model.eval()
    with torch.no_grad():
        for ids,learn in val:
            logits = model(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:].astype(np.int64)), reduction='none')
            total, count = total+(nll*torch.tensor(learn[1:])).sum().item(), count+learn[1:].sum()
    return float(total/count)


def hf_model(folder, row):
    import torch
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder/('gpt2' if row.get('gpt2') else 'smollm2'), dtype=torch.float32)


def run_trl(folder, row, n_steps, threads):
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    train, val = read_rows(folder, row.get('gpt2'))
    model, clock, losses = hf_model(folder, row), Clock(), []
    base = hf_validate(model, val)
    tok = PreTrainedTokenizerFast(tokenizer_file=str(folder/'smollm2/tokenizer.json'), eos_token='<|im_end|>', pad_token='<|im_end|>')
    rows = train[:n_steps*BATCH]
    data = Dataset.from_dict(dict(input_ids=[i.tolist() for i,_ in rows], completion_mask=[(l>0).astype(int).tolist() for _,l in rows]))
    class Tick(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not clock.wall: clock.tick()
        def on_step_end(self, *_, **__): clock.tick()
        def on_log(self, args, state, control, logs=None, **_):
            if 'loss' in (logs or {}): losses.append(logs['loss'])
    settings = {k: v for k,v in row.items() if k not in ('run', 'lora', 'gpt2')}
    args = SFTConfig(output_dir=str(folder/'trl'), per_device_train_batch_size=BATCH, learning_rate=LR, lr_scheduler_type='linear', warmup_steps=0,
        weight_decay=0., max_grad_norm=1., num_train_epochs=1, logging_steps=1, save_strategy='no', report_to=[], train_sampling_strategy='sequential',
        use_cpu=True, completion_only_loss=True, disable_tqdm=True, dataloader_num_workers=0, **settings)
    peft = None
    if row.get('lora'):
        from peft import LoraConfig
        peft = LoraConfig(r=8, lora_alpha=16, target_modules='all-linear', task_type='CAUSAL_LM')
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tok, callbacks=[Tick()], peft_config=peft)
    trainer.train()
    peak = peak_gib()
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # else it goes on in bfloat16: the wrapper casts
    return clock, losses, base, hf_validate(trained.float(), val), peak


def pad(rows, ids_fill=0):
    import torch
    width = max(len(i) for i,_ in rows)
    ids = torch.full((len(rows), width), ids_fill)
    labels = torch.full((len(rows), width), -100)
    for r,(i,l) in enumerate(rows):
        ids[r,:len(i)] = torch.tensor(i.astype(np.int64))
        labels[r,:len(i)] = torch.where(torch.tensor(l)>0, ids[r,:len(i)], -100)
    return ids, labels, torch.arange(width) < torch.tensor([[len(i)] for i,_ in rows])


def run_plain(folder, row, n_steps, threads):
    "What one writes first: transformers' model, padded rows, all logits, torch's fused AdamW; bfloat16 through autocast"
    import torch
    train, val = read_rows(folder)
    model, clock, losses = hf_model(folder, row), Clock(), []
    base = hf_validate(model, val)
    adam = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0., fused=True)
    model.train()
    clock.tick()
    for step in range(n_steps):
        for g in adam.param_groups: g['lr'] = LR*(n_steps-step)/n_steps
        ids, labels, mask = pad(train[step*BATCH:(step+1)*BATCH])
        with torch.autocast('cpu', torch.bfloat16, enabled=row.get('bf16', False)): logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:,:-1].flatten(0, 1).float(), labels[:,1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
        clock.tick()
    return clock, losses, base, hf_validate(model, val), peak_gib()


def run_book(folder, row, n_steps, threads):
    "A teaching loop for GPT-2 as many books have it: own attention with a mask buffer, everything padded and learned, AdamW, no clipping"
    import torch
    from torch import nn
    from safetensors.torch import load_file
    class Attention(nn.Module):
        def __init__(self, d=768, heads=12, length=1024):
            super().__init__()
            self.heads, self.q, self.k, self.v, self.out = heads, nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
            self.register_buffer('mask', torch.triu(torch.ones(length, length), diagonal=1), persistent=False)
        def forward(self, x):
            b,t,d = x.shape
            q,k,v = (f(x).view(b, t, self.heads, d//self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
            scores = (q @ k.transpose(2, 3)).masked_fill(self.mask.bool()[:t,:t], -torch.inf)
            weights = torch.softmax(scores/k.shape[-1]**.5, dim=-1)
            return self.out((weights @ v).transpose(1, 2).contiguous().view(b, t, d))
    class Layer(nn.Module):
        def __init__(self, d=768):
            super().__init__()
            self.norm1, self.attn, self.norm2, self.up, self.down = nn.LayerNorm(d), Attention(), nn.LayerNorm(d), nn.Linear(d, 4*d), nn.Linear(4*d, d)
        def forward(self, x):
            x = x+self.attn(self.norm1(x))
            return x+self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate='tanh'))
    class Book(nn.Module):
        def __init__(self, vocab=50257, d=768):
            super().__init__()
            self.tok, self.pos = nn.Embedding(vocab, d), nn.Embedding(1024, d)
            self.layers, self.norm, self.head = nn.Sequential(*(Layer() for _ in range(12))), nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        def forward(self, ids): return self.head(self.norm(self.layers(self.tok(ids)+self.pos(torch.arange(ids.shape[1])))))
    w = {k.removeprefix('transformer.'): v for k,v in load_file(folder/'gpt2/model.safetensors').items()}
    model = Book()
    with torch.no_grad():
        model.tok.weight.copy_(w['wte.weight']); model.head.weight.copy_(w['wte.weight']); model.pos.weight.copy_(w['wpe.weight'])
        model.norm.weight.copy_(w['ln_f.weight']); model.norm.bias.copy_(w['ln_f.bias'])
        for i,l in enumerate(model.layers):
            g = lambda n: w[f'h.{i}.{n}']
            for lin,(a,b) in zip((l.attn.q, l.attn.k, l.attn.v), zip(g('attn.c_attn.weight').T.split(768), g('attn.c_attn.bias').split(768))):
                lin.weight.copy_(a); lin.bias.copy_(b)
            for lin,n in ((l.attn.out, 'attn.c_proj'), (l.up, 'mlp.c_fc'), (l.down, 'mlp.c_proj')):
                lin.weight.copy_(g(n+'.weight').T); lin.bias.copy_(g(n+'.bias'))
            for norm,n in ((l.norm1, 'ln_1'), (l.norm2, 'ln_2')): norm.weight.copy_(g(n+'.weight')); norm.bias.copy_(g(n+'.bias'))
    train, val = read_rows(folder, True)
    def batch_loss(rows):
        ids, labels, _ = pad(rows, 50256)
        return torch.nn.functional.cross_entropy(model(ids[:,:-1]).flatten(0, 1), labels[:,1:].flatten())
    def validate():
        model.eval()
        with torch.no_grad(): return sum(batch_loss([r]).item()*(len(r[0])-1) for r in val)/sum(len(r[0])-1 for r in val)
    base, clock, losses = validate(), Clock(), []
    adam = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.)
    model.train()
    clock.tick()
    for step in range(n_steps):
        adam.zero_grad()
        loss = batch_loss(train[step*BATCH:(step+1)*BATCH])
        loss.backward()
        adam.step()
        losses.append(loss.item())
        clock.tick()
    return clock, losses, base, validate(), peak_gib()


def child(folder, name, n_steps, threads):
    import torch
    torch.set_num_threads(threads)
    sys.path.insert(0, str(ROOT))
    row = ROWS[name]
    clock, losses, base, val, peak = globals()[f"run_{row['run']}"](folder, row, n_steps, threads)
    train, _ = read_rows(folder)
    tokens = [sum(len(i)-1 for i,_ in train[s*BATCH:(s+1)*BATCH]) for s in range(n_steps)]
    a = WARM if n_steps>2*WARM else 0
    print('RESULT '+json.dumps(dict(row=name, n_steps=n_steps, tokens_per_sec=sum(tokens[a:])/(clock.wall[-1]-clock.wall[a]),
        tokens_per_cpu_sec=sum(tokens[a:])/(clock.cpu[-1]-clock.cpu[a]), secs=clock.wall[-1]-clock.wall[0],
        step_secs=[round(y-x, 4) for x,y in zip(clock.wall, clock.wall[1:])], losses=losses, base_val=base, val=val, peak_gib=peak)))


def gemm_gflops(dtype, threads):
    "The machine's own speed in matrix products of the model's shapes, taken in every round"
    code = f"""import torch, time; torch.set_num_threads({threads}); a=torch.randn(412, 576).to(torch.{dtype}); b=torch.randn(576, 3072).to(torch.{dtype}); best=9
for _ in range(40):
    t=time.perf_counter(); a@b; best=min(best, time.perf_counter()-t)
print(2*412*576*3072/best/1e9)"""
    return float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', nargs='+', default=MAIN, choices=list(ROWS))
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--steps', type=int, default=WARM+STEPS, help='optimizer steps a row, the first two not measured')
    p.add_argument('--epoch', action='store_true', help='a whole epoch instead')
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--preload', help='an allocator for every row alike, for example libtcmalloc_minimal.so.4')
    p.add_argument('--work', type=Path, default=Path.home()/'.cache/sft_nb/bench')
    p.add_argument('--out', type=Path, default=HERE.parent/'results/training.json')
    p.add_argument('--child')
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    n_steps = 117 if a.epoch else a.steps
    if a.child: return child(a.work, a.child, n_steps, a.threads)
    prepare(a.work)
    env = dict(os.environ, OMP_NUM_THREADS=str(a.threads), HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', PYTHONPATH=str(ROOT),
        SFT_NB_BENCH_VAL='55' if a.epoch else '8')
    if a.preload: env['LD_PRELOAD'] = a.preload
    results, peaks = [], []
    for r in range(a.rounds):
        peaks.append({d: gemm_gflops(d, a.threads) for d in ('float32', 'bfloat16')})
        for name in a.rows:
            done = subprocess.run([sys.executable, str(HERE), '--child', name, '--steps', str(n_steps), '--threads', str(a.threads), '--work', str(a.work)],
                env=env, capture_output=True, text=True)
            line = next((l for l in done.stdout.splitlines() if l.startswith('RESULT ')), None)
            if line is None: sys.exit(f'{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}')
            results.append(dict(json.loads(line[7:]), round=r))
            x = results[-1]
            print(f"round {r} {name:18} {x['tokens_per_sec']:7.0f} tokens/s, {x['tokens_per_cpu_sec']:6.0f} a processor second, val {x['base_val']:.6f} -> "
                  f"{x['val']:.6f}, peak {x['peak_gib']:.2f} GiB, first losses {[round(l, 5) for l in x['losses'][:3]]}", flush=True)
    unequal = gate(results)
    versions = {m: __import__('importlib.metadata').metadata.version(m) for m in ('torch', 'transformers', 'trl', 'peft', 'accelerate')}
    report = dict(machine=platform.processor() or platform.machine(), threads=a.threads, preload=Path(a.preload).name if a.preload else None,
        date=time.strftime('%Y-%m-%d'), load=os.getloadavg(), versions=versions, gemm_gflops=peaks, n_steps=n_steps, unequal=unequal, results=results)
    a.out.write_text(json.dumps(report, indent=1)+'\n')
    show(results)
    if unequal: sys.exit('\n'.join(unequal))


def gate(results):
    "No speed without equality: untrained losses agree; in float32 the first steps and the last validation do; in bfloat16 the last within 0.5 %"
    found = []
    def check(rows, value, within, what):
        of = {x['row']: value(x) for x in rows}
        if of and max(of.values())-min(of.values())>within: found.append(f'NOT EQUAL: {what}: {of}')
    for kind in (dict(), dict(lora=True), dict(gpt2=True)):
        same = [x for x in results if {k: v for k,v in ROWS[x['row']].items() if k in ('lora', 'gpt2')}==kind]
        check(same, lambda x: x['base_val'], 1e-4, 'untrained validation loss')
        exact = [x for x in same if 'fp32' in x['row']]
        if kind.get('lora'):  # adapters begin at random, so that only the end can be compared
            check(same, lambda x: math.log(x['val']), 5e-3, 'logarithm of the validation loss at the end')
            continue
        for step in range(1 if kind else 3): check(exact, lambda x: x['losses'][step], 1e-4, f'loss of step {step+1}')
        if kind: continue  # the book's head is a matrix of its own, and nothing is clipped: equal at first only
        check(exact, lambda x: x['val'], 1e-4, 'validation loss at the end')
        check([x for x in same if 'fp32' not in x['row']], lambda x: math.log(x['val']), 5e-3, 'logarithm of the validation loss at the end')
    return found


def show(results):
    "Medians, and the ratio of each pair that ran in the same round"
    names = list(dict.fromkeys(x['row'] for x in results))
    speed = {n: [x['tokens_per_sec'] for x in results if x['row']==n] for n in names}
    for n in names: print(f'{n:18} median {statistics.median(speed[n]):6.0f} tokens/s, {min(speed[n]):.0f} to {max(speed[n]):.0f}')
    for ours in (n for n in names if n.startswith('ours')):
        for peer in (n for n in names if not n.startswith('ours') and ROWS[n].get('gpt2')==ROWS[ours].get('gpt2') and ROWS[n].get('lora')==ROWS[ours].get('lora')):
            ratios = [x/y for x,y in zip(speed[ours], speed[peer])]
            print(f'{ours} / {peer}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})')


if __name__ == '__main__': main()
