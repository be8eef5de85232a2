"Generation against transformers and against the naive way, and what a notebook cell cannot hold."
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_nb import generation, seats
from sft_nb.readers import load_records
from sft_nb.split import split_records
from sft_nb.tokenizer import get_gpt2_tokenizer
from sft_nb.rows import encode_prompt
from sft_nb.model import ModelConfig, plain_answer
from sft_nb.decoder import Decoder
from sft_nb.loading import load_model
from sft_nb.choices import Sampling, Stops
from sft_nb.sampling import (
    TextPieces, answer_text, choose_ids, keep_min_p, keep_top_k, keep_top_p, penalise_seen)
from sft_nb.seats import Budget
from sft_nb.generation import Ready, generate, stream

transformers = pytest.importorskip('transformers')
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


class Plain:
    "A tokenizer whose text does not matter"
    eos_id = None
    def decode_content(self, ids): return ''.join(chr(0x4e00 + i) for i in ids)


# --- choosing ids: transformers' processors are the oracle -----------------------------------------------------------

def scores(seed, rows=7, V=211): return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))*4

@pytest.mark.parametrize('seed', range(5))
def test_filters_are_transformers(seed):
    P, x, none = transformers, scores(seed), torch.zeros(7, 1, dtype=torch.int64)
    assert torch.equal(keep_top_k(x, 9), P.TopKLogitsWarper(9)(none, x))
    for p in (0.1, 0.5, 0.9, 0.999): assert torch.equal(keep_top_p(x, p), P.TopPLogitsWarper(p)(none, x))
    for p in (0.01, 0.1, 0.9): assert torch.equal(keep_min_p(x, p), P.MinPLogitsWarper(p)(none, x))
    said = torch.randint(0, 211, (7, 30), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(7, 211, dtype=torch.bool).scatter_(1, said, True)
    for penalty in (0.7, 1.3): torch.testing.assert_close(penalise_seen(x, seen, penalty),
                                                          P.RepetitionPenaltyLogitsProcessor(penalty)(said, x.clone()))


@pytest.mark.parametrize('how', [dict(temperature=0.7), dict(temperature=1.3, top_k=12), dict(temperature=1., top_p=0.8),
                                 dict(temperature=2., min_p=0.05), dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
                                 dict(temperature=1.1, repetition_penalty=1.4, top_p=0.7)], ids=str)
def test_draws_follow_transformers_probabilities(how):
    "20,000 draws of one row fit the probabilities that transformers computes: chi-square"
    from scipy.stats import chisquare
    x, said = scores(3, 1, 40), torch.tensor([[1, 5, 9, 9, 30]])
    p = x.clone()
    if 'repetition_penalty' in how: p = transformers.RepetitionPenaltyLogitsProcessor(how['repetition_penalty'])(said, p)
    p = transformers.TemperatureLogitsWarper(how['temperature'])(said, p)
    for name, warper in (('top_k', transformers.TopKLogitsWarper), ('top_p', transformers.TopPLogitsWarper), ('min_p', transformers.MinPLogitsWarper)):
        if name in how: p = warper(how[name])(said, p)
    p = p.softmax(-1)[0].double()
    seen = torch.zeros(1, 40, dtype=torch.bool).scatter_(1, said, True)
    n = 20000
    ids = choose_ids(x.expand(n, 40), Sampling(**how), torch.rand(n, generator=torch.Generator().manual_seed(8)), seen.expand(n, 40))
    count = ids.bincount(minlength=40)
    assert not count[p==0].any()
    many = p*n >= 5
    got, want = count[many].tolist()+[int(count[~many].sum())], (p[many]*n).tolist()+[float(p[~many].sum()*n)]
    if want[-1]<5: got, want = got[:-1], want[:-1]
    assert chisquare(got, np.array(want)*sum(got)/sum(want)).pvalue > 1e-4


def test_ends_of_the_interval():
    x = torch.tensor([[-torch.inf, 0., 0., -torch.inf]])
    for u, want in ((0., 1), (0.4999, 1), (0.5, 2), (1-2**-24, 2)): assert choose_ids(x, Sampling(1.), torch.tensor([u])).tolist()==[want]


# --- batches: the naive way and transformers' generate are the oracles ------------------------------------------------

SIZES = dict(vocab_size=89, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=96, bos_token_id=None, eos_token_id=None, pad_token_id=0)
CONFIGS = dict(
    llama=lambda: transformers.LlamaConfig(**SIZES), mistral=lambda: transformers.MistralConfig(**SIZES, sliding_window=7),
    qwen2=lambda: transformers.Qwen2Config(**SIZES), qwen3=lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    phi3=lambda: transformers.Phi3Config(**SIZES), phi3_long=lambda: transformers.Phi3Config(**SIZES, original_max_position_embeddings=24,
        rope_parameters=dict(rope_type='longrope', rope_theta=1e4, partial_rotary_factor=1., short_factor=[1., 1.1, 1.2, 1.3], long_factor=[2., 5., 9., 12.])),
    gpt2=lambda: transformers.GPT2Config(vocab_size=89, n_embd=32, n_layer=3, n_head=4,
        n_positions=96, bos_token_id=None, eos_token_id=None, pad_token_id=0),
    gemma2=lambda: transformers.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=7),
    gemma3=lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=7))
STOPS = {3, 17, 40}


def ragged(seed, n, longest=40, same=0):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 89, same).tolist()
    return [first + rng.integers(0, 89, rng.integers(1, longest)).tolist() for _ in range(n)]


@pytest.mark.parametrize('name', CONFIGS)
def test_families_answer_as_transformers(name, tmp_path):
    "Ragged prompts with a common prefix, 3 rows at a time, against transformers one by one"
    torch.manual_seed(5)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation='eager').eval()
    for p in theirs.parameters():
        if p.dim()==2: torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path/'m')
    ours = load_model(tmp_path/'m').model.eval()
    prompts = ragged(1, 3) + ragged(2, 3, same=12)
    want = [theirs.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.int64), max_new_tokens=9,
                            do_sample=False, eos_token_id=list(STOPS), pad_token_id=0)[0, len(p):].tolist() for p in prompts]
    for some in (slice(0, 6), slice(3, 6)):
        for batch_size in (2, None):
            got = generate(ours, Plain(), prompts[some], until=Stops(9, STOPS), within=Budget(batch_size))
            assert [list(a.ids) for a in got]==want[some]


def toy(seed=0, **kw):
    torch.manual_seed(seed)
    cfg = dict(family='llama', vocab_size=89, n_layers=2, width=24, n_heads=4, n_kv_heads=2, head_dim=6, mlp_width=40, max_length=96) | kw
    model = Decoder(ModelConfig(**cfg)).eval()
    for p in model.parameters():
        if p.dim()==2: torch.nn.init.normal_(p, std=0.3)
    return model


def is_naive(model, prompts, max_new, batch_size=None):
    got = generate(model, Plain(), prompts, until=Stops(max_new, STOPS), within=Budget(batch_size))
    for a, p in zip(got, prompts):
        assert list(a.ids)==plain_answer(model, p, min(max_new, model.cfg.max_length - len(p)), STOPS)
        assert (a.finish=='stop')==(a.ids[-1] in STOPS) and a.n_prompt==len(p)


@pytest.mark.parametrize('seed', range(4))
def test_batched_is_naive(seed):
    rng, model = np.random.default_rng(seed), toy(seed, window=[None, 9][seed%2], tied=bool(seed%3))
    prompts = ragged(seed, 11, same=int(rng.integers(0, 30)))
    is_naive(model, prompts, 9, batch_size=int(rng.integers(1, 12)))
    is_naive(model, [p[:1] for p in prompts[:4]], 5)
    is_naive(model, [prompts[0]]*3, 5, batch_size=2)


def test_rows_that_fill_the_context():
    is_naive(toy(), [[5]*95, [6]*94, [7]*80, [8]], 20)


def test_a_long_prompt_is_read_in_pieces():
    model = toy(max_length=3000)
    long = np.random.default_rng(0).integers(0, 89, 1700).tolist()
    is_naive(model, [long, long[:900] + [1, 2], [5, 6], long[:513]], 2)
    is_naive(toy(max_length=3000, window=33), [long, long[:600] + [1, 2]], 2)


LONGROPE = dict(rope_type='longrope', original_max_position_embeddings=30, short_factor=[1., 1., 2.], long_factor=[2., 5., 9.])

def test_rows_on_both_sides_of_longrope(monkeypatch):
    "Short rows, long ones and those that grow from one to the other, read in pieces of 16 ids, with a prefix that is copied, kept apart, or longer than short rows"
    monkeypatch.setattr(generation, 'READ_TOKENS', 16)
    model = toy(rope_scaling=LONGROPE)
    for same in (0, 9):
        for size in (1, 4, None): is_naive(model, ragged(5, 8, 60, same), 20, batch_size=size)
    monkeypatch.setattr(seats, 'SHORT_PREFIX', 5)
    is_naive(model, ragged(6, 8, 40, 9), 20, batch_size=4)
    is_naive(model, ragged(6, 5, 20, 50), 20, batch_size=4)
    is_naive(toy(rope_scaling=dict(rope_type='dynamic', factor=4.)), ragged(6, 5, 20, 60), 20, batch_size=4)


def test_an_answer_that_crosses_the_limit_is_one_answer():
    "Draws, seen ids and pieces of text go on where they were"
    model, prompts = toy(rope_scaling=LONGROPE), ragged(5, 8, 50)
    how, until = Sampling(temperature=0.9, repetition_penalty=1.3), Stops(20, ids=())
    def ask(batch_size=None):
        return generate(model, Plain(), prompts, how, until, within=Budget(batch_size), generator=torch.Generator().manual_seed(3))
    whole = ask()
    assert any(a.n_prompt<=30<a.n_prompt+19 for a in whole)
    for size in (1, 3): assert ask(size)==whole
    for p in prompts:
        [want] = generate(model, Plain(), [p], until=until)
        assert ''.join(stream(model, Plain(), p, until=until))==want.text and want.n_new==20


def test_low_rank_of_memory_gives_the_same():
    model, prompts = toy(), ragged(4, 20)
    until = Stops(12, STOPS)
    whole = generate(model, Plain(), prompts, until=until)
    for gib in (2e-5, 5e-5, 1e-3): assert generate(model, Plain(), prompts, until=until, within=Budget(memory_gib=gib))==whole


@pytest.mark.parametrize('how', [dict(temperature=1.), dict(temperature=0.8, top_p=0.9, repetition_penalty=1.3),
                                 dict(repetition_penalty=1.5), dict(temperature=1.4, top_k=10, min_p=0.02)], ids=str)
def test_an_answer_does_not_depend_on_its_neighbours(how):
    model, prompts = toy(), ragged(6, 17)
    def ask(some, seed=1, batch_size=None):
        got = generate(model, Plain(), some, Sampling(**how), Stops(15, STOPS), within=Budget(batch_size),
                       generator=torch.Generator().manual_seed(seed))
        return [a.ids for a in got]
    whole = ask(prompts)
    for size in (1, 2, 5): assert ask(prompts, batch_size=size)==whole
    assert ask(prompts[:6])==whole[:6]
    if 'temperature' in how: assert ask(prompts, seed=2)!=whole


def test_repetition_penalty_is_transformers():
    torch.manual_seed(5)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS['llama'](), attn_implementation='eager').eval()
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        theirs.save_pretrained(d)
        ours = load_model(d).model.eval()
    prompts = ragged(9, 6)
    got = generate(ours, Plain(), prompts, Sampling(repetition_penalty=1.4), Stops(20, ids=()))
    for a, p in zip(got, prompts):
        want = theirs.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.int64), max_new_tokens=20,
                               do_sample=False, repetition_penalty=1.4, eos_token_id=None, pad_token_id=0)[0, len(p):].tolist()
        assert list(a.ids)==want


def test_stop_strings():
    model, prompts = toy(), ragged(7, 9)
    free = generate(model, Plain(), prompts, until=Stops(20, ids=()))
    stop = free[0].text[5:7]
    for a, b in zip(generate(model, Plain(), prompts, until=Stops(20, ids=(), strings=[stop])), free):
        if stop in b.text: assert (a.finish, a.text) == ('stop', b.text[:b.text.index(stop)]) and a.ids==b.ids[:len(a.text)+2]
        else: assert a==b


# --- text in pieces ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', range(8))
def test_pieces_are_the_text(seed):
    "Arbitrary ids, broken letters included: the pieces, joined, are the text; nothing shown is taken back"
    tok, rng = get_gpt2_tokenizer(), np.random.default_rng(seed)
    ids = rng.integers(0, 50257 if seed%2 else 256, 60).tolist()
    if seed>4: ids = tok.encode('né 🦜🏽 𓀀 ' * 4) + ids
    stops = [tok.decode_content(ids)[20:23]] if seed%3==0 else []
    pieces, shown = TextPieces(tok, stops), ''
    for n in range(1, len(ids)+1):
        shown += pieces.add(ids[:n], (), n==len(ids))
        if answer_text(tok, ids[:n], (), stops)[1]: break
    assert shown==answer_text(tok, ids[:n], (), stops)[0]


def test_a_streamed_answer_is_the_answer():
    model = toy()
    for p in ragged(8, 5):
        [want] = generate(model, Plain(), [p], until=Stops(12, STOPS))
        pieces, it = [], stream(model, Plain(), p, until=Stops(12, STOPS))
        try:
            while True: pieces.append(next(it))
        except StopIteration as end: got = end.value
        assert got==want and ''.join(pieces)==want.text


def test_a_model_is_left_as_it_was():
    "Also when a step fails, and while a streamed answer waits"
    model = toy().train()
    was = {n: p.clone() for n, p in model.state_dict().items()}
    it = stream(model, Plain(), [1, 2, 3], until=Stops(5, ids=()))
    next(it)
    assert model.training and not [m for m in model.modules() if 'forward' in m.__dict__]
    with pytest.raises(RuntimeError, match='stop here'):
        with Ready(model): raise RuntimeError('stop here')
    assert model.training and not [m for m in model.modules() if 'forward' in m.__dict__]
    assert all(torch.equal(was[n], p) for n, p in model.state_dict().items())


# --- the default model ------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def default():
    "The default model, ours and in transformers, and the prompts of the test part"
    loaded = load_model()
    records = split_records(load_records(ROOT/'data/sft/train/instruction-data.json')).test
    from sft_nb.saving import save_model
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        save_model(Path(d)/'m', loaded.model)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(d)/'m', dtype=torch.float32).eval()
    return loaded, theirs, [encode_prompt(r, loaded.template, loaded.tokenizer) for r in records]


def transformers_answers(model, prompts, max_new, stops):
    T = max(map(len, prompts))
    ids = torch.tensor([[2]*(T-len(p)) + p for p in prompts])
    mask = torch.tensor([[0]*(T-len(p)) + [1]*len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False, eos_token_id=sorted(stops), pad_token_id=2)
    rows = out[:,T:].tolist()
    ends = [next((i for i, t in enumerate(r) if t in stops), len(r)-1) for r in rows]
    return [r[:e+1] for r, e in zip(rows, ends)]


def margin(model, prompt, ids):
    "How much better the best id is than the second best, at the end of `prompt + ids`"
    with torch.no_grad(): best = model(torch.tensor([list(prompt)+list(ids)])).logits[0,-1].topk(2).values
    return float(best[0]-best[1])


def same_answers(loaded, theirs, prompts, max_new):
    "Equal id for id; where a row differs, transformers' own two best scores must be a tie to the fourth digit"
    got = generate(loaded.model, loaded.tokenizer, prompts, until=Stops(max_new, {0, 2}))
    ties = 0
    for a, p, want in zip(got, prompts, transformers_answers(theirs, prompts, max_new, {0, 2})):
        if list(a.ids)==want: continue
        at = next(i for i, (x, y) in enumerate(zip(a.ids, want)) if x!=y)
        assert margin(theirs, p, want[:at]) < 1e-3
        ties += 1
    return ties


def test_50_prompts_as_transformers(default):
    loaded, theirs, prompts = default
    assert same_answers(loaded, theirs, sorted(prompts, key=len)[:50], 8) <= 1


@pytest.mark.slow
def test_110_prompts_to_the_end_as_transformers(default):
    loaded, theirs, prompts = default
    assert same_answers(loaded, theirs, prompts, 128) <= 2


@pytest.mark.slow
def test_default_model_batched_is_one_by_one(default):
    loaded, _, prompts = default
    some = prompts[:16]
    got = generate(loaded.model, loaded.tokenizer, some, until=Stops(24))
    alone = [generate(loaded.model, loaded.tokenizer, [p], until=Stops(24))[0] for p in some]
    assert sum(a.ids!=b.ids for a, b in zip(got, alone))==0
    for a, p in list(zip(got, some))[:3]: assert list(a.ids)==plain_answer(loaded.model, p, 24, {0, 2})


def test_memory_stays_in_the_plan():
    "A process that answers 20 long prompts within a budget of 40 MiB grows by little more than that"
    code = """
import resource, torch
from sft_nb.model import ModelConfig
from sft_nb.decoder import Decoder
from sft_nb.choices import Stops
from sft_nb.seats import Budget, plan_rows
from sft_nb.generation import generate
torch.set_num_threads(1)
class Plain:
    eos_id = None
    def decode_content(self, ids): return ''
cfg = ModelConfig('llama', vocab_size=64, n_layers=4, width=32, n_heads=16, n_kv_heads=16, head_dim=32, mlp_width=32, max_length=2048)
model = Decoder(cfg)
how = dict(until=Stops(2), within=Budget(memory_gib=40/1024))
generate(model, Plain(), [[1]*600]*2, **how)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prompts = [[i%64]*(400 + i) for i in range(20)]
plan = plan_rows(model, prompts, 2, how['within'])
assert plan.n_rows<8, plan
generate(model, Plain(), prompts, **how)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode==0, done.stderr[-2000:]
    assert float(done.stdout)<80
