"The book's plain decoder against `transformers`, and the engine against it: the two share no line of code"
import random

import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close

from sft_nb.basics import InputError
from sft_nb.rows import Example
from sft_nb.batches import collate_examples
from sft_nb.model import ModelConfig, PlainDecoder, plain_answer, plain_decoder, plain_loss
from sft_nb.decoder import Decoder, batch_loss, gradients_of
from sft_nb.families import config_from_hf, file_parts, hf_tensors
from sft_nb.fetch import fetch_default_model
from sft_nb.loading import load_model

transformers.logging.set_verbosity_error()
V = 211
COVERED = 'llama', 'mistral', 'qwen2', 'qwen3'
SIZES = dict(vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, bos_token_id=1,
             eos_token_id=2)


def shake(model, seed):
    "Biases and norms that are not all alike, so that one that is forgotten shows"
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim()==1: p.data += 0.2*torch.randn(p.shape, generator=generator)
    return model


def random_model(family, tied, seed=3):
    "A random small `transformers` model of a family"
    own = dict(llama=dict(attention_bias=True, mlp_bias=True, head_dim=10), qwen2={}, qwen3=dict(head_dim=8),
               mistral=dict(sliding_window=None, head_dim=8))[family]
    rope = dict(rope_type='default', rope_theta=[1e4, 5e5][tied])
    settings = SIZES | own | dict(rope_parameters=rope, tie_word_embeddings=tied)
    cfg = transformers.AutoConfig.for_model(family, **settings)
    torch.manual_seed(seed)
    return shake(transformers.AutoModelForCausalLM.from_config(cfg, attn_implementation='eager').eval(), seed)


def plain_twin(hf):
    "The plain decoder with the weights of a `transformers` model"
    return plain_decoder(config_from_hf(hf.config.to_dict()), hf.state_dict())


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('family', COVERED)
def test_logits_and_answers_equal_transformers(family, tied):
    hf = random_model(family, tied)
    plain, ids_BT = plain_twin(hf), torch.randint(0, V, (3, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(): assert_close(plain(ids_BT), hf(ids_BT).logits, atol=1e-5, rtol=1e-5)
    for prompt in ([7], [3, 100, 91, 4]):
        theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None,
                             pad_token_id=0)[0,len(prompt):].tolist()
        assert plain_answer(plain, prompt, 9)==theirs
        stop = theirs[3]
        assert plain_answer(plain, prompt, 9, stop_ids=(stop,))==theirs[:theirs.index(stop) + 1]


@pytest.mark.parametrize('family', COVERED)
def test_state_dict_fits_as_it_is(family):
    hf = random_model(family, tied=True)
    plain = PlainDecoder(config_from_hf(hf.config.to_dict()))
    plain.load_state_dict(hf.state_dict())
    assert plain.lm_head.weight is plain.model['embed_tokens'].weight
    theirs = dict(hf.named_parameters())
    assert {n for n, _ in plain.named_parameters()}==theirs.keys()
    for n, p in plain.named_parameters(): assert torch.equal(p, theirs[n])


BATCHES = {'ragged': ([2, 17, 5, 3, 8], 0), 'prefix': ([3, 9, 1, 6], 12), 'one-token answers': ([1]*3, 10),
           'identical rows': ([0, 0], 11), 'one row': ([23], 0)}


def examples(lengths, n_same, seed, learn):
    "Random rows that begin alike; weights are 0, 0.3 or 1, or only the last id is learned"
    rng = random.Random(f'{seed} {learn}')
    def ids(n): return [rng.randrange(V) for _ in range(n)]
    def weights(n): return [rng.choice([0., 0.3, 1.]) if learn=='mixed' else 0. for _ in range(n)]
    same, same_weight = ids(n_same), weights(n_same) # a prefix is shared if its weights are the same too
    rows = [(same + ids(n), same_weight + weights(n)) for n in lengths]
    for _, weight in rows: weight[-1] = 1.
    return [Example(np.array(row, np.int32), np.array(weight, np.float32), 'test') for row, weight in rows]


def engine_twin(plain):
    "A `Decoder` with the plain decoder's weights, found by the names that files have"
    model, weights = Decoder(plain.cfg), plain.state_dict()
    for name, p in model.named_parameters():
        for file_name, part in file_parts(plain.cfg, name, p.data): part.copy_(weights[file_name])
    return model


def plain_gradients(plain, batch):
    "Loss and gradients of the plain decoder on the padded rectangle"
    ids_BT, labels_BT, weight_BT = batch.rectangle(91)
    loss, n = plain_loss(plain, ids_BT, labels_BT, weight_BT)
    plain.zero_grad()
    loss.backward()
    return loss, n, {name: p.grad for name, p in plain.named_parameters()}


def random_plain(family, tied):
    own = dict(llama=dict(o_bias=True, qkv_bias=True, mlp_bias=True), mistral={}, qwen2=dict(qkv_bias=True),
               qwen3=dict(qk_norm=True))[family]
    torch.manual_seed(7)
    cfg = ModelConfig(family, vocab_size=V, n_layers=2, width=24, n_heads=6, n_kv_heads=2, head_dim=8,
                      mlp_width=40, max_length=64, tied=tied, rope_theta=500., **own)
    plain = shake(PlainDecoder(cfg), 7)
    for p in plain.parameters():
        if p.dim()==2: p.data *= 5 # far from the beginning, where all ids are alike
    return plain


@pytest.mark.parametrize('shape', BATCHES)
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('family', COVERED)
def test_engine_learns_as_the_plain_decoder(family, tied, shape):
    "Loss and each gradient on ragged rows, with and without a prefix computed once, in chunks and whole"
    plain = random_plain(family, tied)
    model = engine_twin(plain)
    for learn in ('answer', 'mixed'):
        batch = collate_examples(examples(*BATCHES[shape], shape, learn))
        assert (batch.n_prefix>0)==(BATCHES[shape][1]>0)
        want, n, theirs = plain_gradients(plain, batch)
        assert n==pytest.approx(batch.n_targets)
        for chunk in (3, 1024):
            assert_close(batch_loss(model, batch, chunk)[0], want, atol=0, rtol=1e-5)
            ours = gradients_of(model, lambda batch=batch, chunk=chunk: batch_loss(model, batch, chunk)[0])
            parts = {n: g for name, grad in ours.items() for n, g in file_parts(plain.cfg, name, grad)}
            assert parts.keys()==theirs.keys()
            for name, g in parts.items():
                assert (g - theirs[name]).norm()<=1e-5*theirs[name].norm() + 1e-7, (name, learn, chunk)


def test_bridge_from_the_engine():
    plain = random_plain('qwen3', tied=True)
    again = plain_decoder(plain.cfg, hf_tensors(engine_twin(plain)))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), again.parameters(), strict=True))


LINEAR = dict(rope_type='linear', factor=2.)

@pytest.mark.parametrize('name, value', [
    ('window', 4), ('rope_scaling', LINEAR), ('rope_dim', 4), ('score_cap', 5.), ('logit_cap', 5.),
    ('norm', 'layer'), ('sandwich', True), ('norm_plus_one', True), ('embed_scale', 2.),
    ('positions', 'learned'),
    ('gated_mlp', False), ('query_scale', 0.5)])
def test_what_it_does_not_know_is_refused(name, value):
    cfg = ModelConfig('llama', vocab_size=V, n_layers=1, width=24, n_heads=4, n_kv_heads=2, head_dim=6,
                      mlp_width=40, max_length=64, **{name: value})
    with pytest.raises(InputError, match=f'PlainDecoder: knows only {name}='): PlainDecoder(cfg)
    Decoder(cfg) # the engine knows it


def test_default_model_equals_transformers():
    "SmolLM2's weights and logits, in the engine and in the plain decoder"
    ours, path = load_model(), fetch_default_model()
    packed = transformers.GgufConfig(dequantize=True)
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=packed).eval()
    theirs = dict(hf.named_parameters())
    for n, t in hf_tensors(ours.model): assert torch.equal(t, theirs[n]), n
    ids_BT = torch.randint(0, 49152, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): wanted = hf(ids_BT).logits
    for model in (ours.model, plain_decoder(ours.cfg, hf_tensors(ours.model))):
        with torch.no_grad(): assert_close(model(ids_BT), wanted, atol=2e-4, rtol=0)
