"Adapters against the peft library, in both directions, and what a notebook cell cannot hold."

import pytest
import torch
from torch import nn

from sft_nb.basics import InputError, load_json, save_json
from sft_nb.rows import Example
from sft_nb.batches import collate_examples
from sft_nb.model import plain_answer
from sft_nb.decoder import batch_loss
from sft_nb.loading import load_model
from sft_nb.saving import save_model
from sft_nb.choices import LoraConfig
from sft_nb.lora import (
    Share, adapted, add_lora, find_targets, merge_lora, remove_lora, trainable_share, unmoved_tokens)
from sft_nb.adapters import load_adapter, quantize_base, save_adapter
from sft_nb.choices import Stops
from sft_nb.generation import generate
from sft_nb.choices import TrainConfig
from sft_nb.settings import describe_run
from sft_nb.steps import RunPlan, World
from sft_nb.run import train

transformers, peft = pytest.importorskip('transformers'), pytest.importorskip('peft')
torch.set_num_threads(1)

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None)
CONFIGS = dict(
    llama=lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    qwen2=lambda: transformers.Qwen2Config(**SIZES),
    phi3=lambda: transformers.Phi3Config(**SIZES),
    gemma2=lambda: transformers.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8),
    gpt2=lambda: transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                                         bos_token_id=None, eos_token_id=None))
TARGETS = dict(llama=['q_proj', 'v_proj', 'up_proj'], qwen2=['k_proj', 'o_proj', 'gate_proj'], phi3=['qkv_proj', 'down_proj'],
               gemma2=['q_proj', 'k_proj', 'v_proj', 'down_proj'], gpt2=['c_attn', 'mlp.c_proj'])
ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CONFIGS)
def family(request, tmp_path):
    "A random model written by transformers, and ours read from its folder"
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param](), attn_implementation='eager').eval()
    theirs.save_pretrained(tmp_path/'base')
    return request.param, theirs, load_model(tmp_path/'base').model.eval(), tmp_path


class Plain:
    "A tokenizer whose text does not matter"
    eos_id = None
    def decode_content(self, ids): return ''


def shake(model):
    "Adapters as after some training: B is zero no longer"
    for m in adapted(model): nn.init.normal_(m.adapter.B, std=0.2)
    return model


@pytest.mark.parametrize('cfg', [LoraConfig(4, 8), LoraConfig(3, 5, root_scale=True)], ids=['plain', 'root scale'])
@pytest.mark.parametrize('every', [True, False], ids=['all', 'some'])
def test_peft_reads_ours(family, cfg, every):
    name, theirs, ours, folder = family
    cfg = LoraConfig(cfg.rank, cfg.alpha, 0., 'all' if every else tuple(TARGETS[name]), cfg.root_scale)
    before = ours(ids)
    shake(add_lora(ours, cfg))
    assert (ours(ids) - before).abs().max() > 0.01
    save_adapter(folder/'adapter', ours, base=str(folder/'base'))
    read = peft.PeftModel.from_pretrained(theirs, folder/'adapter').eval()
    with torch.no_grad(): torch.testing.assert_close(read(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('root', [False, True])
def test_we_read_pefts(family, root):
    name, theirs, ours, folder = family
    cfg = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[name], use_rslora=root, task_type='CAUSAL_LM',
                          init_lora_weights=False, fan_in_fan_out=name=='gpt2')
    made = peft.get_peft_model(theirs, cfg).eval()
    made.save_pretrained(folder/'adapter')
    load_adapter(folder/'adapter', ours)
    with torch.no_grad(): torch.testing.assert_close(ours(ids), made(ids).logits, atol=1e-5, rtol=1e-5)
    assert trainable_share(ours).n_trainable == made.get_nb_trainable_parameters()[0]


def test_there_and_back_is_bitwise(family):
    _, _, ours, folder = family
    shake(add_lora(ours, LoraConfig(4)))
    save_adapter(folder/'adapter', ours)
    again = load_adapter(folder/'adapter', load_model(folder/'base').model.eval())
    assert torch.equal(again(ids), ours(ids))


def test_gradients_are_pefts(family):
    name, theirs, ours, folder = family
    shake(add_lora(ours, LoraConfig(4)))
    save_adapter(folder/'adapter', ours)
    read = peft.PeftModel.from_pretrained(theirs, folder/'adapter', is_trainable=True)
    logits = read(ids).logits[:,:-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:,1:].flatten(), reduction='sum').backward()
    rows = [Example(r.numpy().astype('int32'), torch.ones(20).numpy(), 'x') for r in ids]
    batch_loss(ours, collate_examples(rows))[0].backward()
    for m in adapted(ours):
        m.adapter.A.data, m.adapter.B.data = m.adapter.A.grad, m.adapter.B.grad
    save_adapter(folder/'gradients', ours)
    from safetensors.torch import load_file
    grads = load_file(folder/'gradients/adapter_model.safetensors')
    for n,p in read.named_parameters():
        if not p.requires_grad: continue
        torch.testing.assert_close(grads[n.replace('.default', '')], p.grad, atol=1e-4, rtol=1e-4)


def test_merged_is_unmerged_and_transformers_loads_it(family):
    _, _, ours, folder = family
    shake(add_lora(ours, LoraConfig(4)))
    with torch.no_grad(): before = ours(ids)
    assert merge_lora(ours) < 1e-4
    save_model(folder/'merged', ours)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder/'merged', attn_implementation='eager').eval()
    with torch.no_grad(): torch.testing.assert_close(read(ids).logits, before, atol=1e-4, rtol=1e-4)


def test_a_model_with_adapters_is_not_saved_as_a_plain_one(family):
    _, _, ours, folder = family
    add_lora(ours)
    with pytest.raises(InputError, match='merge_lora'): save_model(folder/'out', ours)
    assert not (folder/'out').exists()


def test_generation_uses_adapters(family):
    _, _, ours, _ = family
    shake(add_lora(ours, LoraConfig(4)))
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6]]
    for a,p in zip(generate(ours, Plain(), prompts, until=Stops(8)), prompts): assert list(a.ids)==plain_answer(ours, p, 8)


def test_bfloat16_base_learns_in_float32(family):
    _, _, ours, _ = family
    add_lora(ours, LoraConfig(4), base_dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in ours.parameters() if not p.requires_grad} == {torch.bfloat16}
    rows = [Example(r.numpy().astype('int32'), torch.ones(20).numpy(), 'x') for r in ids]
    batch = collate_examples(rows)
    opt = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=0.01)
    first = None
    for _ in range(25):
        loss, n = batch_loss(ours, batch)
        first = first or loss.item()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < 0.97*first


@pytest.mark.parametrize('kind', [dict(use_dora=True), dict(init_lora_weights='pissa'), dict(alora_invocation_tokens=[5])],
                         ids=lambda kind: next(iter(kind)))
def test_pefts_kinds_we_do_not_compute_are_refused(family, kind):
    name, theirs, ours, folder = family
    cfg = peft.LoraConfig(r=4, target_modules=TARGETS[name], **kind, task_type='CAUSAL_LM', fan_in_fan_out=name=='gpt2')
    peft.get_peft_model(theirs, cfg).save_pretrained(folder/'odd')
    with pytest.raises(InputError, match=next(iter(kind))): load_adapter(folder/'odd', ours)
    assert not adapted(ours)


def test_a_torn_adapter_is_refused_and_changes_nothing(family):
    _, _, ours, folder = family
    shake(add_lora(ours, LoraConfig(4)))
    path = save_adapter(folder/'adapter', ours)/'adapter_model.safetensors'
    plain = load_model(folder/'base').model
    whole = path.read_bytes()
    for n in (0, 7, len(whole)//2, len(whole)-1):
        path.write_bytes(whole[:n])
        with pytest.raises(InputError, match='cannot be read'): load_adapter(folder/'adapter', plain)
    path.write_bytes(whole)
    save_json(folder/'adapter/adapter_config.json', load_json(folder/'adapter/adapter_config.json') | dict(r=5))
    with pytest.raises(InputError, match='load the model the adapter was made for'): load_adapter(folder/'adapter', plain)
    assert not adapted(plain) and trainable_share(plain).n_trainable == trainable_share(plain).n_all


@pytest.mark.parametrize('ours_first', [True, False])
def test_trained_tokens_cross_to_peft(family, ours_first):
    "Rows of two new tokens travel with the adapter, in both directions"
    name, theirs, ours, folder = family
    tokens = [96, 40] if ours.cfg.tied else {'embed_tokens': [96, 40], 'lm_head': [96, 40]}
    if ours_first:
        shake(add_lora(ours, LoraConfig(4, targets=tuple(TARGETS[name]), tokens=(96, 40))))
        for table in ours.token_rows: getattr(ours, table).weight.data[[40, 96]] += 0.3
        save_adapter(folder/'adapter', ours)
        made = peft.PeftModel.from_pretrained(theirs, folder/'adapter').eval()
    else:
        made = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=TARGETS[name], trainable_token_indices=tokens,
                                   task_type='CAUSAL_LM', init_lora_weights=False, fan_in_fan_out=name=='gpt2')).eval()
        for n,p in made.named_parameters():
            if 'trainable_tokens_delta' in n: p.data += 0.1*torch.arange(2.)[:,None] + 0.1
        made.save_pretrained(folder/'adapter')
        load_adapter(folder/'adapter', ours)
    probe = torch.cat([ids, torch.tensor([[40, 96]*10])])
    with torch.no_grad(): torch.testing.assert_close(ours(probe), made(probe).logits, atol=1e-5, rtol=1e-5)
    before = load_model(folder/'base').model.eval()
    torch.testing.assert_close(remove_lora(ours)(probe), before(probe), atol=0, rtol=0)


def test_unknown_targets_name_the_near_misses():
    torch.manual_seed(3)
    from sft_nb.model import ModelConfig
    from sft_nb.decoder import Decoder
    toy = Decoder(ModelConfig('llama', 31, 1, 16, 2, 2, 8, 24, 32))
    with pytest.raises(InputError, match='gate_proj'): find_targets(toy, 'gate_prj')
    assert str(Share(1, 8)) == '1 of 8 weights can be trained (12.50%)'


def test_4_bit_base(family):
    "On a CPU: memory a quarter of bfloat16's, logits near, adapters learn, merging is refused"
    pytest.importorskip('torchao', reason='torchao is an extra: pip install torchao')
    _, _, ours, _ = family
    plain = ours.bfloat16()(ids)
    quantize_base(ours)
    near = ours(ids)
    assert 0 < (near - plain).norm()/plain.norm() < 0.35
    add_lora(ours, LoraConfig(4))
    rows = [Example(r.numpy().astype('int32'), torch.ones(20).numpy(), 'x') for r in ids]
    batch_loss(ours, collate_examples(rows))[0].backward()
    assert all(m.adapter.B.grad.abs().max()>0 for m in adapted(ours))
    with pytest.raises(InputError, match='4-bit'): merge_lora(ours)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_training_on_a_4_bit_base(tmp_path, dtype):
    "The same losses and adapters, bit for bit, as on a plain base of the values that the 4 bits stand for; stopped, resumed, merged, answering"
    pytest.importorskip('torchao', reason='torchao is an extra: pip install torchao')
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS['llama']())
    theirs.save_pretrained(tmp_path/'base')
    base = lambda: load_model(tmp_path/'base').model
    packed = lambda: add_lora(quantize_base(base()), LoraConfig(4))
    plain = quantize_base(base())
    for m in plain.modules():
        if isinstance(m, nn.Linear): m.weight = nn.Parameter(m.weight.detach().to(torch.float32), requires_grad=False)
    add_lora(plain, LoraConfig(4))
    rows = [Example(r.numpy().astype('int32'), torch.ones(20).numpy(), 'x') for r in ids.repeat(4, 1)]
    cfg = TrainConfig(lr=1e-2, epochs=2, batch_size=3, dtype=dtype, save_every=1)
    values = lambda m: [p.detach() for p in m.parameters() if p.requires_grad]

    ours, gib = packed(), lambda m: float(describe_run(cfg, rows, m).split('weights: ')[1].split()[0])
    assert gib(ours) < gib(plain)
    log, wanted = train(ours, rows, rows[:3], cfg), train(plain, rows, rows[:3], cfg)
    assert [s.loss for s in log.steps] == [s.loss for s in wanted.steps] and log.vals[-1].loss < log.vals[0].loss
    for got, want in zip(values(ours), values(plain)): torch.testing.assert_close(got, want, atol=0, rtol=0)
    assert all(type(m.weight.data) is not torch.Tensor for m in adapted(ours))
    prompts = [[1, 2, 3], [1, 2, 50, 7, 9]]
    answers = generate(ours, Plain(), prompts, until=Stops(6, ids=()))
    assert [list(a.ids) for a in answers] == [plain_answer(ours, p, 6) for p in prompts]

    train(packed(), rows, rows[:3], cfg, tmp_path/'run', hooks=[lambda e, _: 'enough' if e.step==3 else None])
    again = packed()
    assert len(train(again, rows, rows[:3], cfg, tmp_path/'run', resume=True).steps) == len(log.steps)
    for got, want in zip(values(again), values(ours)): torch.testing.assert_close(got, want, atol=0, rtol=0)
    with pytest.raises(InputError, match='frozen_weights'): train(add_lora(base(), LoraConfig(4)), rows, rows[:3], cfg, tmp_path/'run', resume=True)

    save_adapter(tmp_path/'adapter', ours)
    whole = load_adapter(tmp_path/'adapter', base())
    for got, want in zip(values(whole), values(ours)): torch.testing.assert_close(got, want, atol=0, rtol=0)
    assert merge_lora(whole) < 1e-4
    with pytest.raises(InputError, match='shard=False'):
        RunPlan(packed(), rows, rows[:3], TrainConfig(shard=True), world=World(0, 2))


def test_a_4_bit_base_stays_so_in_another_precision(family):
    pytest.importorskip('torchao', reason='torchao is an extra: pip install torchao')
    _, _, ours, _ = family
    add_lora(quantize_base(ours), LoraConfig(4), base_dtype=torch.bfloat16)
    assert all(type(m.weight.data) is not torch.Tensor for m in adapted(ours))
    assert ours.embed.weight.dtype==torch.bfloat16 and adapted(ours)[0].adapter.A.dtype==torch.float32
    assert torch.isfinite(ours(ids)).all()


def a_batch(): return collate_examples([Example(r.numpy().astype('int32'), torch.ones(20).numpy(), 'x') for r in ids])


def gradients(model):
    model.zero_grad(set_to_none=True)
    batch_loss(model, a_batch())[0].backward()
    return {n: p.grad.clone() for n,p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('end', [remove_lora, merge_lora])
def test_tokens_are_forgotten_with_their_adapters(family, end):
    "Later training of all weights moves all rows, and the next adapters have tokens of their own"
    _, _, ours, folder = family
    gradients(add_lora(ours, LoraConfig(4, tokens=(5,))))
    end(ours)
    assert ours.token_rows == {} and not any(p.requires_grad for p in ours.parameters())
    got, want = gradients(ours.requires_grad_(True)), gradients(load_model(folder/'base').model.eval())
    assert got.keys() == want.keys()
    for n in want: torch.testing.assert_close(got[n], want[n], atol=1e-5, rtol=1e-4)
    some = [7, int(ids[0,3])]
    got, others = gradients(add_lora(ours, LoraConfig(4, tokens=some))), [i for i in range(97) if i not in some]
    for table in ours.token_rows:
        torch.testing.assert_close(got[f'{table}.weight'][some], want[f'{table}.weight'][some], atol=1e-5, rtol=1e-4)
        assert not got[f'{table}.weight'][others].any()


def test_trained_tokens_of_a_bfloat16_base_are_taken_back(family):
    "Training leaves the table in float32; the rows remembered in bfloat16 fit it"
    _, _, ours, _ = family
    rows = [Example(r.numpy().astype('int32'), torch.ones(20).numpy(), 'x') for r in ids]
    add_lora(ours, LoraConfig(4, tokens=(int(ids[0,3]),)), base_dtype=torch.bfloat16)
    before = ours.embed.weight.detach().float().clone()
    with pytest.raises(InputError, match='weight_decay=0'): train(ours, rows, (), TrainConfig(weight_decay=0.1, dtype='float32'))
    train(ours, rows, (), TrainConfig(lr=1e-2, dtype='float32'))
    assert ours.embed.weight.dtype == torch.float32 and unmoved_tokens(ours) == []
    assert {m.weight.dtype for m in adapted(ours)} == {torch.bfloat16}
    assert torch.equal(remove_lora(ours).embed.weight, before)


def test_a_refused_call_changes_nothing(family):
    _, _, ours, _ = family
    state = lambda: [(p.requires_grad, p.dtype) for p in ours.parameters()]
    before = state()
    for cfg in (LoraConfig(targets=('no_such_map',)), LoraConfig(tokens=(5, 97))):
        with pytest.raises(InputError): add_lora(ours, cfg, base_dtype=torch.bfloat16)
        assert state() == before and not adapted(ours)
