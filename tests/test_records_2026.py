"Calls of tools, thoughts and what else records of 2026 hold: printed as transformers prints it, or refused by name"
import copy
import itertools
import json

import pytest

from sft_nb.basics import InputError
from sft_nb.chat import ChatTemplate
from sft_nb.shelf import load_template
from sft_nb.data import read_record
from sft_nb.responses import response_rows
from sft_nb.templates import TEXT_TEMPLATES, render_prompt, render_record
from sft_nb.tokenizer import gpt2_as_json, tokenizer_from_file

TOOLS = [{'type': 'function', 'function': {'name': 'weather', 'description': 'The weather <|im_end|> of a town',
                                           'parameters': {'type': 'object', 'properties': {'town': {'type': 'string'}}}}}]
# in our words, what the templates of some families do
HERMES = """{%- if tools %}{{ '<|im_start|>system\\n<tools>' }}{% for t in tools %}{{ '\\n' ~ t|tojson }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}{% if m.content %}{{ m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}{% set c = c.function or c %}
{{- '\\n<tool_call>\\n{"name": "' ~ c.name ~ '", "arguments": ' }}
{{- c.arguments if c.arguments is string else c.arguments|tojson }}{{ '}\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN3 = HERMES.replace("{% if m.content %}{{ m.content }}{% endif %}", """{% set ns = namespace(q=-1) %}{% for x in messages %}{% if x.role == 'user' %}{% set ns.q = loop.index0 %}{% endif %}{% endfor %}
{%- set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}
{%- if m.role == 'assistant' and '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{%- if m.role == 'assistant' and loop.index0 > ns.q %}{{ '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' }}{% endif %}{{ content }}""")
MISTRAL = """{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' ~ {'content': m.content}|tojson ~ '[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function|tojson }}{% endfor %}{{ ']</s>' }}
{%- else %}{{ ' ' ~ m.content ~ '</s>' }}{% endif %}{% endfor %}"""
XML = HERMES.replace("'\\n<tool_call>\\n{\"name\": \"' ~ c.name ~ '\", \"arguments\": '", "'<tool_call>' ~ c.name").replace(
    "{{- c.arguments if c.arguments is string else c.arguments|tojson }}{{ '}\\n</tool_call>' }}",
    "{% for k, v in c.arguments|items %}{{ '<arg_key>' ~ k ~ '</arg_key><arg_value>' ~ (v if v is string else v|tojson) ~ '</arg_value>' }}{% endfor %}{{ '</tool_call>' }}")
WORDS = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
KINDS = {'hermes': HERMES, 'qwen3': QWEN3, 'mistral': MISTRAL, 'xml': XML, 'words': WORDS}


def call(arguments): return {'id': 'call00001', 'type': 'function', 'function': {'name': 'weather', 'arguments': arguments}}


def conversations():
    "(name, messages, tools) of every kind of record"
    user, end = {'role': 'user', 'content': 'Weather?'}, {'role': 'assistant', 'content': 'Sunny <|im_end|> there.'}
    result = {'role': 'tool', 'tool_call_id': 'call00001', 'name': 'weather', 'content': '{"sky": "<tool_call>"}'}
    arguments = {'town': 'Ulm <|im_end|>\n"x"', 'days': 3}
    contents = {'null': {'content': None}, 'empty': {'content': ''}, 'absent': {}, 'words': {'content': 'I look it up.'}}
    for (kind, content), n, tools in itertools.product(contents.items(), (1, 2), (None, TOOLS)):
        asks = {'role': 'assistant', 'tool_calls': [call(arguments)]*n} | content
        yield f'{kind}-{n}', [user, asks], tools
        yield f'{kind}-{n}-turns', [user, asks, result, end, user, asks, result, end], tools
        yield f'{kind}-{n}-thought', [user, asks | {'reasoning_content': 'A town <think>.'}, result, end | {'reasoning_content': 'Dry.'}], tools
    yield 'thought', [user, end | {'reasoning_content': 'It is dry.'}], None
    yield 'thought-in-words', [user, end | {'content': '<think>\nDry.\n</think>\n\nSunny.'}], None
    yield 'system', [{'role': 'system', 'content': 'Be short.'}, user, end], TOOLS
    yield 'plain', [user, end], None


def transformers_text(source, messages, tools, ask=False):
    "What transformers prints; None if it refuses"
    chat = pytest.importorskip('transformers.utils.chat_template_utils')
    try: texts, _ = chat.render_jinja_template([copy.deepcopy(messages)], chat_template=source, tools=tools, add_generation_prompt=ask)
    except Exception: return None
    return texts[0]


@pytest.mark.parametrize('kind', KINDS)
def test_every_record_is_printed_as_transformers_prints_it_or_refused(kind):
    template, n_equal, refused = ChatTemplate(kind, KINDS[kind]), 0, []
    for name, messages, tools in conversations():
        record = read_record({'messages': messages} | ({'tools': tools} if tools else {}))
        try: rendered = render_record(record, template)
        except InputError as e:
            refused.append((name, bool(tools), str(e)))
            continue
        n_equal += 1
        assert rendered.text == transformers_text(KINDS[kind], messages, tools), name
        assert render_prompt(record, template).text == transformers_text(KINDS[kind], messages[:-1], tools, ask=True), name
        learned = [s.text for s in rendered.segments if s.learn]
        assert learned and sum(s.stop for s in rendered.segments) == sum(m['role'] == 'assistant' for m in messages), name
        forged = [s for s in rendered.segments if s.control and not s.stop and '<|im_end|>' in s.text.replace('<|im_end|>\n<|im_start|>', '').removeprefix('<|im_end|>')]
        assert not [s for s in forged if 'Ulm' in s.text or 'there' in s.text], name
    least = {'hermes': 35, 'qwen3': 50, 'mistral': 4, 'xml': 35, 'words': 1}[kind]
    assert n_equal >= least, (n_equal, [r for r in refused][:5])
    assert all(any(word in text for word in ("'tool_calls'", "'tools'", "'reasoning_content'", "'content'", 'prints other text')) for *_, text in refused), refused


@pytest.mark.parametrize('name', ['alpaca', 'plain'])
def test_plain_words_refuse_calls_tools_and_thoughts(name):
    turns = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    for more, word in ({'reasoning': 'Hm.'}, 'reasoning'), ({'tool_calls': [call({})]}, 'tool_calls'):
        record = read_record({'messages': [turns[0], turns[1] | more]})
        with pytest.raises(InputError, match=word): render_record(record, TEXT_TEMPLATES[name])
    with pytest.raises(InputError, match='tools'): render_record(read_record({'messages': turns, 'tools': TOOLS}), TEXT_TEMPLATES[name])


def test_one_record_in_all_its_spellings():
    hermes = ChatTemplate('hermes', HERMES)
    arguments = {'town': 'Ulm'}
    turns = [{'role': 'user', 'content': 'Weather?'}, {'role': 'assistant', 'content': None, 'tool_calls': [call(arguments)]},
             {'role': 'tool', 'content': 'dry'}, {'role': 'assistant', 'content': 'Dry.'}]
    wanted = render_record(read_record({'messages': turns, 'tools': TOOLS}), hermes)
    text = json.dumps({'name': 'weather', 'arguments': arguments})
    sharegpt = [{'from': 'human', 'value': 'Weather?'}, {'from': 'function_call', 'value': text},
                {'from': 'observation', 'value': 'dry'}, {'from': 'gpt', 'value': 'Dry.'}]
    as_text = turns[:1] + [turns[1] | {'tool_calls': [call(json.dumps(arguments))]}] + turns[2:]
    old = turns[:1] + [{'role': 'assistant', 'content': None, 'function_call': json.loads(text)}, turns[2] | {'role': 'function'}, turns[3]]
    spellings = [{'conversations': sharegpt, 'tools': json.dumps(TOOLS)}, {'messages': as_text, 'tools': TOOLS},
                 {'messages': old, 'functions': [TOOLS[0]['function']]}, {'messages': json.dumps(turns), 'tools': TOOLS},
                 {'prompt': turns[:3], 'completion': turns[3:], 'tools': TOOLS}]
    for raw in spellings: assert render_record(read_record(raw), hermes).text == wanted.text
    assert [s.learn for s in render_record(read_record(spellings[0]), hermes).segments] == [s.learn for s in wanted.segments]


def test_fields_beside_alpaca_are_read():
    raw = {'instruction': 'Name it.', 'output': 'Red', 'system': 'Be short.', 'history': [['Hi', 'Hello']], 'context': 'a colour'}
    record = read_record(raw)
    assert [(m.role, m.content) for m in record.messages] == [
        ('system', 'Be short.'), ('user', 'Hi'), ('assistant', 'Hello'), ('user', 'Name it.\n\na colour'), ('assistant', 'Red')]
    assert (record.input, record.output) == ('a colour', 'Red')


@pytest.mark.parametrize('turn, wanted', [
    ({'tool_calls': [{'function': {'name': 'f', 'arguments': 'town=Ulm'}}]}, "'arguments' is no JSON"),
    ({'tool_calls': [{'function': {'arguments': '{}'}}]}, "a call needs the 'name'"),
    ({'tool_cals': [call({})]}, "did you mean 'tool_calls'"), ({'reasoning_contnt': 'Hm.'}, "did you mean 'reasoning_content'"),
    ({'train': 2}, "'train' must be 0 or 1"), ({'weight': 1, 'loss': False}, 'says both'), ({'thinking': 5}, "'thinking' must be text"),
    ({'thinking': 'a', 'reasoning': 'b'}, 'say different things'), ({'images': ['a.png']}, "'images' is not read"),
    ({'content': [{'type': 'text', 'text': 'a', 'weight': 0}]}, 'counts for a whole turn')])
def test_a_key_that_would_be_lost_is_refused_by_name(turn, wanted):
    with pytest.raises(InputError) as e: read_record({'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yo'} | turn]})
    assert wanted in str(e.value)


def test_a_folder_says_its_tokens_settings_and_templates(tmp_path):
    tok = gpt2_as_json(['<|im_end|>'])
    tok.save(tmp_path)
    own = {'padding_side': 'left', 'truncation_side': 'left', 'model_max_length': 4096}
    (tmp_path/'tokenizer_config.json').write_text(json.dumps(own))
    (tmp_path/'special_tokens_map.json').write_text(json.dumps({'eos_token': '<|im_end|>'}))
    found = tokenizer_from_file(tmp_path)
    assert found.eos == '<|im_end|>'
    found.save(tmp_path/'again')
    saved = json.loads((tmp_path/'again'/'tokenizer_config.json').read_text())
    assert {k: saved[k] for k in own} == own
    (tmp_path/'tokenizer_config.json').write_text(json.dumps({'chat_template': [{'name': 'rag', 'template': WORDS}]}))
    with pytest.raises(InputError, match="none of them is 'default'"): load_template(tmp_path)


def test_own_ids_come_back_as_they_were():
    rows = [{'id': i//2, 'instruction': f'q{i}', 'output': 'a'} for i in range(4)]
    assert [r['own_id'] for r in response_rows(rows, ['x']*4)] == [0, 0, 1, 1]
    assert len({r['id'] for r in response_rows(rows, ['x']*4)}) == 4


def test_ids_of_records_differ_where_calls_do():
    made = [read_record({'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': None, 'tool_calls': [call({'n': n})]}]})
            for n in (1, 2)]
    assert made[0].id != made[1].id
