"What a model of 2026 says: its thought, its calls and its answer are kept apart, shown and scored"
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sft_nb.basics import InputError
from sft_nb.said import opens_thought, take_apart
from sft_nb.data import read_record
from sft_nb.templates import render_prompt, render_record
from sft_nb.chat import ChatTemplate
from sft_nb.tokenizer import JsonTokenizer, get_gpt2_tokenizer
from sft_nb.encoding import EncodePlan, load_or_encode
from sft_nb.thoughts import lost_thoughts, thought_of
from sft_nb.sampling import TextPieces, answer_text
from sft_nb.responses import answer_file, load_responses, save_responses, wanted_of
from sft_nb.scores import score_responses
from sft_nb.numbers import load_answers
from sft_nb.report import write_report
from sft_nb.choices import JobConfig, Stops, TrainConfig
from sft_nb.decoder import Decoder
from sft_nb.families import config_from_hf
from sft_nb.saving import save_model
from sft_nb.shelf import get_template, load_template
from sft_nb.dataset import InstructionDataset
from sft_nb.options import make_job
from sft_nb.report import score_lines
from sft_nb.job import run_job

sys.path.insert(0, str(Path(__file__).parent))
from test_records_2026 import KINDS, conversations, transformers_text # noqa: E402

MARKS = ['<think>', '</think>', '<tool_call>', '</tool_call>']


def marked_tokenizer():
    "Byte-level, with control tokens that are special and marks that are not, as Qwen has them"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ['Name a colour. The answer is Red.', '{"name": "weather", "arguments": {"town": "Ulm"}}']*9
    tok.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ('<|endoftext|>', '<|im_start|>', '<|im_end|>')])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKS])
    return JsonTokenizer(tok, 'marked', '<|im_end|>')


def test_answers_and_streams_keep_marks_as_transformers_does():
    transformers = pytest.importorskip('transformers')
    tokenizer = marked_tokenizer()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.tok, eos_token='<|im_end|>')
    chance, n = random.Random(3), tokenizer.n_vocab
    for _ in range(200):
        ids = chance.choices(range(n), k=9) + chance.choices(range(n-7, n), k=4)
        chance.shuffle(ids)
        wanted = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answer_text(tokenizer, ids)[0] == wanted
        pieces = TextPieces(tokenizer)
        assert ''.join(pieces.add(ids[:k], done=k == len(ids)) for k in range(1, len(ids)+1)) == wanted


@pytest.mark.parametrize('kind', KINDS)
def test_what_a_template_prints_is_taken_apart_again(kind):
    template, n = ChatTemplate(kind, KINDS[kind]), 0
    for name, messages, tools in conversations():
        record = read_record({'messages': messages} | ({'tools': tools} if tools else {}))
        try: rendered = render_record(record, template)
        except InputError: continue
        last = len(record.messages)-1
        said = ''.join(s.text for s in rendered.segments if s.turn == last and not s.stop)
        asked = render_prompt(record, template).text
        parts, wanted = take_apart(said, record.tools, opened=opens_thought(asked)), wanted_of(record)
        if '<tool_call>' in (messages[-1].get('content') or '') or '<think>' in wanted.thought: continue # forged in the data
        if kind == 'xml' and not tools: continue # numbers and texts look alike there
        assert parts.calls == wanted.calls, name
        assert parts.answer.strip() == wanted.answer.strip(), name
        n += 1
    assert n >= {'words': 1, 'mistral': 2}.get(kind, 5), n


def test_calls_and_answers_of_a_file_are_scored(tmp_path):
    schema = {'type': 'object', 'properties': {'town': {'type': 'string'}, 'days': {'type': 'integer'}}, 'required': ['town']}
    tools = [{'type': 'function', 'function': {'name': 'weather', 'parameters': schema}}]
    calls = [{'function': {'name': 'weather', 'arguments': {'town': t, 'days': 3}}} for t in ('Ulm', 'Bonn')]
    ask = {'role': 'user', 'content': 'Weather?'}
    both = {'messages': [ask, {'role': 'assistant', 'content': None, 'tool_calls': calls}], 'tools': tools}
    talk = {'messages': [ask, {'role': 'assistant', 'reasoning_content': 'Not here.', 'content': 'Ask the radio.'}], 'tools': tools}
    def said(*calls): return '\n'.join(f'<tool_call>\n{json.dumps(c)}\n</tool_call>' for c in calls)
    ulm, bonn = ({'name': 'weather', 'arguments': {'days': 3.0, 'town': t}} for t in ('Ulm', 'Bonn'))
    answers = ['<think>\nTwo.\n</think>\n\n' + said(bonn, ulm), said(ulm, {'name': 'weather', 'arguments': {'days': '3'}}),
               said(ulm) + '\n<tool_call>\n{"name": "wea', '<think>\nNot here.\n</think>\n\nAsk the radio.', said(ulm)]
    records = [both]*3 + [talk]*2
    rows = save_responses(tmp_path/'r.json', records, answers)
    assert rows[0]['model_thought'] == 'Two.' and rows[0]['model_answer'] == '' and len(rows[0]['model_calls']) == 2
    assert rows[0]['model_response'] == answers[0]
    scores = score_responses(tmp_path/'r.json', embed=None)
    def values(name): return [None if math.isnan(v) else round(float(v), 2) for v in scores.values[name]]
    assert values('calls_exact') == [100, 0, 0, None, 0]
    assert values('calls_found') == [100, 50, 50, None, 0]
    assert values('call_names') == [100, 100, 50, None, 0]
    assert values('calls_valid') == [100, 50, 50, None, 100]
    assert values('exact') == [0, 0, 0, 100, 0], 'the answer after the thought'
    assert scores.kinds == ('call', 'call', 'call', *scores.kinds[3:])
    data = write_report(tmp_path/'out', None, load_answers(tmp_path/'r.json', embed=None))
    assert round(data.metrics['calls_exact'].after, 6) == 25
    page = (tmp_path/'out'/'report.md').read_text()
    assert 'calls' in page and 'think before they answer' in page and '(thought) Not here.' in page
    written = load_responses(tmp_path/'r.json')
    again = answer_file(tmp_path/'a.json', records, lambda batch: [answers[records.index(r.raw)] for r in batch], {})
    assert again[0]['model_calls'] == written[0]['model_calls']


# in our words, how families switch thinking and print it
_TURNS = """{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '') %}
{%- if m.role == 'assistant' %}THOUGHT{{ said }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}ASK{% endif %}"""
_SHOWN = "{% if loop.last %}{{ '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' }}{% endif %}"
_OFF = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}"
REASONING = {
    'qwen3': _TURNS.replace('THOUGHT', _SHOWN).replace('ASK', _OFF + '{% endif %}'),
    'qwen3.5': _TURNS.replace('THOUGHT', _SHOWN).replace('ASK', _OFF + "{% else %}{{ '<think>\\n' }}{% endif %}"),
    'nemotron3': _TURNS.replace('THOUGHT', "{% if thought %}{{ '<think>\\n' ~ thought ~ '\\n</think>\\n' }}{% else %}{{ '<think></think>' }}{% endif %}").replace(
        'ASK', "{{ '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\\n' }}"),
    'r1': _TURNS.replace('THOUGHT', '').replace('ASK', "{{ '<think>\\n' }}")}


@pytest.mark.parametrize('kind', REASONING)
@pytest.mark.parametrize('inside', [False, True])
def test_reasoning_templates_ask_as_transformers_and_learn_thought_and_answer(kind, inside):
    template = ChatTemplate(kind, REASONING[kind], thinking='record')
    user = {'role': 'user', 'content': 'Name a colour.'}
    plain = {'role': 'assistant', 'content': 'Red.'}
    thinks = {'role': 'assistant', 'content': '<think>\nRed is one.\n</think>\n\nRed.'} if inside else plain | {'reasoning_content': 'Red is one.'}
    for messages, on in ([user, thinks], True), ([user, plain], False), ([user, thinks, user, thinks], True), ([user, thinks, user, plain], False):
        record = read_record({'messages': messages})
        switch = {} if kind == 'r1' else {'enable_thinking': on}
        source = REASONING[kind]
        for name, value in switch.items(): source = f'{{% set {name} = {str(value).lower()} %}}\n' + source
        asked = render_prompt(record, template).text
        assert asked == transformers_text(source, messages[:-1], None, ask=True), (messages, asked)
        whole = render_record(record, template)
        assert whole.text.startswith(asked)
        if kind != 'r1': assert whole.text == transformers_text(source, messages, None), 'else the template leaves the thought out'
        learned = ''.join(s.text for s in whole.segments if s.learn and s.turn == len(messages)-1)
        said = take_apart(learned.removesuffix('<|im_end|>'), opened=opens_thought(asked) and on)
        assert (said.thought, said.answer, learned.endswith('<|im_end|>')) == ('Red is one.' if on else '', 'Red.', True), learned
        if not on: assert learned == 'Red.<|im_end|>', 'an empty thought is read'
        lost = sum(bool(thought_of(m)) for m in record.messages[:-1]) if kind != 'nemotron3' else 0 # which prints them all
        assert lost_thoughts(record.messages, whole.segments) == lost
    off = ChatTemplate(kind, REASONING[kind], thinking='off')
    row = render_record(read_record({'messages': [user, thinks]}), off)
    assert ''.join(s.text for s in row.segments if s.learn) == 'Red.<|im_end|>'
    assert lost_thoughts(read_record({'messages': [user, thinks]}).messages, row.segments) == 1


def test_lost_thoughts_are_on_the_receipt():
    turns = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yo', 'reasoning_content': 'Hm.'}]
    template = ChatTemplate('qwen3', REASONING['qwen3'], thinking='record')
    plan = EncodePlan(template, marked_tokenizer())
    _, receipt = load_or_encode([{'messages': turns*2}, {'messages': turns}], plan)
    assert receipt.thoughts == {'rows': 1, 'turns': 1, 'where': ['record 0']}
    assert '1 thoughts are not printed by the template: record 0' in str(receipt)


# a whole run on records with tools and with thoughts

def tool(name, **types):
    properties = {key: {'type': kind} for key, kind in types.items()}
    return {'type': 'function', 'function': {'name': name, 'description': f'The {name} tool', 'parameters': {
        'type': 'object', 'properties': properties, 'required': list(types)}}}


def tool_records(n, seed=5):
    "Questions that one of three tools answers, some of them without any"
    chance = random.Random(seed)
    tools = [tool('weather', town='string', days='integer'), tool('add', a='integer', b='integer'), tool('translate', word='string', language='string')]
    towns, words, languages = ['Ulm', 'Bonn', 'Kiel', 'Graz', 'Bern'], ['house', 'tree', 'river', 'bread'], ['German', 'French', 'Polish']
    for i in range(n):
        town, word, language, (a, b) = chance.choice(towns), chance.choice(words), chance.choice(languages), chance.choices(range(2, 99), k=2)
        asked, name, arguments = chance.choice([
            (f'How will the weather be in {town} for {a%7+1} days?', 'weather', {'town': town, 'days': a%7+1}),
            (f'What is {a} plus {b}?', 'add', {'a': a, 'b': b}), (f'Say {word} in {language}.', 'translate', {'word': word, 'language': language})])
        turn = {'role': 'assistant', 'content': None, 'tool_calls': [{'type': 'function', 'function': {'name': name, 'arguments': arguments}}]}
        if i%10 == 9: asked, turn = 'Thank you.', {'role': 'assistant', 'content': 'You are welcome.'}
        yield {'messages': [{'role': 'user', 'content': asked}, turn], 'tools': tools}


def reasoning_records(n, seed=6):
    "Small sums with a thought in front of the answer, told in both ways"
    chance = random.Random(seed)
    for i in range(n):
        a, b, c = chance.choices(range(1, 20), k=3)
        thought, answer = f'{a} and {b} make {a+b}. With {c} that is {a+b+c}.', f'The sum is {a+b+c}.'
        said = {'content': f'<think>\n{thought}\n</think>\n\n{answer}'} if i%2 else {'content': answer, 'reasoning_content': thought}
        yield {'messages': [{'role': 'user', 'content': f'What is {a} + {b} + {c}?'}, {'role': 'assistant'} | said]}


def run_on(records, folder, **more):
    (folder/'data.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in records))
    said = []
    data = run_job(JobConfig(data=folder/'data.jsonl', out=folder/'run', split_seed=1, device='cpu', **more), said.append)
    return data, load_responses(folder/'run'/'responses.json'), said


def check_run_on(data, rows, said):
    assert any('hermes is used' in line for line in said)
    assert data.val_after < data.val_before
    assert {'calls_exact', 'calls_found', 'call_names', 'calls_valid'} <= data.metrics.keys()
    assert any(line.split()[1].startswith('call') for line in score_lines(data) if line.startswith('score'))


def test_a_small_model_runs_on_tools_and_thoughts(tmp_path):
    torch.manual_seed(3)
    hf = dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=50257, n_embd=32, n_layer=1, n_head=2, n_positions=512)
    save_model(tmp_path/'tiny', Decoder(config_from_hf(hf)), get_gpt2_tokenizer())
    records = [*tool_records(24), *reasoning_records(24)]
    train = TrainConfig(lr=1e-2, epochs=2, dtype='float32')
    found = run_on(records, tmp_path, model=tmp_path/'tiny', train=train, until=Stops(8), preflight=False)
    check_run_on(*found)
    assert 'calls_exact' in json.loads((tmp_path/'run'/'report.json').read_text())['metrics']
    assert load_template(tmp_path/'run'/'model').name == 'hermes'


@pytest.mark.slow
def test_the_default_model_learns_to_call_and_to_think(tmp_path):
    records = [*tool_records(300), *reasoning_records(300)]
    data, rows, said = run_on(records, tmp_path, train=TrainConfig(lr=2e-4, epochs=1), until=Stops(96))
    check_run_on(data, rows, said)
    assert data.metrics['calls_exact'].after > 50 and data.metrics['calls_valid'].after > 80
    thought = [row for row in rows if row.get('model_thought')]
    called = [row for row in rows if row.get('model_calls')]
    assert len(thought) > 15 and len(called) > 15
    assert all('<think>' not in row['model_answer'] and '<tool_call>' not in row['model_answer'] for row in thought + called)
    assert all('<think>' in row['model_response'] for row in thought)


def test_thought_call_and_answer_weigh_as_they_are_told():
    tokenizer, template = marked_tokenizer(), ChatTemplate('hermes', get_template('hermes').jinja)
    records = [r for r in (*tool_records(12), *reasoning_records(6))]
    plain = InstructionDataset(records, tokenizer, template)
    weighed = InstructionDataset(records, tokenizer, template, span_weights={'reasoning': .25, 'call': 3})
    seen = set()
    for one, other in zip(plain, weighed):
        assert one.ids.tolist() == other.ids.tolist()
        assert ((one.learn > 0) == (other.learn > 0)).all()
        for weight in (.25, 1, 3):
            text = tokenizer.decode(other.ids[(other.learn == weight) & (one.learn > 0)])
            if text: seen.add(weight)
            if weight == .25 and text: assert text.startswith('<think>') and text.rstrip().endswith('</think>'), text
            if weight == 3 and text: assert text.startswith('<tool_call>') and text.endswith('</tool_call>'), text
            if weight == 1: assert '<think>' not in text and '<tool_call>' not in text and text.endswith('<|im_end|>'), text
    assert seen == {.25, 1, 3}
    assert sum(n['call'] for n in weighed.receipt.kinds.values()) > 0 and weighed.receipt.targets == plain.receipt.targets
    cfg = make_job({'span_weights': {'reasoning': .5}})
    assert cfg.span_weights == {'reasoning': .5}
