"What a model of 2026 says: its thought, its calls and its answer are kept apart, shown and scored"
import json
import math
import random
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sft_nb.basics import InputError
from sft_nb.said import opens_thought, take_apart
from sft_nb.data import read_record
from sft_nb.templates import render_prompt, render_record
from sft_nb.chat import ChatTemplate
from sft_nb.tokenizer import JsonTokenizer
from sft_nb.sampling import TextPieces, answer_text
from sft_nb.responses import answer_file, load_responses, save_responses, wanted_of
from sft_nb.scores import score_responses
from sft_nb.numbers import load_answers
from sft_nb.report import write_report

sys.path.insert(0, str(Path(__file__).parent))
from test_records_2026 import KINDS, conversations # noqa: E402

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
