"A model goes out as a GGUF file: every family comes back, other readers say the same, and what is wrong leaves no file"
import json, os, stat, subprocess, sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close

from sft_nb.adapters import save_adapter
from sft_nb.basics import InputError
from sft_nb.choices import LoraConfig
from sft_nb.data import as_records
from sft_nb.choices import EXPORT_KINDS
from sft_nb.export import gguf_settings, write_gguf
from sft_nb.families import FAMILIES, hf_tensors
from sft_nb.gguf_file import open_gguf, read_gguf
from sft_nb.loading import load_model
from sft_nb.lora import add_lora
from sft_nb.proof import export_model
from sft_nb.saving import save_model
from sft_nb.shelf import get_template
from sft_nb.tokenizer import JsonTokenizer
from test_model import V, gguf_model, ids_of, random_model

ROOT = Path(__file__).resolve().parent.parent


def toy_tokenizer(n_ids=V, end="<e>"):
    "Bytes, as many as there is room for, one merge of two and an end"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (not c.isascii(), c))[:n_ids-3]
    tok = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, 'is'])}, [('i', 's')]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens(["<s>", end])
    return JsonTokenizer(tok, "toy", end, config=dict(bos_token='<s>'))


RECORDS = as_records([dict(instruction=f'Say {n}.', input='', output=f'It is {n}.') for n in range(4, 10)])


def toy_folder(family, tmp_path, tokenizer=None, **change):
    "A small model of a family that GGUF can hold, in a folder"
    tokenizer = tokenizer or toy_tokenizer()
    hf = gguf_model('gemma3' if family=='gemma3_text' else family, **dict(vocab_size=tokenizer.n_vocab) | change)
    if family=='gpt2': hf.config.activation_function = 'gelu_new'
    for c in (hf.config, hf.generation_config): c.bos_token_id, c.eos_token_id = tokenizer.token_id('<s>'), tokenizer.eos_id
    hf.save_pretrained(tmp_path/'hf')
    model = load_model(tmp_path/'hf').model
    return save_model(tmp_path/'model', model, tokenizer, get_template('alpaca')), model


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_comes_back(family, seed, tmp_path):
    "In 32 bits to the last bit, unless a scale of the queries has to go into the weights; or it is refused by name"
    random_model(family, seed).save_pretrained(tmp_path/'hf')
    model = load_model(tmp_path/'hf').model
    try: settings = gguf_settings(model.cfg, 'f32', toy_tokenizer())
    except InputError as e:
        assert any(why in str(e) for why in ('activation', 'a head output.weight', 'a bias of', 'rope scaling')), e
        return
    write_gguf(tmp_path/'m.gguf', model, settings, 'f32')
    again = load_model(tmp_path/'m.gguf').model
    with torch.no_grad(): ours, theirs = model(ids_of(2, 30)), again(ids_of(2, 30))
    if abs(again.cfg.scale/model.cfg.scale - 1)<1e-6:
        assert torch.equal(ours, theirs)
        if not family.startswith('gemma'): # whose norms are stored as 1 + w
            for (n, p), (m, q) in zip(hf_tensors(model), hf_tensors(again), strict=True): assert n==m and torch.equal(p, q), n
    else: assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('family', ['gpt2', 'llama', 'mistral', 'qwen2', 'qwen3', 'phi3', 'gemma', 'gemma2', 'gemma3_text'])
def test_every_kind_is_proved(family, tmp_path):
    folder, model = toy_folder(family, tmp_path)
    for kind in EXPORT_KINDS:
        proof = export_model(folder, tmp_path/f'{kind}.gguf', kind, RECORDS, n_answers=2, say=str)
        if kind=='f32': assert (proof.same_best, proof.same_answers)==(1, 2) and proof.largest<1e-5
        if kind in ('f16', 'bf16'): assert proof.kl<1e-2
    kept = json.loads((tmp_path/'export.json').read_text())
    assert sorted(kept)==sorted(f'{k}.gguf' for k in EXPORT_KINDS) and kept['q8_0.gguf']['kl']<.1


TAKEN_FOR_GRANTED = { # by the reader in transformers, which does not look for these settings
    'llama': {}, 'qwen2': {}, 'qwen3': dict(head_dim=128),
    'gemma2': dict(head_dim=256, query_pre_attn_scalar=256, attn_logit_softcapping=50., final_logit_softcapping=30.),
    'gemma3_text': dict(head_dim=256, query_pre_attn_scalar=256, sliding_window=512)}

@pytest.mark.parametrize('family', TAKEN_FOR_GRANTED)
def test_transformers_reads_it(family, tmp_path):
    "Another reader of GGUF files makes the same model of ours"
    _, model = toy_folder(family, tmp_path, **TAKEN_FOR_GRANTED[family])
    write_gguf(tmp_path/'m.gguf', model, gguf_settings(model.cfg, 'f32', toy_tokenizer()), 'f32')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file='m.gguf', dtype=torch.float32, attn_implementation='eager').eval()
    with torch.no_grad(): assert_close(theirs(ids_of(2, 20)).logits, model(ids_of(2, 20)), atol=1e-4, rtol=0)


def test_the_file_tells_its_origin(tmp_path):
    _, model = toy_folder('llama', tmp_path)
    about = dict(name='mine', license='apache-2.0', base='toys/tiny', data='/home/me/my.json')
    write_gguf(tmp_path/'m.gguf', model, gguf_settings(model.cfg, 'q8_0', toy_tokenizer(), about=about), 'q8_0')
    get, tensors = open_gguf(tmp_path/'m.gguf')
    assert [get(f'general.{k}') for k in ('name', 'license', 'base_model.0.name', 'dataset.0.name')]==['mine', 'apache-2.0', 'toys/tiny', 'my.json']
    assert get('general.file_type')==7 and tensors['blk.0.ffn_up.weight'].tensor_type.name=='Q8_0'
    assert (read_gguf(tmp_path/'m.gguf').tokenizer.encode('It is 7.'))==toy_tokenizer().encode('It is 7.')


def run(*words, limit=None, seconds=300):
    code = 'import resource, sys\n' + (f'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n' if limit else '')
    code += f'from sft_nb.cli import main\nsys.exit(main({list(map(str, words))!r}))'
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=seconds, env=os.environ | {'PYTHONPATH': str(ROOT)})


def test_bad_input_ends_in_one_line(tmp_path):
    folder, _ = toy_folder('llama', tmp_path)
    bare = save_model(tmp_path/'bare', load_model(folder).model)
    (tmp_path/'empty').mkdir()
    (tmp_path/'there.gguf').write_text('x')
    before = sorted(p.name for p in tmp_path.iterdir())
    for words, why in (((folder, '--to', tmp_path/'a.gguf', '--as', 'q8'), "did you mean 'q8_0'"), ((folder, '--to', tmp_path/'a.gguf', '--as', 'q4_k_m'), "'q4_k_m' is read but cannot be written"), ((folder, '--to', tmp_path/'there.gguf'), 'exists'),
                       ((tmp_path/'empty', '--to', tmp_path/'a.gguf'), 'config.json'), ((bare, '--to', tmp_path/'a.gguf'), 'tokenizer'),
                       ((folder, '--to', tmp_path/'no'/'a.gguf'), 'no such folder')):
        done = run('export', *words)
        assert done.returncode==2 and done.stderr.count('\n')==1 and why in done.stderr, (words, done.stderr)
    full = run('export', folder, '--to', tmp_path/'a.gguf', '--as', 'f32', limit=100_000)
    assert full.returncode==2 and full.stderr.count('\n')==1, full.stderr
    assert sorted(p.name for p in tmp_path.iterdir())==before


@pytest.mark.skipif(os.name!='posix', reason='rights mean little there')
@pytest.mark.parametrize('umask', [0o022, 0o077, 0o027])
def test_files_have_the_rights_that_the_user_gives(umask, tmp_path):
    "Of a saved model, its adapter and an exported file: nothing is more open or more shut than a file that the user makes"
    before = os.umask(umask)
    try:
        folder, model = toy_folder('llama', tmp_path/'m')
        add_lora(model, LoraConfig(2))
        save_adapter(tmp_path/'adapter', model)
        export_model(folder, tmp_path/'m.gguf', 'q8_0', RECORDS, n_answers=1, say=str)
    finally: os.umask(before)
    made = [folder, *folder.rglob('*'), tmp_path/'adapter', *(tmp_path/'adapter').rglob('*'), tmp_path/'m.gguf', tmp_path/'export.json']
    rights = {p.name: stat.S_IMODE(p.stat().st_mode) for p in made}
    assert 'model.safetensors' in rights and 'adapter_model.safetensors' in rights
    assert rights=={p.name: (0o777 if p.is_dir() else 0o666) & ~umask for p in made}


def test_a_file_tells_the_licence_of_its_base(tmp_path):
    "The saved folder's own licence, else that of the folder or file it was tuned from"
    folder, _ = toy_folder('llama', tmp_path)
    got = load_model(folder)
    (tmp_path/'hf'/'README.md').write_text('---\nlanguage: en\nlicense: gemma\n---\n# A model\n')
    def told(name, **meta):
        tuned = save_model(tmp_path/name, got.model, got.tokenizer, got.template, meta)
        export_model(tuned, tmp_path/f'{name}.gguf', 'q8_0', RECORDS, n_answers=1, say=str)
        get, _ = open_gguf(tmp_path/f'{name}.gguf')
        return [get(f'general.{k}') for k in ('license', 'base_model.0.name', 'base_model.0.repo_url', 'dataset.0.name', 'dataset.0.repo_url', 'size_label')]
    assert told('a', base=str(tmp_path/'hf'), data='hub:toys/sums')==['gemma', 'hf', None, 'toys/sums', 'https://huggingface.co/datasets/toys/sums', '75K']
    assert told('b', base=str(tmp_path/'a.gguf'), data='x/my.json')[:4]==['gemma', 'a.gguf', None, 'my.json']
    assert told('c', base='smollm2-135m-instruct')[:3]==['apache-2.0', 'smollm2-135m-instruct', None]
    assert told('d', base='toys/tiny', license='mit')[:3]==['mit', 'toys/tiny', 'https://huggingface.co/toys/tiny']


@pytest.mark.slow
@pytest.mark.parametrize('family', ['gpt2', 'llama', 'mistral', 'qwen2', 'qwen3', 'phi3', 'gemma', 'gemma2', 'gemma3_text'])
def test_llama_cpp_computes_the_same(family, tmp_path):
    "The logits of a small model of each family in 32 bits, as far as llama.cpp's cache of 16 bits allows"
    llama = pytest.importorskip('llama_cpp', reason='llama-cpp-python is not installed: pip install llama-cpp-python')
    folder, model = toy_folder(family, tmp_path, toy_tokenizer(259), **dict(sliding_window=None) if family=='phi3' else {})
    export_model(folder, tmp_path/'m.gguf', 'f32', RECORDS, n_answers=1, say=str)
    theirs = llama.Llama(str(tmp_path/'m.gguf'), n_ctx=64, logits_all=True, verbose=False)
    ids = ids_of(1, 40)
    theirs.eval(ids[0].tolist())
    logits = torch.from_numpy(theirs.scores[:40].copy())
    theirs.close()
    with torch.no_grad(): assert_close(logits, model(ids)[0], atol=1e-2, rtol=0)


@pytest.mark.slow
def test_llama_cpp_gives_the_same_answers(tmp_path):
    "The default model in 16 bits, answered by llama.cpp: ids of prompts and greedy answers"
    llama = pytest.importorskip('llama_cpp', reason='llama-cpp-python is not installed: pip install llama-cpp-python')
    export_model(None, tmp_path/'m.gguf', 'f16', n_answers=2, say=str)
    got = load_model(tmp_path/'m.gguf')
    theirs = llama.Llama(str(tmp_path/'m.gguf'), n_ctx=512, verbose=False)
    for question in ('What is the capital of France?', 'Write 3 words that rhyme with "blue".', 'Übersetze: good night'):
        text = f'<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n'
        ids = got.tokenizer.encode_control(text)
        assert theirs.tokenize(text.encode(), add_bos=False, special=True)==ids
        ours, new = list(ids), []
        theirs.reset()
        for i in theirs.generate(ids, temp=0., top_k=1, repeat_penalty=1.):
            new.append(i)
            if len(new)==24 or i==theirs.token_eos(): break
        with torch.no_grad():
            for _ in new: ours.append(int(got.model(torch.tensor([ours]))[0,-1].argmax()))
        assert ours[len(ids):]==new, question


ADAPTED = { # linear maps that stand in a file under other names, in another order, or fused
    'llama': ['q_proj', 'k_proj', 'down_proj'], 'qwen2': ['k_proj', 'o_proj', 'gate_proj'], 'phi3': ['qkv_proj', 'gate_up_proj'],
    'gemma2': ['q_proj', 'v_proj', 'up_proj'], 'gpt2': ['c_attn', 'mlp.c_proj']}


@pytest.mark.parametrize('family', ADAPTED)
def test_an_adapter_beside_its_base_is_the_merged_file(family, tmp_path):
    "Every tensor of the exported base, plus alpha/r times B and A of the exported adapter, is that of the exported merged model"
    import numpy as np
    from torch import nn
    from sft_nb.adapter_file import export_adapter
    from sft_nb.adapters import save_adapter
    from sft_nb.choices import LoraConfig
    from sft_nb.lora import adapted, add_lora
    folder, model = toy_folder(family, tmp_path)
    add_lora(model, LoraConfig(3, 5, targets=tuple(ADAPTED[family]), root_scale=True))
    for m in adapted(model): nn.init.normal_(m.adapter.B, std=.2)
    save_adapter(tmp_path/'thin', model, base=str(folder))
    said = []
    export_adapter(tmp_path/'thin', tmp_path/'thin.gguf', 'f32', say=said.append)
    assert 'llama-cli -m BASE.gguf --lora' in said[-1]
    for name, how in (('base', {}), ('merged', dict(adapter=tmp_path/'thin'))):
        loaded = load_model(folder, **how)
        write_gguf(tmp_path/f'{name}.gguf', loaded.model, gguf_settings(loaded.cfg, 'f32', toy_tokenizer()), 'f32')
    (_, base), (_, merged), (get, thin) = (open_gguf(tmp_path/f'{n}.gguf') for n in ('base', 'merged', 'thin'))
    scale, seen = get('adapter.lora.alpha')/3, 0
    for name, t in base.items():
        wanted, got = (torch.from_numpy(np.array(x[name].data)) for x in (merged, base))
        if f'{name}.lora_a' in thin:
            A, B = (torch.from_numpy(np.array(thin[f'{name}.lora_{k}'].data)) for k in 'ab')
            got, seen = got + scale*B @ A, seen + 1
            assert (B @ A).abs().max() > 1e-2
        assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert 2*seen == len(thin) and seen >= 2


def test_what_an_adapter_file_cannot_hold_is_one_line(tmp_path):
    from sft_nb.adapters import save_adapter
    from sft_nb.choices import LoraConfig
    from sft_nb.lora import add_lora
    folder, model = toy_folder('llama', tmp_path)
    save_adapter(tmp_path/'rows', add_lora(model, LoraConfig(2, tokens=(5,))), base=str(folder))
    thin = save_adapter(tmp_path/'thin', add_lora(load_model(folder).model, LoraConfig(2)), base=str(folder))
    for words, why in (((tmp_path/'rows',), 'trains rows of the embedding'), ((thin, '--as', 'q8_0'), "unknown value 'q8_0'"),
                       ((thin, '--ollama'), '--ollama is for a whole model'), ((thin, '--data', 'x.json'), '--data is for a whole model')):
        done = run('export', *words, '--to', tmp_path/'a.gguf')
        assert done.returncode==2 and done.stderr.count('\n')==1 and why in done.stderr, (words, done.stderr)
    assert not (tmp_path/'a.gguf').exists()


@pytest.mark.slow
def test_llama_cpp_lays_an_adapter_over_its_base(tmp_path):
    "The default model with an adapter, in 16 bits: llama.cpp with base and --lora says what it says with the merged file"
    llama = pytest.importorskip('llama_cpp', reason='llama-cpp-python is not installed: pip install llama-cpp-python')
    from torch import nn
    from sft_nb.adapter_file import export_adapter
    from sft_nb.adapters import save_adapter
    from sft_nb.choices import LoraConfig
    from sft_nb.lora import adapted, add_lora
    model = add_lora(load_model().model, LoraConfig(4, 8))
    torch.manual_seed(3)
    for m in adapted(model): nn.init.normal_(m.adapter.B, std=.1)
    save_adapter(tmp_path/'thin', model, base='smollm2-135m-instruct')
    export_adapter(tmp_path/'thin', tmp_path/'thin.gguf', 'f32', say=str)
    for name, how in (('base', {}), ('merged', dict(adapter=tmp_path/'thin'))): export_model(None, tmp_path/f'{name}.gguf', 'f32', n_answers=1, say=str, **how)
    text = '<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n'

    def answer(name, lora=None):
        theirs = llama.Llama(str(tmp_path/f'{name}.gguf'), n_ctx=256, verbose=False, lora_path=lora and str(lora))
        ids = theirs.tokenize(text.encode(), add_bos=False, special=True)
        new = []
        for i in theirs.generate(ids, temp=0., top_k=1, repeat_penalty=1.):
            new.append(i)
            if len(new)==24: return new

    wanted = answer('merged')
    assert answer('base', tmp_path/'thin.gguf')==wanted and answer('base')!=wanted


LLAMA_ANSWERS = '''
import json, sys
from llama_cpp import Llama
file, asked, to, n_new = sys.argv[1:]
model, told = Llama(file, n_ctx=768, n_threads=1, verbose=False), []
for text, stops in json.load(open(asked)):
    ids, new = model.tokenize(text.encode(), add_bos=False, special=True), []
    model.reset()
    for i in model.generate(ids, temp=0., top_k=1, repeat_penalty=1.):
        new.append(i)
        if len(new)==int(n_new) or i in stops: break
    told.append([ids, new])
json.dump(told, open(to, 'w'))
'''


def gap_where_they_part(model, prompt, ours, theirs):
    "How far the two best logits of our model are apart where another answer leaves ours, in parts of the larger, and whether it took one of the two"
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a!=b), None)
    assert at is not None, f'one answer ends where the other goes on: {ours}, {theirs}'
    with torch.no_grad(): best = model(torch.tensor([prompt + ours[:at]]))[0,-1].topk(2)
    (first, second), ids = best.values.tolist(), best.indices.tolist()
    return (first - second)/abs(first), set(ids)=={ours[at], theirs[at]}


@pytest.mark.slow
def test_a_tuned_model_answers_the_same_everywhere(tmp_path):
    """The default model, tuned by `sft_nb run --export f16`: 50 prompts have the same ids, and their greedy answers are ours in transformers and in llama.cpp.
    llama.cpp rounds inputs and its cache to 11 binary digits: in at most two rows may it take the second of two logits that are closer than that"""
    from sft_nb.choices import Stops
    from sft_nb.generation import generate
    from sft_nb.readers import default_data_file, load_records
    from sft_nb.rows import encode_prompt
    from sft_nb.sampling import default_stop_ids
    from sft_nb.split import split_records
    python = os.environ.get('SFT_NB_LLAMA_PYTHON', sys.executable)
    if subprocess.run([python, '-c', 'import llama_cpp'], capture_output=True).returncode:
        pytest.skip('llama-cpp-python is not installed; set SFT_NB_LLAMA_PYTHON to a python that has it')
    n_new, out = 32, tmp_path/'tuned'
    done = run('run', '--steps', 6, '--max-new', 4, '--out', out, '--export', 'f16', seconds=3000)
    assert done.returncode==0, done.stderr
    file = out/'model-f16.gguf'
    got, saved = load_model(file), load_model(out/'model')
    weights = [(a - b).abs().max().item() for a, b in zip(saved.model.parameters(), load_model().model.parameters())]
    assert max(weights) > 1e-5                             # it is a tuned one
    prompts = [list(encode_prompt(r, saved.template, got.tokenizer)) for r in split_records(load_records(default_data_file())).test[:50]]
    stops = set(default_stop_ids(got.model, got.tokenizer, saved.template))
    ours = [list(a.ids) for a in generate(got.model.eval(), got.tokenizer, prompts, until=Stops(n_new, ids=tuple(stops)))]
    ours = [a[:-1] if a and a[-1] in stops else a for a in ours]
    assert sum(map(len, ours)) > 200

    def parted(theirs, bound):
        "Rows that part, each at a near tie"
        rows = [(p, a, b) for p, a, b in zip(prompts, ours, theirs, strict=True) if a!=b]
        for p, a, b in rows:
            gap, is_second = gap_where_they_part(got.model, p, [*a, saved.tokenizer.eos_id], [*b, saved.tokenizer.eos_id])
            print(f'parted: the best two logits differ by {gap:.2g} of the larger')
            assert is_second and gap <= bound, (gap, a, b)
        return len(rows)

    texts = [got.tokenizer.decode(p) for p in prompts]
    (tmp_path/'asked.json').write_text(json.dumps([[text, sorted(stops)] for text in texts]))
    subprocess.run([python, '-c', LLAMA_ANSWERS, file, tmp_path/'asked.json', tmp_path/'told.json', str(n_new)], check=True, timeout=3000,
                   env={k: v for k, v in os.environ.items() if k!='PYTHONPATH'})
    told = json.loads((tmp_path/'told.json').read_text())
    assert [ids for ids, _ in told]==prompts
    def ended(answer): return answer[:-1] if answer and answer[-1] in stops else answer
    assert parted([ended(new) for _, new in told], 2**-10) <= 2

    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file=file.name, dtype=torch.float32).eval()
    reader = transformers.AutoTokenizer.from_pretrained(out/'model')
    assert [reader(text, add_special_tokens=False).input_ids for text in texts]==prompts
    said = []
    for prompt in prompts:
        ids = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=n_new, do_sample=False,
                              eos_token_id=sorted(stops), pad_token_id=saved.tokenizer.eos_id)
        said.append(ended(ids[0,len(prompt):].tolist()))
    assert parted(said, 2**-20) <= 1                       # both compute in 32 bits
