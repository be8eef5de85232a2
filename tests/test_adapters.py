"What a run keeps: adapters to peft and back, gone on with, found with their base; cards; and what is sent to a hub on this machine"
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from toy_hub import toy_hub

from sft_nb.basics import load_json, save_json
from sft_nb.cli import main
from sft_nb.decoder import Decoder
from sft_nb.families import config_from_hf
from sft_nb.loading import load_model
from sft_nb.saving import save_model
from sft_nb.tokenizer import get_gpt2_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=50257, n_embd=16, n_layer=1, n_head=2, n_positions=128)
FAST = ['--dtype', 'float32', '--device', 'cpu', '--no-preflight', '--epochs', '2']
ids = torch.randint(0, 50257, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A base, records, and two runs that kept their adapters: beside the merged model, and alone"
    home = tmp_path_factory.mktemp('adapters')
    torch.manual_seed(7)
    save_model(home/'models/tiny', Decoder(config_from_hf(TINY)), get_gpt2_tokenizer())
    for name, word in (('toy', 'Add'), ('more', 'Take')):
        save_json(home/f'{name}.json', [dict(instruction=f'{word} {i} and {i+1}.', input='', output=f'{2*i+1}') for i in range(40)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        lora = ['--model', 'models/tiny', '--data', 'toy.json', *FAST]
        assert main(['run', *lora, '--max-new', '4', '--lora', '2', '--keep-adapter', '--name', 'both']) == 0
        assert main(['train', *lora, '--lora', '3', '--lora-root-scale', '--lora-alpha', '5', '--lora-targets', 'c_attn,mlp.c_proj',
                     '--template', 'chatml', '--no-merge', '--name', 'alone']) == 0
    return home


@pytest.fixture
def home(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def peft_logits(base, adapter, n_rows=0):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation='eager')
    if n_rows: theirs.resize_token_embeddings(n_rows, mean_resizing=False)
    with torch.no_grad(): return peft.PeftModel.from_pretrained(theirs, adapter).eval()(ids).logits


def our_logits(*name, **how):
    with torch.no_grad(): return load_model(*name, **how).model.eval()(ids)


def near(a, b): torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_a_run_keeps_its_adapter(home):
    "Beside the merged model: peft, our adapter on its base, and the merged model say the same; the base says something else"
    wanted = our_logits('runs/both/model')
    near(peft_logits('models/tiny', 'runs/both/adapter'), wanted)
    near(our_logits('runs/both/adapter'), wanted)
    near(our_logits('models/tiny', adapter='runs/both/adapter'), wanted)
    near(our_logits('runs/both/adapter', merge=False), wanted)
    assert (our_logits('models/tiny') - wanted).abs().max() > 1e-3
    auto = peft.AutoPeftModelForCausalLM.from_pretrained('runs/both/adapter', attn_implementation='eager').eval()
    with torch.no_grad(): near(auto(ids).logits, wanted)
    assert load_json('runs/both/config.json')['keep_adapter'] is True


def test_an_adapter_alone(home):
    "Nothing merged, rank-stabilised, on some maps, with two tokens that the base lacks: all of it comes back and peft agrees"
    assert sorted(p.name for p in Path('runs/alone').iterdir()) == ['adapter', 'config.json', 'log.jsonl', 'loss.png', 'receipt.json', 'terminal.log']
    loaded = load_model('runs/alone/adapter')
    assert (loaded.template.name, loaded.tokenizer.n_vocab, loaded.base) == ('chatml', 50259, 'models/tiny')
    about = load_json('runs/alone/adapter/adapter_config.json')
    assert (about['use_rslora'], about['lora_alpha'], about['r'], about['target_modules']) == (True, 5., 3, ['attn.c_attn', 'mlp.c_proj'])
    assert about['trainable_token_indices'] == [50257, 50258]
    near(peft_logits('models/tiny', 'runs/alone/adapter', 50259), our_logits('runs/alone/adapter'))


def test_every_command_takes_it(home, capsys, monkeypatch):
    for i, words in enumerate((['--model', 'runs/both/adapter'], ['--model', 'models/tiny', '--adapter', 'runs/both/adapter'])):
        assert main(['respond', *words, '--data', 'toy.json', '--part', 'test', '--out', f'answers{i}.json', '--max-new', '4', '--device', 'cpu']) == 0
    assert main(['respond', '--model', 'runs/both/model', '--data', 'toy.json', '--part', 'test', '--out', 'merged.json', '--max-new', '4', '--device', 'cpu']) == 0
    said = [[r['model_response'] for r in load_json(f'{n}.json')] for n in ('merged', 'answers0', 'answers1')]
    assert said.count(said[0]) == 3
    about = load_json('answers0.meta.json')
    assert 'runs/both/adapter' in json.dumps(about)
    assert main(['inspect', 'toy.json', '--adapter', 'runs/alone/adapter', '--rows', '1']) == 0
    assert 'chatml' in capsys.readouterr().out
    monkeypatch.setattr('builtins.input', iter(['Add 1 and 2.', '']).__next__)
    monkeypatch.setattr('sft_nb.talk._read_line', iter(['Add 1 and 2.', '']).__next__)
    assert main(['chat', '--adapter', 'runs/both/adapter', '--max-new', '2', '--device', 'cpu']) == 0


@pytest.mark.slow
def test_export_merges_it(home):
    assert main(['export', '--adapter', 'runs/both/adapter', '--to', 'merged.gguf', '--as', 'f32', '--data', 'toy.json']) == 0
    near(our_logits('merged.gguf'), our_logits('runs/both/model'))


def test_going_on_with_a_second_set(home):
    "The adapter learns on, beside the same base: its rank stays, its loss begins where it was, and peft reads the result"
    words = ['--data', 'more.json', *FAST, '--adapter', 'runs/both/adapter']
    assert main(['run', *words, '--max-new', '4', '--keep-adapter', '--name', 'further']) == 0
    about = load_json('runs/further/adapter/adapter_config.json')
    assert (about['r'], about['base_model_name_or_path']) == (2, 'models/tiny')
    wanted = our_logits('runs/further/model')
    near(peft_logits('models/tiny', 'runs/further/adapter'), wanted)
    assert (our_logits('runs/both/model') - wanted).abs().max() > 1e-3
    meta = load_json('runs/further/model/sft_nb.json')
    assert (meta['base'], meta['under'], meta['config']['lr']) == ('runs/both/adapter', 'models/tiny', 1e-3)
    assert meta['validation_loss'][1] < meta['validation_loss'][0]
    assert main(['train', '--data', 'more.json', *FAST, '--model', 'runs/alone/adapter', '--no-merge', '--name', 'alone-further']) == 0
    near(peft_logits('models/tiny', 'runs/alone-further/adapter', 50259), our_logits('runs/alone-further/adapter'))
    assert load_model('runs/alone-further/adapter').template.name == 'chatml'


@pytest.mark.slow
def test_the_settings_of_a_run_with_an_adapter_given_back(home):
    words = ['train', '--data', 'more.json', *FAST, '--adapter', 'runs/both/adapter']
    assert main([*words, '--name', 'once']) == 0 and main(['train', '--config', 'runs/once/config.json', '--name', 'again']) == 0
    assert Path('runs/again/model/model.safetensors').read_bytes() == Path('runs/once/model/model.safetensors').read_bytes()


@pytest.mark.slow
def test_a_4_bit_run_goes_on_with_an_adapter(home):
    pytest.importorskip('torchao', reason='torchao is an extra: pip install torchao')
    assert main(['train', '--data', 'more.json', *FAST, '--adapter', 'runs/both/adapter', '--lora-4bit', '--name', 'four']) == 0
    near(our_logits('runs/four/model'), peft_logits('models/tiny', 'runs/four/adapter'))


def test_the_base_of_pefts_adapter_is_found(home, tmp_path, monkeypatch):
    "By a path from here, by one from the adapter's folder or above, by an absolute one, and by a name on the hub"
    theirs = transformers.AutoModelForCausalLM.from_pretrained('models/tiny', attn_implementation='eager')
    cfg = peft.LoraConfig(r=4, lora_alpha=6, target_modules=['c_attn'], init_lora_weights=False, fan_in_fan_out=True, task_type='CAUSAL_LM')
    theirs = peft.get_peft_model(theirs, cfg).eval()
    theirs.save_pretrained(home/'by/peft')
    with torch.no_grad(): wanted = theirs(ids).logits
    assert load_json('by/peft/adapter_config.json')['base_model_name_or_path'] == 'models/tiny'
    near(our_logits('by/peft'), wanted)
    transformers.AutoTokenizer.from_pretrained('models/tiny').save_pretrained('by/peft')
    assert load_model('by/peft').tokenizer.encode('Hi there') == get_gpt2_tokenizer().encode('Hi there')
    monkeypatch.chdir(tmp_path)
    near(our_logits(home/'by/peft'), wanted)
    shutil.copytree(home/'by/peft', tmp_path/'peft')
    shutil.copytree(home/'models/tiny', tmp_path/'peft/base')
    for base in (str(home/'models/tiny'), 'base'):
        save_json(tmp_path/'peft/adapter_config.json', load_json(tmp_path/'peft/adapter_config.json') | dict(base_model_name_or_path=base, revision=None))
        near(our_logits('peft'), wanted)


@pytest.mark.slow
def test_an_adapter_and_its_base_come_from_the_hub(home, tmp_path, monkeypatch):
    thin = bad_folder(home, 'thin', dict(base_model_name_or_path='own/tiny'))
    monkeypatch.chdir(tmp_path)
    wanted = our_logits(home/'runs/both/adapter')
    torch.save(ids, 'ids')
    code = "import sys, torch; from sft_nb.loading import load_model; torch.save([load_model(n).model(torch.load('ids')).detach() for n in sys.argv[1:]], 'out')"
    with toy_hub({'own/tiny': home/'models/tiny', 'own/thin': thin}, tmp_path/'hf') as (env, asked):
        done = subprocess.run([sys.executable, '-c', code, str(thin), 'own/thin'], env=os.environ | {'PYTHONPATH': str(ROOT)} | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for got in torch.load('out'): near(got, wanted)
    assert any('adapter_model.safetensors' in path for path in asked)


def bad_folder(home, name, change, source='runs/both/adapter'):
    folder = home/'bad'/name
    shutil.copytree(home/source, folder, dirs_exist_ok=True)
    path = folder/'adapter_config.json'
    save_json(path, load_json(path) | change)
    return folder


BAD = {
    'gone': (dict(base_model_name_or_path='nowhere/at/all'), "its model 'nowhere/at/all' was not loaded"),
    'nameless': (dict(base_model_name_or_path=''), 'names no model that the adapter belongs to'),
    'dora': (dict(use_dora=True), 'does not compute use_dora'),
    'ia3': (dict(peft_type='IA3'), "peft_type is not 'LORA', got 'IA3'"),
    'patterns': (dict(rank_pattern={'c_attn': 3}), 'does not compute rank_pattern'),
    'rank': (dict(r=5), 'load the model the adapter was made for')}


@pytest.mark.parametrize('name', BAD)
def test_what_cannot_be_an_adapter_is_one_line(name, home, capsys):
    change, why = BAD[name]
    folder = bad_folder(home, name, change)
    for words in (['--adapter', str(folder)], ['--model', str(folder)]):
        assert main(['train', '--data', 'toy.json', *FAST, *words, '--name', 'never']) == 2
        said = capsys.readouterr().err
        assert said.count('\n') == 1 and why in said, said
    assert not Path('runs/never').exists()


def test_contradictions_are_one_line(home, capsys):
    whole = bad_folder(home, 'whole', {})
    shutil.copy('models/tiny/model.safetensors', whole)
    torch.manual_seed(3)
    save_model('models/wide', Decoder(config_from_hf(TINY | dict(n_embd=32))), get_gpt2_tokenizer()) if not Path('models/wide').exists() else None
    train = ['train', '--data', 'toy.json', *FAST, '--name', 'never']
    for words, why in (
        (['--adapter', 'runs/both/model'], 'holds a whole model and no adapter_config.json'),
        (['--adapter', 'runs/bth/adapter'], 'no adapter_config.json there'),
        (['--adapter', 'runs/both'], 'no adapter_config.json there'),
        (['--model', 'models/wide', '--adapter', 'runs/both/adapter'], 'load the model the adapter was made for'),
        (['--model', 'runs/both/model', '--adapter', 'runs/both/adapter'], 'is merged into runs/both/model already'),
        (['--model', 'runs/alone/adapter', '--adapter', 'runs/both/adapter'], 'a second adapter'),
        (['--model', str(whole)], 'holds an adapter and a whole model'),
        (['--adapter', 'runs/both/adapter', '--lora', '4'], 'brings its own rank, got --lora 4'),
        (['--adapter', 'runs/both/adapter', '--template', 'chatml', '--force-template'], 'needs 2 tokens that the adapter'),
        (['--adapter', 'runs/alone/adapter', '--weight-decay', '0.1'], 'of which 2 rows are trained here'),
        (['--model', 'models/tiny', '--keep-adapter'], '--keep-adapter: there is no adapter to keep'),
        (['--model', 'models/tiny', '--no-merge'], '--no-merge: there is no adapter to keep')):
        assert main([*train, *words]) == 2, words
        said = capsys.readouterr().err
        assert said.count('\n') == 1 and why in said, (words, said)
    assert not Path('runs/never').exists()


def code_of(card): return re.search(r'```python\n(.*?)```', card.text, re.S)[1]


def test_cards_are_written_and_true(home):
    "Beside model and adapter, with what the run wrote down; the code in them runs as it stands"
    whole, thin, alone = (ModelCard.load(f'runs/{f}/README.md') for f in ('both/model', 'both/adapter', 'alone/adapter'))
    for card, library in ((whole, 'transformers'), (thin, 'peft'), (alone, 'peft')):
        told = card.data
        assert (told.pipeline_tag, told.library_name, told.datasets) == ('text-generation', library, ['toy.json'])
        assert 'sft_nb' in told.tags and ('lora' in told.tags) == (library == 'peft')
        assert str(home) not in card.content
    report, log = load_json('runs/both/report.json'), load_json('runs/both/model/sft_nb.json')
    before, after = log['validation_loss']
    assert f'{before:.4f} before, {after:.4f} after' in whole.text
    for name, part in report['metrics'].items(): assert f'| {name} | ' in whole.text, name
    assert '95 % interval' in whole.text and 'have not been scored' in alone.text
    assert '| lr | 0.001 |' in whole.text and '| training | 34 |' in whole.text and '`chatml`' in alone.text


def test_the_licence_is_inherited(home, monkeypatch):
    "Through a chain of two runs: what the first base's card says holds for the last model"
    Path('models/tiny/README.md').write_text('---\nlicense: mit\nlanguage: fr\nbase_model: own/first\n---\n')
    try: assert main(['train', '--data', 'toy.json', *FAST, '--model', 'models/tiny', '--name', 'licensed']) == 0
    finally: Path('models/tiny/README.md').unlink()
    assert main(['train', '--data', 'more.json', *FAST, '--model', 'runs/licensed/model', '--name', 'twice']) == 0
    for name in ('licensed', 'twice'):
        told = ModelCard.load(f'runs/{name}/model/README.md').data
        assert (told.license, told.language, told.base_model) == ('mit', 'fr', 'own/first')


@pytest.mark.slow
def test_the_code_in_a_card_runs(home, capsys, monkeypatch):
    for name in ('both/model', 'both/adapter', 'alone/adapter'):
        monkeypatch.chdir(home/'runs'/name.split('/')[0])
        code = code_of(ModelCard.load(home/'runs'/name/'README.md')).replace("'tiny'", repr(str(home/'models/tiny')))
        exec(code.replace('max_new_tokens=128', 'max_new_tokens=4'), {})
        assert capsys.readouterr().out.strip()


def push(*words, cwd, env): return subprocess.run([sys.executable, '-m', 'sft_nb.cli', 'push', *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300,
                                                  env={k: v for k, v in os.environ.items() if k != 'HF_TOKEN'} | {'PYTHONPATH': str(ROOT)} | env)


def one_line(done, why):
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and why in done.stderr, done.stdout + done.stderr


def test_push(home, tmp_path):
    "Named with sizes, private, whole, and read again from there; refused in one line"
    repos, sent = {}, tmp_path/'hub'
    with toy_hub(repos, tmp_path/'hf', store=sent) as (env, asked):
        env = env | {'HF_TOKEN': 'hf_good'}
        done = push('me/mine', '--model', 'runs/both/model', cwd=home, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        size = Path('runs/both/model/model.safetensors').stat().st_size
        assert re.search(rf'model\.safetensors +{size:,} bytes', done.stdout) and 'private' in done.stdout
        assert load_json(sent/'me/mine.about.json')['private'] is True
        files = {p.name: p.read_bytes() for p in (sent/'me/mine').iterdir()}
        assert files == {p.name: p.read_bytes() for p in Path('runs/both/model').iterdir()}
        assert not any('hf_good' in path for path in asked)
        done = push('thin', '--model', 'runs/both/adapter', '--public', cwd=home, env=env)
        assert done.returncode == 0 and 'is a folder here' in done.stdout, done.stderr[-3000:]
        assert load_json(sent/'me/thin.about.json')['private'] is False
        one_line(push('thin', '--model', 'runs/both/adapter', cwd=home, env=env), 'me/thin is public already')
        one_line(push('other/mine', '--model', 'runs/both/model', cwd=home, env=env), 'the hub says 403')
        one_line(push('me/mine', '--model', 'runs/both/model', cwd=home, env=env | {'HF_TOKEN': 'hf_bad'}), 'the hub says 401')
        before = len(asked)
        done = push('me/dry', '--model', 'runs/both/model', '--dry-run', cwd=home, env=env | {'HF_TOKEN': ''})
        assert done.returncode == 0 and 'nothing was sent' in done.stdout and len(asked) == before
        for words, why in ((['me/mine'], 'no such folder'), (['me/mine', '--model', 'runs/both'], 'is no model'), (['me/my model', '--model', 'runs/both/model'], 'no name of the hub')):
            one_line(push(*words, cwd=home, env=env), why)
        one_line(push('me/mine', '--model', 'runs/both/model', cwd=home, env=env | {'HF_TOKEN': ''}), 'no token')
        assert len(asked) == before
    one_line(push('me/mine', '--model', 'runs/both/model', cwd=home, env=env), 'check the network')
