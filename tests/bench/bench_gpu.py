"""What passes and how fast it is on a CUDA GPU; `gpu.sh` says how to call it.

Checks first, each against the CPU or against the plain way: float32 and bfloat16, adapters, a run that is resumed, the command, FlexAttention, 4-bit weights,
NCCL and FSDP2 with one process. Then training against TRL and answers against transformers' `generate`, at 135M and at 1B with random weights. Every stage is
a process of its own with a share of the time, so that one that fails or hangs costs only itself. Tokens a second count real tokens, no padding; MFU sets the
operations that these tokens need (`count_flops`, the same for both programs) against what the GPU can do in bfloat16.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
CHECKS = {'choice': 40, 'precision': 40, 'training': 70, 'answers': 40, 'adapters': 40, 'command': 60, 'flex': 60, 'four_bits': 50, 'nccl': 50}
SPEEDS = {f'{what}_{size}_{who}': secs for size, secs in (('135m', 45), ('1b', 75)) for what, whos in (('train', ('ours', 'trl')), ('answer', ('ours', 'hf'))) for who in whos}
PEAK = {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12, 'A10': 125e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'T4': 65e12}  # bfloat16 (T4: float16), dense
SHAPES = {'135m': dict(vocab_size=49152, n_layers=30, width=576, n_heads=9, n_kv_heads=3, head_dim=64, mlp_width=1536, max_length=2048, tied=True),
          '1b': dict(vocab_size=128256, n_layers=16, width=2048, n_heads=32, n_kv_heads=8, head_dim=64, mlp_width=8192, max_length=2048, tied=True)}
TOY = dict(vocab_size=512, n_layers=2, width=64, n_heads=4, n_kv_heads=2, head_dim=16, mlp_width=128, max_length=512, tied=True)
WARM, BATCH, LR = 3, 16, 2e-5


class Skip(Exception):
    "A stage that has no meaning here, and why"


# ---- checks ----

def check_choice(device, folder):
    from sft_nb import machine
    if device.type == 'cuda': assert machine.choose_device().type == 'cuda'
    faults = {str(d).removeprefix('torch.'): machine.find_fault(str(device), d) for d in machine._BOUNDS}
    assert not any(faults.values()), faults
    return dict(free_gib=machine.free_memory(device)/2**30, auto_dtype=machine.choose_dtype('auto', device)[1])


def check_precision(device, folder):
    "Loss and gradients, float32 and bfloat16, of three families, against float32 on the CPU"
    import torch
    from test_training import DATA, GPT2, LLAMA, tiny
    from sft_nb.batches import collate_examples
    from sft_nb.decoder import batch_loss, gradients_of
    batch, found = collate_examples(DATA[0][:8]), {}
    for name, shape in dict(llama=LLAMA, gpt2=GPT2, untied=LLAMA | dict(tied=False)).items():
        def numbers(model):
            b = batch.to(next(model.parameters()).device)
            grads = gradients_of(model, lambda: batch_loss(model, b)[0])
            return torch.cat([batch_loss(model, b)[0].detach().float().cpu().view(1), *(grads[n].float().cpu().flatten() for n in sorted(grads))])
        right = numbers(tiny(shape=shape))
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
            off = float((numbers(tiny(shape=shape).to(device, dtype))-right).norm()/right.norm())
            found[f'{name} {dtype}'] = off
            assert off < bound, found
    return found


def by_device_test(part):
    def check(device, folder):
        import test_device
        getattr(test_device, f'check_{part}')(device, None, folder)
    return check


def check_flex(device, folder):
    "FlexAttention gives what products give: loss and gradients; on a CPU, where it has no derivative, the loss"
    import torch
    from test_training import DATA, tiny
    from sft_nb.attention import Shortcuts
    from sft_nb.batches import collate_examples
    from sft_nb.decoder import batch_loss, gradients_of
    batch, out = collate_examples(DATA[0][:8]).to(device), {}
    for kind in ('products', 'flex'):
        model = tiny().to(device)
        model.shortcuts = Shortcuts(attention=kind)
        with torch.no_grad(): out[kind] = batch_loss(model, batch)[0]
        if device.type == 'cuda': out[f'{kind} gradients'] = gradients_of(model, lambda: batch_loss(model, batch)[0])
    torch.testing.assert_close(out['flex'], out['products'], rtol=1e-3, atol=0)
    for n, g in out.get('products gradients', {}).items(): torch.testing.assert_close(out['flex gradients'][n], g, rtol=5e-3, atol=5e-3*g.abs().max().item())
    return dict(trains=device.type == 'cuda')


def check_four_bits(device, folder):
    "Adapters on a 4-bit base learn what they learn on the CPU, and the base takes less memory"
    try: import torchao  # noqa: F401
    except ImportError: raise Skip('torchao is not installed') from None
    import torch
    from test_training import CFG, DATA, tiny
    from sft_nb.adapters import quantize_base
    from sft_nb.choices import LoraConfig
    from sft_nb.lora import add_lora
    from sft_nb.run import train
    cfg, losses = replace(CFG, epochs=1, best=False), {}
    for d in ('cpu', device):
        model = add_lora(quantize_base(tiny().to(d)), LoraConfig(4), seed=1)
        losses[str(d)] = [s.loss for s in train(model, *DATA, cfg, say=lambda *_: None).steps]
    here, there = losses.values() if len(losses) > 1 else [*losses.values()]*2
    torch.testing.assert_close(there, here, rtol=2e-2, atol=0)


def check_nccl(device, folder):
    "One process, its weights divided by FSDP2 over NCCL (gloo on a CPU), learns what it learns without"
    import torch
    import torch.distributed as dist
    from test_training import DATA, tiny
    from sft_nb.batches import collate_examples
    from sft_nb.decoder import batch_loss
    from sft_nb.optimizer import FlatAdamW
    from sft_nb.sharding import ShardedAdamW
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', init_method=f'file://{folder}/meet', rank=0, world_size=1)
    one = torch.ones(3, device=device)
    dist.all_reduce(one)
    assert one.tolist() == [1, 1, 1]
    batch, losses = collate_examples(DATA[0][:8]).to(device), []
    for divided in (False, True):
        model = tiny().to(device)
        optimizer = ShardedAdamW(model) if divided else FlatAdamW(model)
        losses.append([])
        for _ in range(4):
            loss, n = batch_loss(model, batch)
            loss.backward()
            optimizer.step(1e-2, 1/float(n))
            losses[-1].append(loss.item()/float(n))
    dist.destroy_process_group()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    return dict(backend='nccl' if device.type == 'cuda' else 'gloo', losses=losses[0])


CHECK = {'choice': check_choice, 'precision': check_precision, 'flex': check_flex, 'four_bits': check_four_bits, 'nccl': check_nccl} | \
    {part: by_device_test(part) for part in ('training', 'answers', 'adapters', 'command')}


# ---- speed ----

def work(size, small):
    "The model's shape, and rows of random ids whose lengths are those of short conversations: 3 in 10 tokens are answers"
    import numpy as np
    from sft_nb.model import ModelConfig
    from sft_nb.rows import Example
    shape, n_steps = (TOY, 4) if small else (SHAPES[size], 15 if size == '135m' else 8)
    rng = np.random.default_rng(5)
    lengths = np.clip(rng.lognormal(4.3 if small else 5.5, .5, (WARM+n_steps)*BATCH).astype(int), 24, shape['max_length']-130)
    rows = [Example(rng.integers(3, shape['vocab_size'], n).astype(np.int32), (np.arange(n) >= n*.7).astype(np.float32), 'row') for n in lengths]
    return ModelConfig('llama', **shape), rows, n_steps


def model_folder(size, small, folder):
    "Random weights in the Hugging Face layout, written once and read by both programs"
    import torch
    from sft_nb.decoder import Decoder
    from sft_nb.saving import save_model
    out = folder/('toy' if small else size)
    if not (out/'config.json').exists():
        torch.manual_seed(1)
        model = Decoder(work(size, small)[0])
        for p in model.parameters():
            if p.ndim > 1: torch.nn.init.normal_(p, std=.02)
        save_model(out, model)
    return out


def flops_of(cfg, rows):
    from sft_nb.batches import collate_examples
    from sft_nb.kernels import count_flops
    return sum(count_flops(cfg, collate_examples(rows[i:i+BATCH], share_prefix=False))['training'] for i in range(0, len(rows), BATCH))


class Clock:
    "Time and memory of the steps after the warm-up"
    def __init__(self, device): self.device, self.ends = device, []
    def tick(self):
        import torch
        if self.device.type == 'cuda': torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def result(self, cfg, rows, losses):
        import torch
        secs = self.ends[-1]-self.ends[WARM]
        measured = rows[WARM*BATCH:]
        out = dict(secs=secs, n_steps=len(self.ends)-1-WARM, tokens_per_sec=sum(len(r.ids) for r in measured)/secs, flops=flops_of(cfg, measured), losses=losses[:3])
        if self.device.type != 'cuda': return out
        peak = next((f for name, f in PEAK.items() if name in torch.cuda.get_device_name()), None)
        return out | dict(peak_gib=torch.cuda.max_memory_allocated()/2**30, mfu=peak and out['flops']/secs/peak)


def train_ours(device, size, small, folder):
    import torch
    import sft_nb.run as R
    from sft_nb.choices import TrainConfig
    from sft_nb.loading import load_model
    from sft_nb.steps import RunPlan, block_options
    cfg, rows, n_steps = work(size, small)
    model = load_model(model_folder(size, small, folder)).model.to(device)
    how = TrainConfig(lr=LR, steps=WARM+n_steps, batch_size=BATCH, schedule='constant', warmup=0, dtype='bfloat16')
    R.step_rows = lambda step, n, cfg, *_: list(range(step*BATCH, (step+1)*BATCH))
    plan, clock = RunPlan(model, rows, cfg=how), Clock(device)
    state = R.begin_run(plan, torch.bfloat16)
    model.train()
    clock.tick()
    with block_options(model, how):
        for _ in range(WARM+n_steps):
            R.make_step(plan, state)
            clock.tick()
    return clock.result(cfg, rows, [s.loss for s in state.log.steps])


def train_trl(device, size, small, folder):
    try: from trl import SFTConfig, SFTTrainer
    except ImportError: raise Skip('trl is not installed') from None
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from sft_nb.tokenizer import gpt2_as_json
    cfg, rows, n_steps = work(size, small)
    model = AutoModelForCausalLM.from_pretrained(model_folder(size, small, folder), dtype=torch.float32)
    gpt2_as_json().save(folder/'tokenizer')
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder/'tokenizer/tokenizer.json'), eos_token='!', pad_token='!')  # id 0, which every model here has
    data = Dataset.from_dict(dict(input_ids=[r.ids.tolist() for r in rows], completion_mask=[r.learn.astype(int).tolist() for r in rows]))
    clock, losses = Clock(device), []

    class Tick(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not clock.ends: clock.tick()
        def on_step_end(self, *_, **__): clock.tick()
        def on_log(self, args, state, control, logs=None, **_):
            if 'loss' in (logs or {}): losses.append(logs['loss'])
    args = SFTConfig(output_dir=str(folder/'trl'), per_device_train_batch_size=BATCH, learning_rate=LR, lr_scheduler_type='constant', warmup_steps=0, weight_decay=0., max_grad_norm=1.,
                     max_steps=WARM+n_steps, logging_steps=1, save_strategy='no', report_to=[], train_sampling_strategy='sequential', use_cpu=device.type == 'cpu', completion_only_loss=True,
                     disable_tqdm=True, bf16=True, gradient_checkpointing=False, max_length=None)
    SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Tick()]).train()
    return clock.result(cfg, rows, losses)


def answers(device, size, small, folder, make):
    "64 prompts of 60 to 120 random ids, 64 new ids each, greedy, bfloat16; nothing stops an answer"
    import numpy as np
    import torch
    cfg, _, _ = work(size, small)
    rng = np.random.default_rng(7)
    n_prompts, n_new = (6, 8) if small else (64, 64)
    prompts = [rng.integers(3, cfg.vocab_size, rng.integers(60, 120)).tolist() for _ in range(n_prompts)]
    answer = make(model_folder(size, small, folder), device, n_new)
    with torch.no_grad():
        answer(prompts)                                           # compiles, fills caches
        if device.type == 'cuda': torch.cuda.reset_peak_memory_stats(), torch.cuda.synchronize()
        begun = time.perf_counter()
        ids = answer(prompts)
        secs = time.perf_counter()-begun
    assert [len(a) for a in ids] == [n_new]*n_prompts
    return dict(secs=secs, tokens_per_sec=n_prompts*n_new/secs, ids=ids) | (dict(peak_gib=torch.cuda.max_memory_allocated()/2**30) if device.type == 'cuda' else {})


def answer_ours(folder, device, n_new):
    import torch
    from types import SimpleNamespace
    from sft_nb.choices import Stops
    from sft_nb.generation import generate
    from sft_nb.loading import load_model
    model = load_model(folder, dtype=torch.bfloat16).model.to(device)
    plain = SimpleNamespace(eos_id=None, token_id=lambda _: None, decode_content=lambda ids: '')
    return lambda prompts: [list(a.ids) for a in generate(model, plain, prompts, until=Stops(n_new, ids=()))]


def answer_hf(folder, device, n_new):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()

    def answer(prompts):
        T = max(map(len, prompts))
        ids = torch.tensor([[0]*(T-len(p))+p for p in prompts], device=device)
        mask = torch.tensor([[0]*(T-len(p))+[1]*len(p) for p in prompts], device=device)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False, pad_token_id=0)
        return out[:, T:].tolist()
    return answer


# ---- stages ----

def child(stage, device, small, folder):
    "One stage; its result or the reason why not, on the last line"
    import torch
    device = torch.device(device)
    torch.manual_seed(0)
    try:
        if stage in CHECK:
            if stage == 'training' and device.type == 'cuda': torch.use_deterministic_algorithms(True, warn_only=True)
            inside = Path(tempfile.mkdtemp(dir=folder))
            found = CHECK[stage](device, inside)
        else:
            what, size, who = stage.split('_')
            if what == 'train': found = dict(ours=train_ours, trl=train_trl)[who](device, size, small, folder)
            else: found = answers(device, size, small, folder, dict(ours=answer_ours, hf=answer_hf)[who])
        print('RESULT ' + json.dumps(dict(status='passed') | (found or {})))
    except Skip as why: print('RESULT ' + json.dumps(dict(status='left out', why=str(why))))


def run_stage(stage, a, limit, folder):
    begun = time.perf_counter()
    words = [sys.executable, str(HERE), '--child', stage, '--device', a.device, '--work', str(folder), *(['--dry-run'] if a.dry_run else [])]
    try: done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired: return dict(status='failed', why=f'not done after {limit:.0f} s')
    line = next((x for x in reversed(done.stdout.splitlines()) if x.startswith('RESULT ')), None)
    if done.returncode == 0 and line: return json.loads(line[7:]) | dict(stage_secs=time.perf_counter()-begun)
    return dict(status='failed', why=(done.stderr or done.stdout).strip()[-1500:])


def compare(stages):
    "Ratios of the pairs that both ran, how near their losses are and how many answers are the same"
    found = {}
    for size in SHAPES:
        for what, peer in (('train', 'trl'), ('answer', 'hf')):
            ours, theirs = (stages.get(f'{what}_{size}_{who}', {}) for who in ('ours', peer))
            if 'tokens_per_sec' not in ours or 'tokens_per_sec' not in theirs: continue
            pair = dict(speed=ours['tokens_per_sec']/theirs['tokens_per_sec'])
            if what == 'train': pair['first_loss'] = [ours['losses'][0], theirs['losses'][0]]
            else: pair['same_answers'] = f"{sum(x == y for x, y in zip(ours['ids'], theirs['ids']))} of {len(ours['ids'])}"
            found[f'{what}_{size}'] = pair
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--dry-run', action='store_true', help='toy models on the CPU')
    p.add_argument('--minutes', type=float, default=8, help='most minutes for everything')
    p.add_argument('--stages', nargs='+', choices=[*CHECKS, *SPEEDS], default=[*CHECKS, *SPEEDS])
    p.add_argument('--out', type=Path, default=HERE.parent/'results/gpu.json')
    p.add_argument('--device', default=None)
    p.add_argument('--child')
    p.add_argument('--work', type=Path)
    a = p.parse_args()
    a.device = a.device or ('cpu' if a.dry_run else 'cuda')
    if a.child: return child(a.child, a.device, a.dry_run, a.work)
    import torch
    if a.device == 'cuda' and not torch.cuda.is_available(): sys.exit('gpu.sh: torch sees no CUDA GPU here; --dry-run does the same with toys on the CPU')
    from importlib.metadata import PackageNotFoundError, version

    def version_of(name):
        try: return version(name)
        except PackageNotFoundError: return None
    about = dict(date=time.strftime('%Y-%m-%d'), device=torch.cuda.get_device_name() if a.device == 'cuda' else platform.machine(), dry_run=a.dry_run, python=platform.python_version(),
                 versions={name: version_of(name) for name in ('torch', 'transformers', 'trl', 'torchao')})
    deadline, stages = time.monotonic()+a.minutes*60, {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in a.stages:
            left = deadline-time.monotonic()
            limit = min((CHECKS | SPEEDS)[stage]*(4 if a.dry_run else 1), left)
            stages[stage] = run_stage(stage, a, limit, Path(folder)) if left > 5 else dict(status='left out', why='no time left')
            shown = stages[stage]
            print(f"{stage:18} {shown['status']:9}" + (f" {shown['tokens_per_sec']:8.0f} tokens/s" if 'tokens_per_sec' in shown else '') +
                  (f" {shown['mfu']:.0%} of the GPU" if shown.get('mfu') else '') + (f" {shown['peak_gib']:.1f} GiB" if 'peak_gib' in shown else '') +
                  (' '+shown['why'].splitlines()[-1] if 'why' in shown else ''), flush=True)
            kept = {name: {k: v for k, v in found.items() if k != 'ids'} for name, found in stages.items()}
            a.out.parent.mkdir(parents=True, exist_ok=True)
            a.out.write_text(json.dumps(about | dict(stages=kept, compared=compare(stages)), indent=1)+'\n')
    for name, pair in compare(stages).items(): print(name, *(f'{k} {v:.2f}' if isinstance(v, float) else f'{k} {v}' for k, v in pair.items()))
    failed = [name for name, found in stages.items() if found['status'] == 'failed']
    for name, pair in compare(stages).items():                    # no speed without equal work
        first = pair.get('first_loss', [1, 1])
        if abs(first[0]/first[1]-1) > .01: failed.append(f'{name}: the first losses differ, {first}')
    if failed: sys.exit(f"failed: {', '.join(failed)}")


if __name__ == '__main__': main()
