"03_collate: laws for arbitrary rows, PyTorch's and transformers' behaviour as judges, speed of the packer."
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.utils.data import DataLoader

from sft_nb.basics import InputError
from sft_nb.readers import default_data_file, load_records
from sft_nb.split import split_records
from sft_nb.tokenizer import get_gpt2_tokenizer
from sft_nb.rows import Example
from sft_nb.dataset import InstructionDataset
from sft_nb.collate import custom_collate_fn
from sft_nb.batches import _MIN_PREFIX, collate_examples, collate_prompts
from sft_nb.loaders import EpochSampler, batch_order, epoch_order, make_loaders
from sft_nb.packing import (
    collate_packs, pack_rows, packed_batches, padding_share, row_mask, to_varlen, windowed_batches)

quick = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
SPLIT = split_records(load_records(default_data_file()))


def scratchpad_collate(batch, pad_token_id=50256, ignore_token_index=-100, allowed_max_length=None):
    "The user's own function, as it stands in the scratchpad"
    batch_max_length = max(len(item) + 1 for item in batch)
    inputs_batch_list, targets_batch_list = [], []
    for item in batch:
        new_item = item.copy() + [pad_token_id]
        padded = new_item + [pad_token_id] * (batch_max_length - len(new_item))
        inputs = torch.tensor(padded[:-1])
        targets = torch.tensor(padded[1:])
        mask = targets == pad_token_id
        indices = torch.nonzero(mask).squeeze()
        if indices.numel() > 1:
            targets[indices[1:]] = ignore_token_index
        if allowed_max_length is not None:
            inputs = inputs[:allowed_max_length]
            targets = targets[:allowed_max_length]
        inputs_batch_list.append(inputs)
        targets_batch_list.append(targets)
    return torch.stack(inputs_batch_list), torch.stack(targets_batch_list)


@quick
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(0, 12),
       st.integers(-100, -1), st.none() | st.integers(1, 12))
def test_custom_collate_equals_the_scratchpads(batch, pad, ignore, limit):
    "Also where rows hold the padding id themselves"
    for ours, theirs in zip(custom_collate_fn(batch, pad, ignore, limit, 'cpu'), scratchpad_collate(batch, pad, ignore, limit)):
        assert torch.equal(ours, theirs) and ours.dtype==theirs.dtype


def examples(prefix, rows):
    "Rows that begin with `prefix`; each row is a list of (id, weight)"
    return [Example(np.array([i for i,_ in prefix+row], np.int32), np.array([w for _,w in prefix+row], np.float32)) for row in rows]

pairs = st.tuples(st.integers(0, 30), st.sampled_from([0., 0., .25, 1.]))
batches = st.builds(examples, st.lists(pairs, max_size=14),
                    st.lists(st.lists(pairs, min_size=2, max_size=9).map(lambda r: r+[(91, 1.)]), min_size=1, max_size=6))


@quick
@given(batches)
def test_sharing_changes_nothing(rows):
    shared, plain = collate_examples(rows), collate_examples(rows, share_prefix=False)
    P, (B, lengths) = shared.n_prefix, (len(rows), [len(e)-1 for e in rows])
    for a,b in zip(shared.rectangle(91), plain.rectangle(91)): torch.testing.assert_close(a, b)
    for a,b in zip(to_varlen(shared)[:3], to_varlen(plain)[:3]): assert torch.equal(a, b)
    assert shared.n_targets==pytest.approx(plain.n_targets)==pytest.approx(sum(e.learn[1:].sum() for e in rows))
    assert shared.n_targets==pytest.approx(float(shared.weight_N.sum()))
    assert shared.n_tokens==sum(lengths) and len(shared.ids_N)==sum(lengths)-P*(B-1)
    assert shared.starts_B1[0]==P and shared.starts_B1[-1]==len(shared.ids_N) and (shared.starts_B1.diff()>0).all()
    assert P==0 or (P>=_MIN_PREFIX-1 and B>1 and P<min(lengths))
    assert ((shared.labels_N==-100)==(shared.weight_N==0)).all()
    assert shared.padding==pytest.approx(1-sum(lengths)/(B*max(lengths)))


@quick
@given(batches)
def test_rectangle_is_the_examples(rows):
    ids, labels, weight = collate_examples(rows, share_prefix=False).rectangle(91)
    for i,e in enumerate(rows):
        n = len(e)-1
        assert ids[i,:n].tolist()==e.ids[:-1].tolist() and (ids[i,n:]==91).all()
        assert labels[i,:n].tolist()==[t if w>0 else -100 for t,w in zip(e.ids[1:].tolist(), e.learn[1:])]
        assert weight[i,:n].tolist()==e.learn[1:].tolist() and not weight[i,n:].any() and (labels[i,n:]==-100).all()


@quick
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=14), min_size=1, max_size=6))
def test_prompts_keep_their_last_position(prompts):
    batch = collate_prompts(prompts)
    varlen = to_varlen(batch)
    rows = [varlen.ids_N[a:b].tolist() for a,b in zip(varlen.cu_seqlens_B1.tolist(), varlen.cu_seqlens_B1[1:].tolist())]
    assert rows==prompts and batch.n_targets==0 and (batch.starts_B1.diff()>0).all()
    assert [batch.ids_N[e-1].item() for e in batch.starts_B1[1:].tolist()]==[p[-1] for p in prompts]


# ---------------------------------------------------------------- order

@quick
@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 3), st.booleans())
def test_order_is_the_loaders_own(n, batch_size, seed, epoch, drop_last):
    state = torch.random.get_rng_state()
    found = batch_order(n, batch_size, seed, epoch, drop_last=drop_last)
    assert torch.equal(torch.random.get_rng_state(), state) # the global generator is not touched
    torch.manual_seed(seed)
    loader = DataLoader(range(n), batch_size, shuffle=True, drop_last=drop_last, collate_fn=list)
    for _ in range(epoch): list(loader)
    assert found==list(loader)


def test_order_does_not_depend_on_workers_logging_or_resuming():
    data = list(range(40))
    def epochs(workers, noise=False, start=0):
        loader = DataLoader(data, 8, sampler=EpochSampler(40, 123, start), num_workers=workers, collate_fn=list)
        found = []
        for _ in range(2):
            if noise: torch.rand(7); next(iter(loader)) # someone looks at a batch for a log
            found.append(list(loader))
        return found
    plain = epochs(0)
    assert plain==epochs(2)==epochs(0, noise=True)
    assert plain==[batch_order(40, 8, 123, e) for e in range(2)]
    assert epochs(0, start=1)[0]==plain[1] and batch_order(40, 8, 123, 1)[3:]==plain[1][3:]


def test_the_scratchpads_loaders():
    "The same batches, in the same order, as the scratchpad's cells give on a CPU"
    import tiktoken
    enc = tiktoken.get_encoding('gpt2')
    loaders = make_loaders(SPLIT, enc, device='cpu')
    torch.manual_seed(123)
    rows = InstructionDataset(SPLIT.train, enc)
    theirs = DataLoader(rows, batch_size=8, shuffle=True, drop_last=True,
                        collate_fn=lambda b: scratchpad_collate(b, allowed_max_length=1024))
    n = 0
    for (a,b),(c,d) in zip(loaders.train, theirs):
        assert torch.equal(a, c) and torch.equal(b, d)
        n += 1
    assert n==116 and loaders.train.batch_size==8


@quick
@given(st.lists(st.integers(1, 60), min_size=1, max_size=90), st.integers(1, 9), st.integers(0, 99), st.integers(0, 3), st.integers(1, 5))
def test_windows_hold_every_row_once(lengths, batch_size, seed, epoch, window):
    found = windowed_batches(lengths, batch_size, seed, epoch, window)
    assert sorted(sum(found, []))==list(range(len(lengths)))
    assert len(found)==-(-len(lengths)//batch_size) and sum(len(b)<batch_size for b in found)<=1
    assert found==windowed_batches(lengths, batch_size, seed, epoch, window)


def test_windows_pay_and_stay_mixed():
    lengths = np.random.default_rng(0).integers(20, 200, 4000)
    plain, sorted_ = batch_order(4000, 8, 1, 0), windowed_batches(lengths, 8, 1, 0)
    assert padding_share(lengths, plain)>.25 and padding_share(lengths, sorted_)<.03
    means = np.array([lengths[b].mean() for b in sorted_])
    assert abs(np.corrcoef(means[:-1], means[1:])[0,1])<.15 # no curriculum by length


# ---------------------------------------------------------------- packing

@quick
@given(st.lists(st.integers(0, 40), max_size=200), st.integers(1, 50))
def test_every_row_once_or_reported(lengths, budget):
    packs, left_out = pack_rows(lengths, budget)
    assert sorted(sum(packs, left_out))==list(range(len(lengths)))
    assert left_out==[i for i,n in enumerate(lengths) if n>budget]
    assert all(pack and sum(lengths[i] for i in pack)<=budget for pack in packs)
    short = sum(1 for p in packs if 2*sum(lengths[i] for i in p)<=budget)
    assert short<=1 # two packs at most half full would have been one


@quick
@given(st.lists(st.integers(1, 40), max_size=80), st.integers(1, 50), st.integers(0, 9), st.integers(1, 30))
def test_packed_batches_hold_every_row_once(lengths, budget, seed, window):
    packs, left_out = packed_batches(lengths, budget, seed, 1, window)
    assert sorted(sum(packs, left_out))==list(range(len(lengths)))
    assert (packs, left_out)==packed_batches(lengths, budget, seed, 1, window)


@quick
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(12, 20))
def test_best_fit_is_best_fit(lengths, budget):
    "The same packs as the textbook's search through all of them"
    packs = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = lambda p: budget - sum(lengths[j] for j in p)
        fits = [p for p in packs if room(p)>=lengths[i]]
        if fits: min(fits, key=room).append(i)
        else: packs.append([i])
    assert sorted(sum(lengths[i] for i in p) for p in packs)==sorted(sum(lengths[i] for i in p) for p in pack_rows(lengths, budget).packs)


def test_packing_is_fast_and_tight():
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(5, .6, 200_000).astype(int), 8, 2048)
    secs = []
    for n in (50_000, 200_000):
        start = time.process_time()
        packs, left_out = pack_rows(lengths[:n], 2048)
        secs.append(time.process_time()-start)
    assert not left_out and len(packs)<=1.002*lengths.sum()/2048+1
    assert secs[1]<4 and secs[1]<8*secs[0]+.2 # linear, not quadratic


def test_rows_longer_than_any_pack_do_not_clog():
    "The fault that made others pad forever"
    packs, left_out = packed_batches([100]*50 + [3]*7, 10, 1, 0, window=8)
    assert len(left_out)==50 and sorted(sum(packs, []))==list(range(50, 57))


# ---------------------------------------------------------------- the same losses, however the rows are laid out

@pytest.fixture(scope='module')
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(5)
    cfg = LlamaConfig(vocab_size=997, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, max_position_embeddings=512)
    cfg._attn_implementation = 'eager'
    return LlamaForCausalLM(cfg).double().eval()


def folded(data, n):
    "The first `n` rows with ids below 997, so that the model can be small"
    return [Example(e.ids%997, e.learn, e.where) for e in data[:n]]


def nll(logits_BTV, labels_BT): return torch.nn.functional.cross_entropy(logits_BTV.mT, labels_BT, reduction='none')


@torch.no_grad()
def test_padded_packed_and_single_rows_have_the_same_losses(llama):
    data = InstructionDataset(SPLIT.train[:24], get_gpt2_tokenizer(), 'alpaca')
    rows = folded(data, 24)
    single = torch.stack([nll(llama(a).logits, b).sum() for a,b in (custom_collate_fn([e], 7, device='cpu') for e in rows)])
    ids, labels, _ = collate_examples(rows).rectangle(7)
    padded = nll(llama(ids).logits, labels).sum(1) # causal: what follows a row cannot change it
    torch.testing.assert_close(padded, single, rtol=1e-9, atol=1e-9)
    packs, left_out = packed_batches(data.lengths, 300, seed=1, epoch=0)
    p = collate_packs([[rows[i] for i in pack] for pack in packs], 7)
    mask = torch.zeros(p.row_BT.shape+p.row_BT.shape[-1:], dtype=torch.float64).masked_fill(~row_mask(p.row_BT), torch.finfo(torch.float64).min)
    losses = nll(llama(p.input_ids_BT, attention_mask=mask[:, None], position_ids=p.pos_BT).logits, p.labels_BT)
    for line, pack in enumerate(packs):
        for j,i in enumerate(pack): torch.testing.assert_close(losses[line][p.row_BT[line]==j].sum(), single[i], rtol=1e-9, atol=1e-9)
    leaky = nll(llama(p.input_ids_BT, position_ids=p.pos_BT).logits, p.labels_BT)
    assert (leaky-losses).abs().max()>1e-6 # without the mask rows do see each other
    assert not left_out


@torch.no_grad()
def test_flat_batches_have_the_same_loss_in_our_model(llama, tmp_path):
    from sft_nb.decoder import batch_loss
    from sft_nb.loading import load_model
    llama.save_pretrained(tmp_path)
    model = load_model(tmp_path).model
    data = InstructionDataset(SPLIT.train[:12], get_gpt2_tokenizer(), 'scratchpad')
    rows = folded(data, 12)
    alone = sum(float(batch_loss(model, collate_examples([e]))[0]) for e in rows)
    for share in (True, False):
        batch = collate_examples(rows, share)
        assert (batch.n_prefix>10)==share
        assert float(batch_loss(model, batch)[0])==pytest.approx(alone, rel=1e-5)


# ---------------------------------------------------------------- refusals

def test_refusals():
    mute = Example(np.arange(5, dtype=np.int32), np.zeros(5, np.float32), 'x.json record 3')
    with pytest.raises(InputError, match='batch of x.json record 3: no target in 1 rows'): collate_examples([mute])
    with pytest.raises(InputError, match='at least 2 ids, got 1'): collate_examples([Example(mute.ids[:1], mute.learn[:1], 'r')])
    with pytest.raises(InputError, match='budget'): pack_rows([1], 0)


def test_loaders_refuse_what_a_rectangle_cannot_say():
    "A weight of .1 would become 1 without a word"
    loaders = make_loaders(SPLIT, 'gpt2', template='alpaca', prompt_weight=.1, device='cpu')
    with pytest.raises(InputError, match=r'record \d+: weights between 0 and 1 do not fit .*, got 0.1; use collate_examples'): next(iter(loaders.train))
    for whole in (0, 1):
        inputs, targets = next(iter(make_loaders(SPLIT, 'gpt2', template='alpaca', prompt_weight=whole, device='cpu').val))
        assert ((targets[:, 0]!=-100)==bool(whole)).all()
    with pytest.raises(InputError, match="leaving loss_on='last' without effect"): make_loaders(SPLIT, 'gpt2', loss_on='last')


def test_loaders_with_a_template_refuse_instead_of_cutting():
    with pytest.raises(InputError, match='are longer than max_length=50'): make_loaders(SPLIT, 'gpt2', max_length=50, template='alpaca')
    loaders = make_loaders(SPLIT, 'gpt2', max_length=50, template='alpaca', over_long='cut_prompt', device='cpu')
    inputs, targets = next(iter(loaders.train))
    assert inputs.shape[1]<50 and (targets!=-100).any(1).all()
