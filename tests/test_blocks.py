"Weights that stay in the blocks of a GGUF file: every kind and family as the unpacked model, for answers and under adapters"
import json
import random
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import torch
from torch.nn import init

from sft_nb import export
from sft_nb.adapters import load_adapter, save_adapter
from sft_nb.basics import InputError
from sft_nb.choices import LoraConfig, Stops
from sft_nb.cli import main
from sft_nb.batches import collate_examples
from sft_nb.decoder import batch_loss, gradients_of
from sft_nb.export import gguf_settings, write_gguf
from sft_nb.generation import generate
from sft_nb.growing import resize_vocab
from sft_nb.loading import load_model
from sft_nb.lora import adapted, add_lora, merge_lora
from sft_nb.packed import PackedWeight, in_blocks
from sft_nb.planes import KEPT_KINDS
from sft_nb.rows import Example
from sft_nb.saving import save_model
from sft_nb.shelf import get_template
from test_export import toy_tokenizer
from test_model import V, gguf_model, ids_of

torch.set_num_threads(1)
FAMILIES = ['gpt2', 'llama', 'mistral', 'qwen2', 'qwen3', 'phi3', 'gemma', 'gemma2', 'gemma3_text']
KINDS = {kind.name: kind for kind in KEPT_KINDS}
SCALES = {'Q4_K': (0, 2), 'Q5_K': (0, 2), 'Q6_K': (208,)} # kinds that the package unpacks and does not pack


def random_blocks(kind, n_rows, n_columns, seed):
    "Blocks of random bytes whose numbers are about 0.05"
    n_numbers, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n_rows*n_columns//n_numbers, n_bytes), dtype=np.uint8)
    for at in SCALES[kind.name]:
        scale = rng.uniform(1e-5, 4e-5, (len(raw), 1)) if kind.name=='Q6_K' else rng.uniform(5e-5, 2e-4, (len(raw), 1))
        raw[:,at:at+2] = scale.astype(np.float16).view(np.uint8)
    return raw.tobytes()


@contextmanager
def packing_as(kind):
    "Let our exporter write this kind wherever rows divide into its blocks"
    own_kind, own_rows = export._kind_of, export.quantise_rows
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    def kind_of(asked, name, shape):
        plain = own_kind('f16', name, shape)
        return kind if plain==gguf.GGMLQuantizationType.F16 and shape[-1]%block==0 else plain
    def rows_as(rows, kind, name):
        if kind.name not in SCALES: return own_rows(rows, kind, name)
        return random_blocks(kind, *rows.shape, random.Random(name).randrange(2**31))
    with patch.multiple(export, _kind_of=kind_of, quantise_rows=rows_as): yield


@cache
def toy(family):
    "A random model of a family whose rows divide into blocks of 256"
    size = dict(n_embd=256, n_inner=512, n_head=4) if family=='gpt2' else dict(hidden_size=256, intermediate_size=512)
    hf = gguf_model('gemma3' if family=='gemma3_text' else family, **size)
    if family=='gpt2': hf.config.activation_function = 'gelu_new'
    for p in hf.parameters(): p.data.mul_(0.3)
    folder = mkdtemp()
    hf.save_pretrained(folder)
    return load_model(folder).model


def both(path, family, kind):
    "A model packed as one kind, unpacked and in blocks"
    model = toy(family)
    with packing_as(kind): write_gguf(path, model, gguf_settings(model.cfg, 'f16', toy_tokenizer(V)), 'f16')
    return load_model(path).model.eval(), load_model(path, weights='blocks').model.eval()


def apart(ours, theirs): return ((ours - theirs).norm()/theirs.norm()).item()


def adapter_gradients(model):
    "Gradients of adapters as after some training, for two rows"
    rows = [Example(ids_of(1, n, n)[0].numpy().astype(np.int32), np.ones(n, np.float32), 'row') for n in (9, 14)]
    if not adapted(model): add_lora(model, LoraConfig(4), seed=3)
    for i, m in enumerate(adapted(model)): init.normal_(m.adapter.B, std=.05, generator=torch.Generator().manual_seed(i))
    for m in adapted(model): m.adapter.B.data = m.adapter.B.data.float().to(m.adapter.B.dtype)
    return gradients_of(model, lambda: batch_loss(model, collate_examples(rows))[0])


def check_pair(full, packed):
    assert in_blocks(packed) and not in_blocks(full)
    assert sum(p.numel() for p in packed.parameters())==sum(p.numel() for p in full.parameters())
    with torch.no_grad():
        for ids in (ids_of(2, 30), ids_of(1, 5)): # the second by sums over columns
            assert apart(packed(ids), full(ids)) < 1e-5
    theirs, ours = [adapter_gradients(model) for model in (full, packed)]
    exact, same = [adapter_gradients(model.double()) for model in (full, packed)]
    assert len(ours)==len(theirs)==2*len(adapted(packed))
    for name, g in exact.items():
        assert apart(same[name], g) < 1e-9, name # in 64 bits: the map itself is the same
        assert apart(ours[name], theirs[name]) < max(1e-5, 4*apart(theirs[name], g)), name # sums in 32 bits err by themselves


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind(kind, tmp_path): check_pair(*both(tmp_path/'m.gguf', 'qwen2', KINDS[kind]))


@pytest.mark.parametrize('family, kind', [(f, k) for f, k in zip(FAMILIES, ['Q4_0', 'Q4_K', 'Q6_K', 'Q8_0', 'Q5_K', 'Q4_1', 'Q6_K', 'Q4_K', 'Q5_0'])])
def test_every_family(family, kind, tmp_path): check_pair(*both(tmp_path/'m.gguf', family, KINDS[kind]))


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('family', FAMILIES)
def test_every_kind_of_every_family(family, kind, tmp_path): check_pair(*both(tmp_path/'m.gguf', family, KINDS[kind]))


def test_answers_are_the_same(tmp_path):
    "Greedy ids, in batches and alone, in 32 bits; and in bfloat16 the logits are as near as those of rounded weights"
    full, packed = both(tmp_path/'m.gguf', 'llama', KINDS['Q4_K'])
    tokenizer = toy_tokenizer(V)
    prompts = [ids_of(1, n, n)[0].tolist() for n in (3, 17, 5, 9, 9, 4, 12, 6, 8, 7, 3, 30)]
    found = [[a.ids for a in generate(m, tokenizer, prompts, until=Stops(9, ids=[]))] for m in (full, packed)]
    assert found[0]==found[1]
    assert found[1][:2]==[a.ids for p in prompts[:2] for a in generate(packed, tokenizer, [p], until=Stops(9, ids=[]))]
    ids = ids_of(3, 20)
    with torch.no_grad():
        exact = full(ids)
        for m in (full, packed): m.to(torch.bfloat16)
        assert packed.head_weight.dtype==torch.bfloat16 and packed(ids).dtype==torch.float32
        assert apart(packed(ids), exact) < 2*apart(full(ids), exact) < .1
        few = ids[:1,:5] # whose products are made from unrounded weights
        assert apart(packed(few), exact[:1,:5]) < 2*apart(full(few), exact[:1,:5]) < .1


def test_memory_is_that_of_the_file(tmp_path):
    full, packed = both(tmp_path/'m.gguf', 'qwen2', KINDS['Q4_0'])
    def size(model):
        stored = [getattr(p, n) if isinstance(p, PackedWeight) else p for p in model.parameters()
                  for n in (p.__tensor_flatten__()[0] if isinstance(p, PackedWeight) else [''])]
        return sum(t.numel()*t.element_size() for t in stored)
    assert size(packed) < size(full)*.15
    with torch.no_grad(): packed(ids_of(3, 30))
    assert packed.blocks[0].qkv.weight.bags is None # nothing is laid out again before a few rows are asked for


def test_what_blocks_cannot_do_is_refused(tmp_path):
    full, packed = both(tmp_path/'m.gguf', 'llama', KINDS['Q8_0'])
    assert not any(p.requires_grad for p in packed.parameters())
    with pytest.raises(InputError, match='save_model: the weights are in blocks'):
        save_model(tmp_path/'model', packed, toy_tokenizer(V), get_template('alpaca'))
    with pytest.raises(InputError, match='rows of a table shall be trained'): add_lora(packed, LoraConfig(2, tokens=(3,)))
    assert not adapted(packed)
    add_lora(packed, LoraConfig(2))
    with pytest.raises(InputError, match='weights in blocks cannot take an adapter in'): merge_lora(packed)
    with pytest.raises(InputError, match='have no numbers for'): packed.head_weight*2
    write_gguf(tmp_path/'plain.gguf', toy('llama'), gguf_settings(toy('llama').cfg, 'f32', toy_tokenizer(V)), 'f32')
    with pytest.raises(InputError, match='no weight of it is packed'): load_model(tmp_path/'plain.gguf', weights='blocks')
    save_model(tmp_path/'folder', full, toy_tokenizer(V), get_template('alpaca'))
    with pytest.raises(InputError, match='is no GGUF file'): load_model(tmp_path/'folder', weights='blocks')


def test_damaged_blocks_are_named(tmp_path):
    both(tmp_path/'m.gguf', 'llama', KINDS['Q8_0'])
    reader = gguf.GGUFReader(tmp_path/'m.gguf', 'r+')
    tensor = next(t for t in reader.tensors if t.name=='blk.1.ffn_down.weight')
    tensor.data[7,:2] = [0, 0x7C] # an infinite scale
    reader.data.flush()
    for weights in ('full', 'blocks'):
        with pytest.raises(InputError, match=r'model.layers.1.mlp.down_proj.weight has values that are not finite'):
            load_model(tmp_path/'m.gguf', weights=weights)


def test_more_rows_and_another_place(tmp_path):
    full, packed = both(tmp_path/'m.gguf', 'qwen2', KINDS['Q6_K'])
    for model in (full, packed): resize_vocab(model, V + 5)
    ids = torch.tensor([[1, V + 2, 5]])
    with torch.no_grad(): assert apart(packed(ids), full(ids)) < 1e-5
    assert packed.to('meta').head_weight.parts[0].planes.device.type=='meta'


def test_an_adapter_comes_back_beside_blocks(tmp_path):
    "Loaded to answer: it stays beside the blocks, and says what it says when merged into the unpacked weights"
    _, packed = both(tmp_path/'m.gguf', 'llama', KINDS['Q4_1'])
    add_lora(packed, LoraConfig(4))
    for m in adapted(packed): init.normal_(m.adapter.B, std=.05)
    save_adapter(tmp_path/'adapter', packed, base=str(tmp_path/'m.gguf'))
    beside = load_model(tmp_path/'adapter', weights='blocks').model
    merged = load_model(tmp_path/'adapter').model
    assert adapted(beside) and not adapted(merged)
    with torch.no_grad():
        assert torch.equal(beside(ids_of(2, 20)), packed(ids_of(2, 20)))
        assert apart(beside(ids_of(2, 20)), merged(ids_of(2, 20))) < 1e-4
    again = load_adapter(tmp_path/'adapter', load_model(tmp_path/'m.gguf', weights='blocks').model)
    with torch.no_grad(): assert torch.equal(again(ids_of(2, 20)), packed(ids_of(2, 20)))


def test_a_run_beside_blocks(tmp_path, monkeypatch, capsys):
    "Train adapters, keep them alone, answer with them; what makes no sense is refused before anything is read or written"
    monkeypatch.chdir(tmp_path)
    tokenizer = toy_tokenizer(300)
    hf = gguf_model('llama', hidden_size=256, intermediate_size=512, vocab_size=tokenizer.n_vocab, max_position_embeddings=256)
    hf.save_pretrained('hf')
    model = load_model('hf').model
    with packing_as(KINDS['Q4_K']): write_gguf('m.gguf', model, gguf_settings(model.cfg, 'f16', tokenizer, get_template('alpaca')), 'f16')
    Path('d.json').write_text(json.dumps([dict(instruction=f'Say {i}.', input='', output=f'It is {i}.') for i in range(40)]))
    words = ['train', '--data', 'd.json', '--model', 'm.gguf', '--device', 'cpu', '--dtype', 'float32', '--weights', 'blocks']
    def refused(*more):
        assert main([*words, '--name', 'no', *more])==2
        assert not Path('runs/no').exists()
        return capsys.readouterr().err
    assert 'add --lora or --adapter' in refused()
    assert '--weights blocks: does not go with --lora-4bit' in refused('--lora', '2', '--lora-4bit')
    with monkeypatch.context() as small:
        small.setattr('sft_nb.kept.free_memory', lambda: 1000)
        assert 'keep the adapter alone with --no-merge' in refused('--lora', '2')
    quick = '--no-preflight', '--steps', '2', '--lora', '2'
    assert main([*words, *quick, '--no-merge', '--name', 'thin'])==0
    thin = load_model('runs/thin/adapter', weights='blocks').model
    assert len(adapted(thin))==8 and any(m.adapter.B.abs().sum()>0 for m in adapted(thin))
    assert main([*words, *quick, '--name', 'whole'])==0
    whole = load_model('runs/whole/model').model
    with torch.no_grad(): assert apart(thin(ids_of(2, 20)), whole(ids_of(2, 20))) < 1e-4
    args = ['respond', '--data', 'd.json', '--part', 'val', '--model', 'm.gguf', '--adapter', 'runs/thin/adapter', '--device', 'cpu', '--max-new', '4']
    for weights, out in (('blocks', 'a.json'), ('full', 'b.json')): assert main([*args, '--weights', weights, '--out', out])==0
    answers = [[row['model_response'] for row in json.loads(Path(out).read_text())] for out in ('a.json', 'b.json')]
    assert answers[0]==answers[1] and answers[0]
