"`sft_nb evaluate`: lm-eval asks our engine and transformers the same, offline, from a file; where lm-eval is absent, only that it is named."
import importlib.util
import json
import os

import pytest
import torch
from test_cli import ROOT, complaint, sft_nb # noqa: F401

HERE = importlib.util.find_spec('lm_eval') is not None
TASK = '''task: {name}
dataset_path: json
dataset_kwargs: {{data_files: trees.jsonl}}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
'''
CHOICE = 'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\nmetric_list: [{metric: acc}]'
WORDS = 'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]'


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Two random models of chats, and two tasks that need no network"
    from sft_nb.decoder import Decoder
    from sft_nb.families import config_from_hf
    from sft_nb.saving import save_model
    from sft_nb.shelf import get_template
    from sft_nb.tokenizer import gpt2_as_json
    path = tmp_path_factory.mktemp('tasks')
    gpt2 = gpt2_as_json(['<|im_start|>', '<|im_end|>'])
    for seed in (5, 6):
        torch.manual_seed(seed)
        model = Decoder(config_from_hf({'model_type': 'gpt2', 'vocab_size': gpt2.n_vocab, 'n_embd': 32, 'n_layer': 2, 'n_head': 2, 'n_positions': 160}))
        for p in model.parameters():
            if p.dim()==2: torch.nn.init.normal_(p, std=.2)
        save_model(path/f'model-{seed}', model, gpt2, get_template('chatml'))
    rows = [{'question': f'Which tree is number {i}?', 'choices': ['oak', 'elm', 'fir'], 'answer': i%3} for i in range(12)]
    (path/'trees.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (path/'trees.yaml').write_text(TASK.format(name='trees', kind='multiple_choice', more=CHOICE))
    (path/'words.yaml').write_text(TASK.format(name='words', kind='generate_until', more=WORDS))
    return path


@pytest.mark.skipif(HERE, reason='lm-eval is installed')
def test_the_extra_is_named_where_it_is_missing(home):
    assert "pip install 'sft_nb[harness]'" in complaint(sft_nb('evaluate', 'model-5', '--tasks', 'trees.yaml', cwd=home))


def test_what_makes_no_sense_is_one_line(home):
    assert "two models, got 'a' and --model 'b'" in complaint(sft_nb('evaluate', 'a', '--model', 'b', cwd=home))
    assert 'through must be one of server, hf' in complaint(sft_nb('evaluate', 'model-5', '--tasks', 'trees.yaml', '--through', 'x', cwd=home))


@pytest.mark.skipif(not HERE, reason='lm-eval is not installed')
def test_our_engine_and_transformers_get_the_same_scores(home):
    tasks = ['--tasks', 'trees.yaml,words.yaml', '--quiet']
    for words in (['--out', 'ours'], ['--out', 'theirs', '--through', 'hf']):
        done = sft_nb('evaluate', 'model-5', *tasks, *words, cwd=home, timeout=600)
        assert done.returncode==0, done.stderr[-2000:]
    ours, theirs = (json.loads((home/name/'harness.json').read_text())['scores'] for name in ('ours', 'theirs'))
    assert ours==theirs and len(ours)==2 and {len(s['each']) for s in ours}=={12}


@pytest.mark.skipif(not HERE, reason='lm-eval is not installed')
def test_probabilities_and_answers_are_those_of_transformers(home, monkeypatch):
    import lm_eval
    from sft_nb.choices import Harness, JobConfig
    from sft_nb.harness import _saved, _served
    monkeypatch.chdir(home)
    cfg, found = JobConfig(model='model-5'), {}
    for name, lend, chat in (('ours', _served, True), ('theirs', _saved, True), ('plain', _served, False)):
        with lend(cfg, Harness(chat=chat), lambda line: None) as (kind, words):
            found[name] = lm_eval.simple_evaluate(kind, words, tasks=[str(home/'trees.yaml'), str(home/'words.yaml')], apply_chat_template=chat, device='cpu', bootstrap_iters=0)['samples']
    for task in ('trees', 'words'):
        for one, other, plain in zip(*(found[name][task] for name in ('ours', 'theirs', 'plain'))):
            assert one['arguments']==other['arguments']!=plain['arguments']
            if task=='words': assert one['resps']==other['resps']
            else: assert [p for p, _ in one['filtered_resps']]==pytest.approx([p for p, _ in other['filtered_resps']], rel=1e-5)


@pytest.mark.skipif(not HERE, reason='lm-eval is not installed')
def test_before_and_after_and_what_needs_a_hub(home):
    first = sft_nb('evaluate', 'model-5', '--tasks', 'trees.yaml', '--out', 'before', cwd=home, timeout=600)
    assert first.returncode==0 and '| trees | acc | 12 |' in first.stdout, first.stderr[-2000:]
    done = sft_nb('evaluate', 'model-6', '--tasks', 'trees.yaml', '--before', 'before', '--limit', '12', cwd=home, timeout=600)
    assert done.returncode==0 and '| before | score | change |' in done.stdout, done.stderr[-2000:]
    assert ' to ' in (home/'before/harness.md').read_text()
    os.environ['HF_HUB_OFFLINE'] = '1'
    far = sft_nb('evaluate', 'model-5', '--tasks', 'arc_easy', cwd=home, timeout=600)
    assert far.returncode==2 and 'arc_easy needs data from the Hugging Face Hub' in far.stderr.splitlines()[-1], far.stderr[-2000:]
    odd = sft_nb('evaluate', 'model-5', '--tasks', 'no_such_task', cwd=home, timeout=600)
    assert odd.returncode==2 and 'no_such_task' in odd.stderr.splitlines()[-1] and 'Traceback' not in odd.stderr, odd.stderr[-2000:]
