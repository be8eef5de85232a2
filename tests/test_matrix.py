"Templates of many shapes x records of many kinds: printed as transformers prints it, prompt and whole, or refused by name"
import copy
import itertools
import json
import os
import re
from datetime import datetime
from pathlib import Path

import pytest

from sft_nb.basics import InputError
from sft_nb.chat import ChatTemplate
from sft_nb.data import read_record
from sft_nb.encoding import EncodePlan, load_or_encode
from sft_nb.shelf import get_template
from sft_nb.rows import encode_prompt, encode_rows
from sft_nb.templates import render_prompt, render_record
from sft_nb.thoughts import thinking_of, thinking_switches
from sft_nb.tokenizer import gpt2_as_json

TOOLS = [{'type': 'function', 'function': {'name': 'weather', 'description': 'The weather of a town', 'parameters': {
    'type': 'object', 'properties': {'town': {'type': 'string'}, 'days': {'type': 'integer'}}, 'required': ['town']}}}]
_SHOW_TOOLS = "{% if tools %}{{ '<|system|>' ~ tools|tojson ~ '<|end|>' }}{% endif %}"
# in our words: calls that end with a token of their own, answers that end in one way at last and in another before, a thought under its own name
CHANNEL = "{{ 'Day ' ~ strftime_now('%Y-%m-%d') ~ '.' }}" + _SHOW_TOOLS + """{% for m in messages %}{% set said = m.content or '' %}
{%- if m.role == 'tool' %}{{ '<|start|>tool to=assistant<|message|>' ~ said|tojson ~ '<|end|>' }}
{%- elif m.role != 'assistant' %}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ said ~ '<|end|>' }}
{%- elif m.tool_calls %}{% if m.tool_calls|length > 1 or said %}{{ raise_exception('one call and no words') }}{% endif %}{% set c = m.tool_calls[0].function %}
{%- if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' ~ m.thinking ~ '<|end|>' }}{% endif %}
{{- '<|start|>assistant to=' ~ c.name ~ '<|channel|>commentary json<|message|>' ~ c.arguments|tojson ~ '<|call|>' }}
{%- else %}{% if m.thinking and loop.last %}{{ '<|start|>assistant<|channel|>analysis<|message|>' ~ m.thinking ~ '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' ~ said ~ ('<|return|>' if loop.last else '<|end|>') }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
# no turn ends with a stop: the beginning of the next one ends it
ENDLESS = "{{ '[gMASK]' }}" + _SHOW_TOOLS + """{% for m in messages %}{% if m.role == 'tool' %}{{ '<|observation|>\\n' ~ m.content }}
{%- else %}{{ '<|' ~ m.role ~ '|>\\n' ~ (m.content or '') }}{% for c in m.tool_calls or [] %}
{{- '\\n<tool_call>' ~ c.function.name }}{% for k, v in c.function.arguments.items() %}{{ '\\n<arg_key>' ~ k ~ '</arg_key>\\n<arg_value>' ~ v ~ '</arg_value>' }}{% endfor %}
{{- '\\n</tool_call>' }}{% endfor %}{% endif %}{% endfor %}{{ '<|assistant|>\\n' if add_generation_prompt }}"""
# the question opens a thought or has it empty; every answer prints one
OPENED = _SHOW_TOOLS + """{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}
{%- if m.role == 'assistant' %}{{ '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n' if m.reasoning_content else '<think></think>' }}{% endif %}
{{- m.content or '' }}{% for c in m.tool_calls or [] %}{{ '<tool_call>' ~ c.function|tojson ~ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' ~ ('<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\\n') }}{% endif %}"""
# a thought has the shortest of its names; calls end with their own token
ONLY_REASONING = _SHOW_TOOLS + """{% for m in messages %}{{ '<|begin|>' ~ m.role }}
{%- if m.reasoning and loop.last %}{{ '<|think|>' ~ m.reasoning ~ '<|end|><|begin|>assistant' }}{% endif %}
{%- if m.tool_calls %}{{ '<|tool_calls|>' }}{% for c in m.tool_calls %}{{ c.function|tojson }}{% endfor %}{{ '<|calls|>' }}
{%- else %}{{ '<|content|>' ~ m.content ~ '<|end|>' }}{% endif %}{% endfor %}{{ '<|begin|>assistant' if add_generation_prompt }}"""
# one call a turn, words or calls, content stripped
SINGLE = "{{ bos_token }}" + _SHOW_TOOLS + """{% for m in messages %}{% if m.tool_calls and m.tool_calls|length > 1 %}{{ raise_exception('one call at once') }}{% endif %}
{{- '<|header|>' ~ ('ipython' if m.role == 'tool' else m.role) ~ '<|/header|>\\n\\n' }}
{%- if m.tool_calls %}{{ '{"name": "' ~ m.tool_calls[0].function.name ~ '", "parameters": ' ~ m.tool_calls[0].function.arguments|tojson ~ '}<|eot|>' }}
{%- else %}{{ m.content|trim ~ '<|eot|>' }}{% endif %}{% endfor %}{{ '<|header|>assistant<|/header|>\\n\\n' if add_generation_prompt }}"""
# tools are needed; they are printed in front of the last question, which is found by what it says
LAST_ASKED = """{% set asked = messages|selectattr('role', 'equalto', 'user')|list %}{% set shown %}{% for tool in tools %}{{ tool|tojson }}{% endfor %}{% endset %}
{%- for m in messages %}{% if m.role == 'user' %}{% if m == asked[-1] %}{{ '<|system|>' ~ shown ~ '<|end|>' }}{% endif %}{{ '<|user|>' ~ m.content ~ '<|end|>' }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>' ~ (m.content or '') }}{% for c in m.tool_calls or [] %}{{ '<tool_call>' ~ c.function|tojson ~ '</tool_call>' }}{% endfor %}{{ '<|end|>' }}
{%- else %}{{ '<|observation|>' ~ m.content ~ '<|end|>' }}{% endif %}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"""
# a call ends where its result begins; a question that is not to be thought about holds an empty thought, which is printed nowhere else
REPLY = _SHOW_TOOLS + """{% set before = namespace(role='') %}{% for m in messages %}{% if m.role == 'tool' %}{{ m.content ~ '<reply|>' }}
{%- else %}{% if before.role != 'tool' %}{{ '<|turn>' ~ m.role ~ '\\n' }}{% endif %}
{%- if m.reasoning_content %}{{ '<|channel>thought\\n' ~ m.reasoning_content ~ '\\n<channel|>' }}{% endif %}{{ m.content or '' }}
{%- for c in m.tool_calls or [] %}{{ '<|call>' ~ c.function|tojson ~ '<call|>' }}{% endfor %}{{ '<|reply>' if m.tool_calls else '<turn|>\\n' }}{% endif %}
{%- set before.role = m.role %}{% endfor %}
{%- if add_generation_prompt and before.role != 'tool' %}{{ '<|turn>assistant\\n' ~ ('' if enable_thinking else '<|channel>thought\\n<channel|>') }}{% endif %}"""
# the question opens a thought, answers begin with its mark, and no thought is ever printed
SWALLOWS = """{% for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' }}{% if m.role == 'assistant' %}{{ '<think>\\n' if loop.last }}{{ (m.content or '').split('</think>')[-1].strip() }}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>' ~ c.function|tojson ~ '</tool_call>' }}{% endfor %}{{ '\\n<|end|>\\n' }}
{%- else %}{{ m.content ~ '\\n' }}{% endif %}{% endfor %}{{ '<|assistant|>\\n<think>\\n' if add_generation_prompt }}"""
SHAPES = {'channel': CHANNEL, 'endless': ENDLESS, 'opened': OPENED, 'only reasoning': ONLY_REASONING, 'single': SINGLE, 'last asked': LAST_ASKED}
LEAST = {'channel': 58, 'endless': 58, 'opened': 30, 'only reasoning': 58, 'single': 34, 'last asked': 23}
SPECIAL = ('bos_token', '<s>'), ('eos_token', '</s>')
CONTROL = ['<s>', '</s>', '<|return|>', '<|call|>', '<|calls|>', '<|end|>', '<|start|>', '<|message|>', '<|channel|>', '<|im_start|>', '<|im_end|>', '<|eot|>',
           '<|turn>', '<turn|>', '<|reply>', '<reply|>', '<|call>', '<call|>', '<|header|>', '<|/header|>', '<|user|>', '<|assistant|>', '<|system|>', '<|observation|>', '<|begin|>', '<|content|>', '<|think|>', '<|tool_calls|>']
TOKENIZER = gpt2_as_json(CONTROL)


def call(arguments, n=0): return {'id': f'call0000{n}', 'type': 'function', 'function': {'name': 'weather', 'arguments': arguments}}


def conversations():
    "(name, messages, tools): arguments as object and as text, every kind of content, thoughts, several calls and turns, a system message"
    user, end = {'role': 'user', 'content': 'Weather?'}, {'role': 'assistant', 'content': 'Sunny there.'}
    def result(n): return {'role': 'tool', 'tool_call_id': f'call0000{n}', 'name': 'weather', 'content': '{"sky": "blue"}'}
    contents = {'null': {'content': None}, 'empty': {'content': ''}, 'absent': {}, 'words': {'content': 'I look it up.'}}
    arguments = {'town': 'Ulm "x"', 'days': 3}
    for tools, system in (None, False), (TOOLS, True):
        begin = [{'role': 'system', 'content': 'Be short.'}]*system
        for (kind, content), n, given in itertools.product(contents.items(), (1, 2), (arguments, json.dumps(arguments))):
            if n == 2 and given is not arguments: continue
            asks = {'role': 'assistant', 'tool_calls': [call(given, k) for k in range(n)]} | content
            results = [result(k) for k in range(n)]
            yield f'{kind}-{n}', [*begin, user, asks], tools
            yield f'{kind}-{n}-turns', [*begin, user, asks, *results, end, user, asks, *results, end], tools
            yield f'{kind}-{n}-thought', [*begin, user, asks | {'reasoning_content': 'A town.'}, *results, end | {'reasoning_content': 'Dry.'}], tools
        for key in ('reasoning_content', 'reasoning', 'thinking'):
            yield key, [*begin, user, end | {key: 'It is dry.'}], tools
            yield key+'-turns', [*begin, user, end | {key: 'Wet.'}, user, end | {key: 'It is dry.'}], tools
        yield 'thought-in-words', [*begin, user, end | {'content': '<think>\nDry.\n</think>\n\nSunny.'}], tools
        yield 'plain', [*begin, user, end], tools
        yield 'plain-turns', [*begin, user, end, user, end], tools
        yield 'spaces', [*begin, user | {'content': ' Weather? \n'}, end | {'content': '  Sunny.\n'}], tools
        yield 'nothing', [*begin, user, end | {'content': ''}], tools


def canonical(messages):
    "Arguments as objects, which is how servers give them to a template"
    messages = copy.deepcopy(messages)
    for c in [c for m in messages for c in m.get('tool_calls', ())]:
        if isinstance(c['function']['arguments'], str): c['function']['arguments'] = json.loads(c['function']['arguments'])
    return messages


@pytest.fixture
def theirs(monkeypatch):
    "What transformers prints on the day that our templates are told; None if it refuses"
    chat = pytest.importorskip('transformers.utils.chat_template_utils')
    class Day(datetime):
        @classmethod
        def now(cls, tz=None): return cls(2026, 1, 1)
    monkeypatch.setattr(chat, 'datetime', Day)

    def printed(source, messages, tools, ask, switches):
        given = dict(SPECIAL) | switches
        try: texts, _ = chat.render_jinja_template([canonical(messages)], chat_template=source, tools=tools, add_generation_prompt=ask, **given)
        except Exception: return None
        return texts[0]
    return printed


def carried(shape, messages):
    "What a template is given of a thought: under the third name where it reads no other, and beside the words where the question opens it"
    if shape == 'only reasoning': return [m | {'reasoning': t} if (t := m.get('reasoning_content') or m.get('thinking')) else m for m in messages]
    if shape != 'opened' or '</think>' not in (messages[-1].get('content') or ''): return messages
    return [*messages[:-1], messages[-1] | {'reasoning_content': 'Dry.', 'content': 'Sunny.'}]


@pytest.mark.parametrize('thinking', [None, 'record'])
@pytest.mark.parametrize('shape', SHAPES)
def test_every_shape_prints_every_record_as_transformers_or_refuses_it(shape, thinking, theirs):
    source = SHAPES[shape]
    template, n_equal = ChatTemplate(shape, source, SPECIAL, thinking=thinking), 0
    for name, messages, tools in conversations():
        record = read_record({'messages': messages} | ({'tools': tools} if tools else {}))
        switches = thinking_switches(source, thinking_of(record)) if thinking else {}
        given = carried(shape, messages)
        whole, asked = theirs(source, given, tools, False, switches), theirs(source, given[:-1], tools, True, switches)
        try: rendered, prompt = render_record(record, template), render_prompt(record, template)
        except InputError as e:
            assert shape in str(e), 'named'
            continue
        n_equal += 1
        assert (rendered.text, prompt.text) == (whole, asked), name
        as_given = whole if shape == 'only reasoning' else theirs(source, messages, tools, False, switches)
        assert any(s.unlike for s in rendered.segments) == (rendered.text != as_given), name
        assert rendered.text.startswith(prompt.text) and any(s.learn for s in rendered.segments), name
        row = encode_rows([record], template, TOKENIZER)[0]
        ends = [TOKENIZER.eos_id]*any(s.stop and not s.text for s in rendered.segments)
        ids = [i for part in row.ids for i in part]
        is_cut_before = any(a.segment < rendered.n_asked for a in row.across) # an earlier answer begins inside a token
        if not is_cut_before: assert encode_prompt(record, template, TOKENIZER) == TOKENIZER.encode_control(asked), name
        if not row.across: assert ids == TOKENIZER.encode_control(whole) + ends, name
    assert n_equal >= LEAST[shape], n_equal


def test_an_empty_thought_in_the_question_alone_and_calls_that_end_in_a_reply(theirs):
    template, n_equal = ChatTemplate('reply', REPLY, SPECIAL, thinking='record'), 0
    for name, messages, tools in conversations():
        record = read_record({'messages': messages} | ({'tools': tools} if tools else {}))
        switches = thinking_switches(REPLY, thinking_of(record))
        whole, asked = theirs(REPLY, messages, tools, False, switches), theirs(REPLY, messages[:-1], tools, True, switches)
        rendered, prompt = render_record(record, template), render_prompt(record, template)
        assert prompt.text == asked, name
        assert any(s.unlike for s in rendered.segments) != (rendered.text == whole), name
        if whole.startswith(asked): assert rendered.text == whole, name
        elif 'thought-in-words' not in name: # only the empty thought of the question is new
            assert rendered.text == asked + whole.removeprefix(asked.removesuffix('<|channel>thought\n<channel|>')), name
        stop = '<|reply>' if messages[-1].get('tool_calls') else '<turn|>'
        assert [s.text for s in rendered.segments if s.stop and s.learn][-1:] == [stop], name
        n_equal += whole.startswith(asked)
    assert n_equal >= 20, n_equal


@pytest.mark.parametrize('thinking', [None, 'record', 'on'])
def test_a_thought_that_the_template_never_prints_stands_in_what_the_question_opens(thinking, theirs):
    template = ChatTemplate('swallows', SWALLOWS, SPECIAL, thinking=thinking)
    user, end = {'role': 'user', 'content': 'Weather?'}, {'role': 'assistant', 'content': 'Sunny.'}
    calls = {'role': 'assistant', 'content': '', 'tool_calls': [call({'town': 'Ulm'})]}
    for last, words in (end, 'Sunny.'), (calls, theirs(SWALLOWS, [calls], None, False, {}).split('<think>\n')[1].removesuffix('\n<|end|>\n')):
        asked = theirs(SWALLOWS, [user], None, True, {})
        record = read_record({'messages': [user, last | {'reasoning_content': 'Dry.'}]})
        rendered = render_record(record, template)
        assert rendered.text == f'{asked}Dry.\n</think>\n\n{words}\n<|end|>\n'
        assert ''.join(s.text for s in rendered.segments if s.learn) == f'Dry.\n</think>\n\n{words}\n<|end|>'
        assert render_prompt(record, template).text == asked
        assert any(s.unlike for s in rendered.segments)
        _, receipt = load_or_encode([record], EncodePlan(template, TOKENIZER))
        assert receipt.unlike == {'rows': 1, 'turns': 1, 'where': ['record']}
        assert '  1 answers follow their question, as the template does not print them later: record' in str(receipt).splitlines()


_READ = re.compile(r"[.'\"](reasoning_content|reasoning|thinking)\b")
_WITHIN = re.compile(r'\s*<think>(.*?)</think>\s*', re.S)


def as_told(messages, source, thinking):
    "The turns as a template is given them: a thought under the name it reads, or no thought where none is wanted"
    told = []
    for m in messages:
        m = dict(m)
        thoughts = [m.pop(key) for key in ('reasoning_content', 'reasoning', 'thinking') if key in m]
        if thinking == 'off': m |= {'content': _WITHIN.sub('', m['content'])} if m.get('content') else {}
        elif thoughts:
            m |= {'reasoning_content': thoughts[0], 'thinking': thoughts[0]}
            if set(_READ.findall(source)) == {'reasoning'}: m['reasoning'] = thoughts[0]
        told.append(m)
    return told


@pytest.mark.slow
@pytest.mark.parametrize('thinking', [None, 'record', 'on', 'off'])
def test_templates_of_a_folder_print_what_transformers_prints_or_refuse_or_say_so(thinking, theirs):
    "Equal to transformers, prompt and whole; or refused; or the prompt is equal and the row's pieces are `unlike`, which the receipt counts and names"
    folder = os.environ.get('SFT_NB_TEMPLATES')
    if not folder: pytest.skip('SFT_NB_TEMPLATES names no folder of *.jinja files')
    seen = {'same': 0, 'said': 0, 'refused': 0}
    for path in sorted(Path(folder).glob('*.jinja')):
        source = path.read_text(encoding='utf-8')
        template = ChatTemplate(path.stem, source, SPECIAL, thinking=thinking)
        for name, messages, tools in conversations():
            record = read_record({'messages': messages} | ({'tools': tools} if tools else {}))
            switches = thinking_switches(source, thinking_of(record) if thinking == 'record' else thinking)
            given = as_told(messages, source, thinking)
            whole, asked = theirs(source, given, tools, False, switches), theirs(source, given[:-1], tools, True, switches)
            try: rendered, prompt = render_record(record, template), render_prompt(record, template)
            except InputError as e:
                assert path.stem in str(e)
                seen['refused'] += 1
                continue
            place = path.stem, name, rendered.text, whole
            assert prompt.text == asked and rendered.text.startswith(asked), place
            is_said = any(s.unlike for s in rendered.segments)
            assert is_said != (rendered.text == whole), place
            learned = ''.join(s.text for s in rendered.segments if s.learn and s.turn == len(messages) - 1)
            last = messages[-1]
            assert learned.count('weather') >= len(last.get('tool_calls', ())) and (last.get('content') or '').split('>')[-1].strip() in learned, place
            seen['said' if is_said else 'same'] += 1
    assert seen['same'], seen


def test_calls_end_where_the_model_stops():
    turns = [{'role': 'user', 'content': 'Weather?'}, {'role': 'assistant', 'content': None, 'tool_calls': [call({'town': 'Ulm'})]}]
    wanted = {'channel': '<|call|>', 'endless': '', 'only reasoning': '<|calls|>', 'single': '<|eot|>'}
    for shape, stop in wanted.items():
        record = read_record({'messages': turns})
        rendered = render_record(record, ChatTemplate(shape, SHAPES[shape], SPECIAL))
        assert [s.text for s in rendered.segments if s.stop and s.learn] == [stop], shape


def test_an_answer_is_learned_to_its_end_or_refused():
    "Some close a part before they end, which the name of the end token tells; where a call stands behind the stop nobody would ever ask for it"
    parts = "{% for m in messages %}{{ '<' ~ m.role ~ '>' ~ (m.content or '') ~ '</part>' }}{% for c in m.tool_calls or [] %}{{ c.function|tojson ~ '</part>' }}{% endfor %}{{ eos_token }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
    user, calls = {'role': 'user', 'content': 'Weather?'}, {'role': 'assistant', 'content': 'Look.', 'tool_calls': [call({'town': 'Ulm'})]}
    known, unknown = ChatTemplate('parts', parts, (('eos_token', '<end>'),)), ChatTemplate('parts', parts, (('eos_token', ''),))
    for last in calls, {'role': 'assistant', 'content': 'Sunny.'}:
        rendered = render_record(read_record({'messages': [user, last]}), known)
        learned = ''.join(s.text for s in rendered.segments if s.learn)
        assert learned == rendered.text.split('<assistant>')[1] and learned.endswith('</part><end>')
    for turns in [user, calls], [user, calls, {'role': 'tool', 'content': 'dry'}, {'role': 'assistant', 'content': 'Dry.'}]:
        with pytest.raises(InputError, match="turn 1: template 'parts' prints a call after '</part>', where the model would stop"): render_record(read_record({'messages': turns}), unknown)


def test_a_question_that_opens_what_the_words_begin_with_is_not_printed_twice():
    source = """{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
    turns = [{'role': 'user', 'content': 'Weather?'}, {'role': 'assistant', 'content': '<think>\nDry.\n</think>\n\nSunny.'}]
    rendered = render_record(read_record({'messages': turns}), ChatTemplate('opens', source))
    assert rendered.text.count('<think>') == 1
    assert ''.join(s.text for s in rendered.segments if s.learn) == 'Dry.\n</think>\n\nSunny.<|im_end|>'


def test_a_thought_that_the_template_drops_is_on_the_receipt():
    "The question says 'no thoughts' and the answer leaves them out, as DeepSeek's V3.1 does"
    source = """{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ ('</think>' if m.role == 'assistant') ~ m.content.split('</think>')[-1].strip() }}
{{- '</s>' if m.role == 'assistant' }}{% endfor %}{{ '<|assistant|></think>' if add_generation_prompt }}"""
    turns = [{'role': 'user', 'content': 'Weather?'}, {'role': 'assistant', 'content': '<think>\nDry.\n</think>\n\nSunny.'}]
    for thinking in (None, 'record'):
        plan = EncodePlan(ChatTemplate('drops', source, SPECIAL, thinking=thinking), TOKENIZER)
        _, receipt = load_or_encode([{'messages': turns}], plan)
        assert receipt.thoughts == {'rows': 1, 'turns': 1, 'where': ['record 0']}
        assert 'thoughts are not printed by the template: record 0' in str(receipt)


def test_a_border_inside_a_token_is_on_the_receipt():
    "Alpaca's words end with a colon, and GPT-2 has a token of a colon and a quotation mark"
    rows = [{'instruction': 'Say it.', 'input': '', 'output': said} for said in ('Yes', '"Yes"', 'No', '"No"')]
    template = get_template('alpaca')
    _, receipt = load_or_encode(rows, EncodePlan(template, gpt2_as_json()))
    assert receipt.across == {'rows': 2, 'where': ["record 1 (':\"', id 11097)", "record 3 (':\"', id 11097)"]}
    line = "  2 rows are cut between prompt and answer, where their whole text has one token: record 1 (':\"', id 11097), record 3 (':\"', id 11097)"
    assert line in str(receipt).splitlines()
    _, plain = load_or_encode(rows[::2], EncodePlan(template, gpt2_as_json()))
    assert plain.across['rows'] == 0 and 'are cut between' not in str(plain)
