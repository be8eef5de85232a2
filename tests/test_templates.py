"01_templates and 01a_chat against transformers' own rendering, and against the models' formats written down a second time."
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sft_nb import chat
from sft_nb.basics import InputError, load_json, save_json
from sft_nb.data import as_records
from sft_nb.templates import TextTemplate, format_input, render_prompt, render_record
from sft_nb.chat import ChatTemplate
from sft_nb.shelf import as_jinja, get_template, load_template, save_template, template_names
from sft_nb.tokenizer import JsonTokenizer, get_gpt2_tokenizer, set_start
from sft_nb.rows import missing_tokens

ROOT = Path(__file__).resolve().parent.parent
CHAT = [n for n in template_names() if isinstance(get_template(n), ChatTemplate)]
TEXT = [n for n in template_names() if isinstance(get_template(n), TextTemplate)]
loosely = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


# -- conversations: any text, and often what templates and searches trip over

traps = st.sampled_from([
    '', ' ', '\n', ' x', 'x \n', '<|im_end|>', '<|im_start|>assistant\n', '</s>', '[/INST]', '### Response:', '{{ 1 }}',
    '{% raw %}', '\ue000', '\ue000\ue001', '\ue0020\ue002', '<end>', '<<SYS>>', 'Hi', '\u2028', '🙂', '\r\n'])
content = st.lists(traps | st.text(st.characters(exclude_categories=['Cs']), max_size=8), max_size=4).map(''.join)
pair = st.tuples(st.tuples(st.just('user'), content), st.tuples(st.just('assistant'), content))
pairs = st.lists(pair, min_size=1, max_size=4)
alternating = st.builds(lambda system, pairs: system + [turn for pair in pairs for turn in pair],
                        st.just([]) | content.map(lambda c: [('system', c)]), pairs)
disordered = st.lists(st.tuples(st.sampled_from(['system', 'user', 'assistant']), content), max_size=4).map(
    lambda turns: turns + [('assistant', 'Done.')])
conversation = (alternating | disordered).map(lambda turns: [{'role': r, 'content': c} for r, c in turns])


def bare_tokenizer(**special):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({'?': 0}, '?')), **special)


def oracle(template, messages, ask=False):
    "What transformers prints, or None where it refuses"
    tokenizer = bare_tokenizer(**dict(template.special))
    tokenizer.chat_template = template.jinja
    try: return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except TemplateError: return None


def record_of(messages): return as_records([{'messages': messages}])[0]


def check_laws(record, template):
    "What must hold for every record and template; gives the rendered record"
    template = get_template(template)
    whole, prompt = render_record(record, template), render_prompt(record, template)
    assert whole.segments[:len(prompt.segments)] == prompt.segments
    answers = [i for i, m in enumerate(record.messages) if m.role == 'assistant']
    assert [s.turn for s in whole.segments if s.stop][-1] == answers[-1]
    assert len([s for s in whole.segments if s.stop and s.turn == answers[-1]]) == 1
    for s in whole.segments:
        assert s.text or s.stop
        assert not s.learn or s.role == 'assistant'
        if not s.control: assert s.role == record.messages[s.turn].role
    return whole


# -- the formats of the built-in templates, written down a second time without Jinja

def refuse_disorder(turns):
    if any(m['role'] != ('assistant' if i % 2 else 'user') for i, m in enumerate(turns)): raise ValueError


def chatml(turns, ask):
    said = ''.join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in turns)
    return said + ('<|im_start|>assistant\n' if ask else '')


def smollm2(turns, ask):
    named = '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n'
    return ('' if turns[0]['role'] == 'system' else named) + chatml(turns, ask)


def phi3(turns, ask):
    said = ''.join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in turns)
    return said + ('<|assistant|>\n' if ask else '<|endoftext|>')


def zephyr(turns, ask):
    return ''.join(f"<|{m['role']}|>\n{m['content']}</s>\n" for m in turns) + ('<|assistant|>\n' if ask else '')


def llama3(turns, ask):
    head = lambda role: f'<|start_header_id|>{role}<|end_header_id|>\n\n'
    return '<|begin_of_text|>' + ''.join(f"{head(m['role'])}{m['content'].strip()}<|eot_id|>" for m in turns) + \
        (head('assistant') if ask else '')


def gemma(turns, ask):
    refuse_disorder(turns)
    name = {'user': 'user', 'assistant': 'model'}
    said = ''.join(f"<start_of_turn>{name[m['role']]}\n{m['content'].strip()}<end_of_turn>\n" for m in turns)
    return '<bos>' + said + ('<start_of_turn>model\n' if ask else '')


def mistral(turns, ask):
    refuse_disorder(turns)
    asked, said = '[INST] {content} [/INST]', '{content}</s>'
    return '<s>' + ''.join((asked if m['role'] == 'user' else said).format(**m) for m in turns)


def llama2(turns, ask):
    start = ''
    if turns[0]['role'] == 'system': start, turns = f"<<SYS>>\n{turns[0]['content']}\n<</SYS>>\n\n", turns[1:]
    refuse_disorder(turns)
    out = ''
    for m in turns:
        if m['role'] == 'assistant': out += f" {m['content'].strip()} </s>"
        else: out, start = out + f"<s>[INST] {(start + m['content']).strip()} [/INST]", ''
    return out


FORMATS = {f.__name__: f for f in (chatml, smollm2, phi3, zephyr, llama3, gemma, mistral, llama2)} | {'hermes': chatml}


def test_every_chat_template_has_a_second_description(): assert sorted(FORMATS) == CHAT


@pytest.mark.parametrize('name', CHAT)
@loosely
@given(messages=conversation)
def test_built_in_equals_transformers_and_its_format(name, messages):
    template = get_template(name)
    wanted = [oracle(template, messages), oracle(template, messages[:-1], ask=True) if len(messages) > 1 else None]
    for text, turns, ask in zip(wanted, (messages, messages[:-1]), (False, True)):
        if not turns: continue
        try: assert FORMATS[name](turns, ask) == text
        except ValueError: assert text is None
    assume(len(messages) > 1)
    if None in wanted:
        with pytest.raises(InputError, match='refuses the conv|leaves it out'): render_record(record_of(messages), get_template(name))
        return
    whole = check_laws(record_of(messages), name)
    assert [whole.text, render_prompt(record_of(messages), get_template(name)).text] == wanted


@pytest.mark.parametrize('name', CHAT)
@loosely
@given(messages=alternating.map(lambda turns: [{'role': r, 'content': c} for r, c in turns if r != 'system']))
def test_what_is_learned_is_each_answer_as_printed_and_its_stop(name, messages):
    template = get_template(name)
    whole = check_laws(record_of(messages), name)
    strips = name in ('llama2', 'llama3', 'gemma')
    for i, m in enumerate(messages):
        said = ''.join(s.text for s in whole.segments if s.turn == i and not s.control)
        assert said == (m['content'].strip() if strips else m['content'])
        learned = ''.join(s.text for s in whole.segments if s.turn == i and s.learn)
        outer = ' ' if name == 'llama2' else ''
        assert learned == (outer + said + outer + template.stop if m['role'] == 'assistant' else '')
        assert len([s for s in whole.segments if s.turn == i and s.stop]) == (m['role'] == 'assistant')


@loosely
@given(messages=conversation)
def test_a_weight_of_zero_is_read_only(messages):
    marked = [m | {'weight': 0} if m['role'] == 'assistant' else m for m in messages[:-1]] + messages[-1:]
    whole = check_laws(record_of(marked), 'chatml')
    assert {s.turn for s in whole.segments if s.learn} == {len(messages)-1}


# -- templates from elsewhere: every construction that model folders bring

BOS_EOS = ('bos_token', '<s>'), ('eos_token', '</s>')
THINKS = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
  {%- set thought = '' %}
  {%- set said = m.content %}
  {%- if '</think>' in m.content %}
    {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
    {%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}
  {%- endif %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
  {%- else %}{{- said }}{% endif %}
  {{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

FOREIGN = {
    'generation-tags': """{% for m in messages %}{{ '<|' + m['role'] + '|>' }}
{%- if m['role'] == 'assistant' %}{% generation %}
{{- m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""",
    'macro-and-loop-controls': """{% macro turn(role, text) %}{{ role|upper }}: {{ text }}<end>{% endmacro %}
{%- for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ turn(m.role, m.content) }}
{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}""",
    'calendar-and-tools': """{% if tools is not none %}{{ tools|tojson(indent=2) }}{% endif %}{{ bos_token }}
{%- if strftime_now is defined %}Today is {{ strftime_now('%d %b %Y') }}.\n{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m['content'] }}</s>{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}""",
    'system-moves-to-the-last-user': """{% set first, rest = '', messages %}
{%- if messages[0]['role'] == 'system' %}{% set first, rest = messages[0]['content'], messages[1:] %}{% endif %}
{{- bos_token }}{% for m in rest %}{% if m['role'] == 'user' %}[INST] {% if loop.last or
    (loop.index == rest|length - 1 and rest[-1]['role'] == 'assistant') %}
{{- first + '\n\n' if first else '' }}{% endif %}
{{- m['content'] }}[/INST]{% else %}{{ ' ' + m['content']|trim + eos_token }}{% endif %}{% endfor %}""",
    'blank-system-left-out': """{% for m in messages %}
{%- if m.role == 'system' and not m.content.strip() %}{% continue %}{% endif %}
{{- '<' ~ m.role ~ '>' ~ m.content ~ '<end>' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}""",
    'as-json': """{% for m in messages %}{{ m.role }}={{ m.content|tojson }};{% endfor %}
{{- 'assistant=' if add_generation_prompt }}""",
    'no-stop': """{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}
{{- 'assistant: ' if add_generation_prompt }}""",
    'stop-at-the-very-end': """{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}
{{- 'assistant: ' if add_generation_prompt else eos_token }}""",
    'indented': """{% for m in messages %}
    {% if m.role == 'assistant' %}
        {{- 'A: ' ~ m.content ~ eos_token }}
    {% else %}
        {{- m.role|title ~ ': ' ~ m.content ~ '\n' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
    {{- 'A: ' -}}
{% endif %}""",
    'thinks': THINKS,
}


@pytest.mark.parametrize('name', FOREIGN)
@settings(loosely, max_examples=80)
@given(messages=alternating.map(lambda turns: [{'role': r, 'content': c} for r, c in turns]))
def test_foreign_template_equals_transformers(name, messages):
    template = ChatTemplate(name, FOREIGN[name], BOS_EOS, date=str(date.today()))
    wanted = oracle(template, messages), oracle(template, messages[:-1], ask=True)
    assert None not in wanted
    whole = check_laws(record_of(messages), template)
    assert (whole.text, render_prompt(record_of(messages), template).text) == wanted
    said = ''.join(s.text for s in whole.segments if s.turn == len(messages)-1 and not s.control)
    last = messages[-1]['content']
    assert said in (last, last.strip(), last.lstrip('\n'), json.dumps(last, ensure_ascii=False)[1:-1])


def test_only_the_last_answer_ends_with_the_tokenizers_own_token():
    turns = [{'role': r, 'content': r} for r in ('user', 'assistant')*3]
    whole = render_record(record_of(turns), ChatTemplate('no-stop', FOREIGN['no-stop']))
    assert [(s.text, s.turn) for s in whole.segments if s.stop] == [('', 5)]
    assert [s.text for s in whole.segments if s.learn] == ['assistant', 'assistant', 'assistant', '']


@pytest.mark.parametrize('name', ['chatml', 'llama3', 'alpaca'])
def test_an_answer_of_weight_zero_is_not_learned(name):
    turns = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello', 'weight': 0}]
    assert not any(s.learn for s in render_record(record_of(turns), get_template(name)).segments)


def test_empty_thoughts_are_read_and_others_are_learned():
    template = ChatTemplate('thinks', THINKS)
    turns = [{'role': 'user', 'content': 'Q'}, {'role': 'assistant', 'content': 'A'}]
    whole = render_record(record_of(turns), template)
    assert [s.text for s in whole.segments if s.learn] == ['A', '<|im_end|>'], 'an empty thought is read'
    assert whole.text.endswith('<think>\n\n</think>\n\nA<|im_end|>\n')
    turns[1]['content'] = '<think>\nhm\n</think>\n\nA'
    thinks = render_record(record_of(turns), template)
    assert [s.text for s in thinks.segments if s.learn] == ['<think>\n', 'hm', '\n</think>\n\n', 'A', '<|im_end|>']


@pytest.mark.parametrize('name, source, wanted', [
    ('twice', '{% for m in messages %}{{ m.content ~ m.content }}<end>{% endfor %}', 'prints it more than once'),
    ('deaf', '{% for m in messages if loop.last %}{{ m.content }}<end>{% endfor %}', 'refuses the conversation'),
    ('forgets', '{% for m in messages %}{% if m.role != "user" %}{{ m.content }}{% endif %}<end>{% endfor %}',
     'turn 0: .* leaves it out'),
    ('length', '{% for m in messages %}{{ m.content|length ~ m.content }}<end>{% endfor %}', 'changes other text'),
    ('sly', '{{ messages[0].content }}{{ ">>" if add_generation_prompt else ">" ~ messages[1].content }}', 'asks with'),
    ('raises', '{{ raise_exception("no, never") }}', "refuses the conversation .*no, never"),
    ('crashes', '{{ messages[0].nothing.at.all }}', 'refuses the conversation .*has no attribute'),
    ('divides', '{{ 1 // 0 }}', 'refuses the conversation'),
    ('endless', '{% for i in range(10**9) %}x{% endfor %}', 'refuses the conversation .*Range too big'),
    ('breaks-out', '{{ messages.__class__.__mro__ }}', 'refuses the conversation .*unsafe'),
    ('writes', '{{ messages.append(1) }}', 'refuses the conversation .*unsafe'),
    ('syntax', '{% for m in %}', r'chat template line 1: is not Jinja'),
])
def test_what_cannot_be_taken_apart_is_refused_in_one_line(name, source, wanted):
    turns = [{'role': 'user', 'content': 'What is it?'}, {'role': 'assistant', 'content': 'A pear.'}]
    with pytest.raises(InputError, match=wanted) as e: render_record(record_of(turns), ChatTemplate(name, source))
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize('source, stop', [
    ('{{ messages[-1].content }}<|im_end|>\n<|endoftext|>', '<|im_end|>'), ('{{ messages[-1].content }} </s>', '</s>'),
    ('{{ messages[-1].content ~ eos_token }}', 'EOS'), ('{{ messages[-1].content }}[|endofturn|]\n', '[|endofturn|]'),
    ('{{ messages[-1].content }}<｜end▁of▁sentence｜>', '<｜end▁of▁sentence｜>'), ('{{ messages[-1].content }}\n', None),
    ('{{ raise_exception("never") }}', None)])
def test_the_stop_is_found(source, stop): assert ChatTemplate('x', source, (('eos_token', 'EOS'),)).stop == stop


def test_same_pieces_by_the_short_way_and_the_long(monkeypatch):
    turns = [('system', ''), ('user', ' a '), ('assistant', 'b\n'), ('user', '<|im_end|>'), ('assistant', ' ')]
    turns = [{'role': r, 'content': c} for r, c in turns]
    quick = [render_record(record_of(turns), get_template(n)) for n in ('chatml', 'phi3', 'llama3', 'zephyr')]
    monkeypatch.setattr(chat, '_fill', lambda *args: None)
    assert quick == [render_record(record_of(turns), get_template(n)) for n in ('chatml', 'phi3', 'llama3', 'zephyr')]


# -- templates of plain words

OFFICIAL = {
    True: "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
          "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
          "### Response:3",
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the request."
           "\n\n### Instruction:\nAdd.\n\n### Response:3",
}


@pytest.mark.parametrize('given_input', [True, False])
def test_official_alpaca_byte_for_byte(given_input):
    record = as_records([{'instruction': 'Add.', 'input': '1, 2' if given_input else '', 'output': '3'}])[0]
    assert render_record(record, get_template('alpaca')).text == OFFICIAL[given_input]


@loosely
@given(instruction=content, given_input=content, output=content)
def test_text_templates(instruction, given_input, output):
    record = as_records([{'instruction': instruction, 'input': given_input, 'output': output}])[0]
    assert render_prompt(record, get_template('scratchpad')).text == format_input(record.raw) + '\n\n### Response:\n'
    for name in TEXT:
        whole = check_laws(record, name)
        assert whole.text.endswith(output) and whole.text == render_prompt(record, get_template(name)).text + output
        assert [s.text for s in whole.segments if s.learn] == [output, ''][not output:]


@pytest.mark.parametrize('name', TEXT)
@loosely
@given(instruction=content, given_input=content, output=content)
def test_text_template_as_jinja_equals_itself_in_transformers(name, instruction, given_input, output):
    record = as_records([{'instruction': instruction, 'input': given_input, 'output': output}])[0]
    template = ChatTemplate('x', as_jinja(get_template(name)), (('eos_token', '</s>'),))
    turns = [{'role': 'user', 'content': instruction, 'input': given_input}, {'role': 'assistant', 'content': output}]
    assert oracle(template, turns[:1], ask=True) == render_prompt(record, get_template(name)).text
    assert oracle(template, turns) == render_record(record, get_template(name)).text + '</s>'
    assert oracle(template, turns + turns) is None


def test_conversations_and_system_messages_do_not_fit_alpaca():
    for roles in ('system', 'user', 'assistant'), ('user', 'assistant', 'user', 'assistant'), ('assistant',):
        with pytest.raises(InputError, match="holds one instruction and one answer, got roles"):
            render_record(record_of([{'role': r, 'content': 'x'} for r in roles]), get_template('alpaca'))


def test_a_record_without_an_answer_is_a_prompt():
    record = as_records([{'messages': [{'role': 'user', 'content': 'Hi'}]}], need_answer=False)[0]
    assert render_prompt(record, get_template('chatml')).text == '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    with pytest.raises(InputError, match='record 0: has no answer to learn'): render_record(record, get_template('chatml'))


def test_turns_after_the_last_answer_are_in_no_segment():
    turns = [{'role': r, 'content': c} for r, c in (('user', 'Hi'), ('assistant', 'Hello'), ('user', 'Bye'))]
    assert render_record(record_of(turns), get_template('chatml')) == render_record(record_of(turns[:2]), get_template('chatml'))
    for name in TEXT:
        with pytest.raises(InputError, match='holds 2 user turns'): render_record(record_of(turns), get_template(name))


# -- in a model's folder

def test_no_operating_system_error_about_a_name(tmp_path, monkeypatch):
    source = get_template('chatml').jinja*9
    for name in source, source.replace('\n', ' '), 'a\0b':
        with pytest.raises(InputError, match='template: unknown name') as e: get_template(name)
        assert '\n' not in str(e.value) and len(str(e.value)) < 300
    def denied(path, *args, **more): raise PermissionError(13, 'Permission denied', str(path))
    with monkeypatch.context() as root_may_not:
        root_may_not.setattr(os, 'stat', denied)
        with pytest.raises(InputError, match='template: unknown name'): get_template(tmp_path/'locked')
        with pytest.raises(FileNotFoundError, match='has no chat template'): load_template(tmp_path)


def test_transformers_reads_what_we_save(tmp_path):
    for name in template_names():
        bare_tokenizer(bos_token='<s>', eos_token='</s>').save_pretrained(tmp_path)
        save_template(tmp_path, name)
        record = record_of([{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}])
        loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        printed = loaded.apply_chat_template(record.raw['messages'][:1], tokenize=False, add_generation_prompt=True)
        assert printed == render_prompt(record, get_template(name)).text
        assert load_template(tmp_path) == get_template(name) == get_template(tmp_path)


def small_tokenizer(kind):
    "A tokenizer of each kind that model folders hold, with that kind's begin and end tokens"
    if kind == 'gpt2': return get_gpt2_tokenizer()
    words = ['Hi. Name a colour, and say it again.', 'Red is one. Blue is one.', 'user assistant system model']*9
    named = {'pieces': ('<s>', '</s>'), 'unigram': ('<bos>', '<eos>'), 'bytes': (None, '<|im_end|>'), 'llama3': ('<|begin_of_text|>', '<|eot_id|>')}[kind]
    special = ['<unk>', *(t for t in named if t)]
    if kind == 'pieces':
        tok = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True))
        tok.normalizer = normalizers.Sequence([normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    elif kind == 'unigram':
        tok = Tokenizer(models.Unigram())
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first')
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token='<unk>', show_progress=False)
    else:
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    tok.train_from_iterator(words, trainer)
    bos, eos = named
    if bos: set_start(tok, bos)
    return JsonTokenizer(tok, kind, eos, config={'bos_token': bos} if bos else {})


@pytest.mark.parametrize('kind', ['gpt2', 'pieces', 'unigram', 'bytes', 'llama3'])
@pytest.mark.parametrize('name', template_names())
def test_a_saved_folder_prints_the_text_that_was_trained(tmp_path, name, kind):
    if kind == 'gpt2' and name not in ('alpaca', 'llama3', 'zephyr'): pytest.skip('GPT-2 is large, and its kind is that of bytes')
    template, tokenizer = get_template(name), small_tokenizer(kind)
    tokenizer = tokenizer.with_control_tokens(missing_tokens(template, tokenizer))
    tokenizer.save(tmp_path)
    save_template(tmp_path, template, tokenizer.start)
    assert load_template(tmp_path) == template
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{'role': 'user', 'content': 'Name a colour'}, {'role': 'assistant', 'content': 'Red'},
             {'role': 'user', 'content': 'Again'}, {'role': 'assistant', 'content': 'Blue'}]
    for messages in [turns[:2]] + [turns]*(name in CHAT):
        record = record_of(messages)
        front = tokenizer.start if template.bare else ''
        end = getattr(tokenizer, 'eos', '<|endoftext|>')
        ours = front + ''.join(s.text or end for s in render_record(record, template).segments)
        assert theirs.apply_chat_template(messages, tokenize=False) == ours, messages
        asked = theirs.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert asked == front + render_prompt(record, template).text


def test_we_read_what_transformers_saves(tmp_path):
    tokenizer = bare_tokenizer(bos_token='<s>', eos_token='</s>')
    tokenizer.chat_template = get_template('llama2').jinja
    tokenizer.save_pretrained(tmp_path)
    template = load_template(tmp_path)
    assert dict(template.special) | dict(BOS_EOS) == dict(template.special) and template.stop == '</s>'
    record = record_of([{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}])
    assert render_record(record, template).segments == render_record(record, get_template('llama2')).segments
    assert template.fingerprint == get_template('llama2').fingerprint


def test_old_model_folders(tmp_path):
    jinja = get_template('mistral').jinja
    named = [{'name': 'tool_use', 'template': 'no'}, {'name': 'default', 'template': jinja}]
    eos = {'content': '</s>', 'lstrip': False}
    save_json(tmp_path/'tokenizer_config.json', {'chat_template': named, 'eos_token': eos})
    save_json(tmp_path/'special_tokens_map.json', {'bos_token': '<s>', 'eos_token': None})
    template = load_template(tmp_path)
    assert (template.jinja, template.special) == (jinja, BOS_EOS)
    save_json(tmp_path/'tokenizer_config.json', {'chat_template': None})
    with pytest.raises(FileNotFoundError, match='has no chat template; choose one'): load_template(tmp_path)


def test_an_edited_template_is_noticed(tmp_path):
    save_template(tmp_path, 'phi3')
    source = (tmp_path/'chat_template.jinja').read_text()
    (tmp_path/'chat_template.jinja').write_text(source + ' ')
    with pytest.raises(InputError, match='its template was changed after training'): load_template(tmp_path)
    save_template(tmp_path, 'alpaca')
    described = load_json(tmp_path/'sft_template.json')
    save_json(tmp_path/'sft_template.json', described | {'without_input': '{instruction}'})
    with pytest.raises(InputError, match='its template was changed'): load_template(tmp_path)
    for broken in {'name': 'x'}, [], {'with_input': 1}, {'with_input': '', 'without_input': '', 'name': 'x', 'more': 1}:
        save_json(tmp_path/'sft_template.json', broken)
        with pytest.raises(InputError, match='sft_template.json: '): load_template(tmp_path)


def test_fingerprints_tell_templates_apart():
    prints = {get_template(n).fingerprint for n in template_names()}
    assert len(prints) == len(template_names()) and all(len(p) == 64 for p in prints)
    one, other = (ChatTemplate('x', '{{ bos_token }}', (('bos_token', b), ('pad_token', b))) for b in ('<s>', '<b>'))
    assert one.fingerprint != other.fingerprint != replace(other, jinja='{{ eos_token }}').fingerprint
    assert replace(one, jinja='').fingerprint == replace(other, jinja='').fingerprint, 'tokens that are never printed'
    assert replace(one, date='2020-02-02').fingerprint == one.fingerprint
    clock = ChatTemplate('x', "{{ strftime_now('%Y') }}")
    assert replace(clock, date='2020-02-02').fingerprint != clock.fingerprint
    code = "from sft_nb.shelf import *; print(*(get_template(n).fingerprint for n in template_names()))"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                         env=os.environ | {'PYTHONHASHSEED': '5'}).stdout
    assert set(out.split()) == prints


def test_import_needs_no_torch():
    code = "import sys, sft_nb.shelf; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == '[]'
