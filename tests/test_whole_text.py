"""The ids of training are the ids of the whole text, as `tokenizers` reads it, whatever the template, the vocabulary and the words"""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sft_nb.shelf import as_jinja, get_template
from sft_nb import chat
from sft_nb.basics import InputError
from sft_nb.data import read_record
from sft_nb.gguf_file import open_gguf
from sft_nb.readers import load_records
from sft_nb.rows import LEARNED, STOP, encode_prompt, encode_rows, missing_tokens
from sft_nb.templates import TextTemplate, render_prompt, render_record
from sft_nb.tokenizer import JsonTokenizer, get_gpt2_tokenizer, gpt2_as_json
from sft_nb.vocabulary import gguf_tokenizer

WORDS = ['Name a colour. Say it in one word.', 'The answer is Red. It is Blue.', 'user assistant system model', 'What is it? Tell me now.', 'USER: ### Response:\n\n',
         'It is done.\n\nNext.\n\n', 'Why?\n\nSo.\n\n', '[INST] it [/INST]']
CONTROL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|user|>', '<|assistant|>', '<|system|>', '<|end|>', '<|begin_of_text|>', '<|start_header_id|>',
           '<|end_header_id|>', '<|eot_id|>', '<bos>', '<start_of_turn>', '<end_of_turn>']
CUT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def special(words, **flags): return [AddedToken(w, special=True, normalized=False, **flags) for w in words]


def byte_vocabulary(normalizer=None):
    "Byte-level BPE with the cut of Qwen and Llama 3"
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizer
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CUT), 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(WORDS*9, trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok.add_special_tokens(special(['<s>', '</s>', *CONTROL]))
    return tok


def piece_vocabulary(space, **flags):
    "SentencePiece style: a space in front of every stretch (legacy), of the first only, of each or of none"
    tok = Tokenizer(models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
    first = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
    tok.train_from_iterator(WORDS*9, trainers.BpeTrainer(vocab_size=600, special_tokens=first, show_progress=False))
    d = json.loads(tok.to_str())
    d['added_tokens'] = [a for a in d['added_tokens'] if a['content'] in first[:3]]
    d['pre_tokenizer'] = None
    tok = Tokenizer.from_str(json.dumps(d))
    if space == 'legacy': tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    else: tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    tok.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    tok.add_special_tokens(special(CONTROL, **flags))
    return tok


def wrapped(tok): return JsonTokenizer(tok, 'case', '</s>' if tok.token_to_id('</s>') is not None else None)


KINDS = {'gpt2': get_gpt2_tokenizer().with_control_tokens(['<s>', '</s>', *CONTROL]), 'gpt2 as json': gpt2_as_json(['<s>', '</s>', *CONTROL]),
         'llama 3': wrapped(byte_vocabulary()), 'qwen': wrapped(byte_vocabulary(normalizers.NFC())), 'legacy': wrapped(piece_vocabulary('legacy')),
         'first': wrapped(piece_vocabulary('first')), 'always': wrapped(piece_vocabulary('always')), 'never': wrapped(piece_vocabulary('never')),
         'phi 3': wrapped(piece_vocabulary('legacy', rstrip=True)), 'left': wrapped(piece_vocabulary('first', lstrip=True))}
TEMPLATES = ['alpaca', 'scratchpad', 'plain', 'verbatim', 'chatml', 'smollm2', 'zephyr', 'phi3', 'llama3', 'gemma', 'llama2', 'mistral']
TALK = [t for t in TEMPLATES if t not in ('alpaca', 'scratchpad', 'plain', 'verbatim')]
words = st.lists(st.sampled_from(['Name', ' a', ' ', '  ', '\n', '\n\n', '.', ' colour', '"', "'s", '1', ':', 'é', 'e\u0301', '🙂', 'user', '</', '<|', '\t', '###', 'Red', '\u00c5', '\u212b']),
                 min_size=1, max_size=7).map(''.join)
visible = words.filter(str.strip)
quick = settings(max_examples=25, deadline=None)


def flat(row): return [i for ids in row.ids for i in ids]


def check(record, template, tokenizer):
    template = get_template(template)
    prompt, whole = render_prompt(record, template), render_record(record, template)
    row = encode_rows([record], template, tokenizer)[0]
    ids = flat(row)
    start = tokenizer.start if whole.bare else ''
    asked = tokenizer.encode_control(start + prompt.text)
    assert ids[:len(encode_prompt(record, template, tokenizer))] == encode_prompt(record, template, tokenizer)
    if len(record.messages) == 2 or not row.across: assert encode_prompt(record, template, tokenizer) == asked
    ends = [tokenizer.eos_id]*(whole.segments[-1].text == '')
    theirs = tokenizer.encode_control(start + whole.text) + ends
    if not row.across: assert ids == theirs
    else: assert ids != theirs
    return row


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('template', ['alpaca', 'scratchpad', 'plain', 'verbatim'])
@quick
@given(words, st.one_of(st.just(''), words), words)
def test_one_instruction_is_its_whole_text(kind, template, instruction, given_input, output):
    check(read_record(dict(instruction=instruction, input=given_input, output=output)), template, KINDS[kind])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('template', TALK)
@quick
@given(st.lists(visible, min_size=2, max_size=4).filter(lambda x: len(x)%2 == 0))
def test_a_conversation_is_its_whole_text(kind, template, said):
    turns = [dict(role=('user', 'assistant')[i%2], content=c) for i, c in enumerate(said)]
    check(read_record(dict(messages=turns)), template, KINDS[kind])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('template', TEMPLATES)
@quick
@given(st.lists(st.sampled_from([*CONTROL, '<s>', '</s>', '<unk>', 'a', ' ', '\n', '\ufdd0', '\ufdd1', '<|im_', 'end|>']), min_size=1, max_size=6).map(''.join))
def test_words_forge_no_control_token(kind, template, said):
    record = read_record(dict(instruction=said, input='', output=f'a{said}a'))
    plain = read_record(dict(instruction='a', input='', output='a'))
    tokenizer = KINDS[kind]
    marks = [[i for i in flat(encode_rows([r], template, tokenizer)[0]) if i in tokenizer.control_ids] for r in (record, plain)]
    assert marks[0] == marks[1]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('template', TEMPLATES)
@quick
@given(visible, visible)
def test_what_is_learned_says_the_answer_and_its_stop(kind, template, asked, answer):
    answer = answer.strip()
    tokenizer = KINDS[kind]
    row = check(read_record(dict(instruction=asked.strip(), input='', output=answer)), template, tokenizer)
    learned = [i for ids, k in zip(row.ids, row.kinds) if k in (LEARNED, STOP) for i in ids]
    assert learned[-1] in tokenizer.control_ids
    if 'qwen' != kind and kind != 'left': assert answer.strip() in tokenizer.decode(learned)


@pytest.mark.parametrize('name', TALK)
def test_twice_the_turns_are_twice_the_work(name, monkeypatch):
    "Counted in messages that are printed, for words with white space around them, which many templates strip"
    real, printed = chat._render, []
    monkeypatch.setattr(chat, '_render', lambda template, messages, *rest: printed.append(len(messages)) or real(template, messages, *rest))

    def work(n, name):
        fresh = replace(get_template(name), name=f'{name} {n}') # no layout of it is known
        turns = [dict(role=('user', 'assistant')[i%2], content=f' turn {i} \n') for i in range(n)]
        printed.clear()
        render_record(read_record(dict(messages=turns)), fresh)
        return sum(printed)
    assert work(240, name) <= 4.5*work(60, name) <= 60*50


@pytest.mark.parametrize('kind', [k for k, t in KINDS.items() if isinstance(t, JsonTokenizer)])
@pytest.mark.parametrize('template', TEMPLATES)
@settings(max_examples=8, deadline=None)
@given(st.lists(visible, min_size=1, max_size=5).filter(lambda x: len(x)%2))
def test_the_prompt_is_what_transformers_asks_with(kind, template, said):
    transformers = pytest.importorskip('transformers')
    tokenizer, template = KINDS[kind], get_template(template)
    if isinstance(template, TextTemplate): said, source = said[:1], as_jinja(template, tokenizer.start)
    else: source = template.jinja
    turns = [dict(role=('user', 'assistant')[i%2], content=c) for i, c in enumerate(said)]
    named = dict(getattr(template, 'special', ())) or {'eos_token': tokenizer.eos}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.tok, **named)
    record = read_record(dict(messages=turns), need_answer=False)
    answered = read_record(dict(messages=[*turns, dict(role='assistant', content='a')]))
    asked = theirs.apply_chat_template(turns, chat_template=source, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert encode_prompt(record, template, tokenizer) == encode_prompt(answered, template, tokenizer)
    if len(turns) == 1: assert encode_prompt(record, template, tokenizer) == asked
    row = encode_rows([answered], template, tokenizer)[0]
    if not row.across: assert flat(row)[:len(asked)] == asked


# real vocabularies, which are not in the repository: a folder of GGUF files, vocabularies alone or whole models

VICUNA = """{{ 'A chat between a curious user and an assistant. ' }}{% for m in messages %}
{{- 'USER: ' ~ m.content ~ ' ' if m.role == 'user' else 'ASSISTANT: ' ~ m.content ~ '</s>' }}{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}"""
FAMOUS = {'vicuna': lambda: chat.ChatTemplate('vicuna', VICUNA)} | {name: lambda name=name: get_template(name) for name in ('alpaca', 'llama2', 'mistral', 'zephyr', 'chatml')}
FOLDER = os.environ.get('SFT_NB_VOCABULARIES', '')


def space_first(tokenizer):
    "The same vocabulary with a space in front of the first word only, as newer files of SentencePiece kinds have it; None where that means nothing"
    parts = json.loads(tokenizer.tok.to_str())
    if 'Prepend' not in json.dumps(parts['normalizer']): return None
    parts |= {'normalizer': None, 'pre_tokenizer': {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False}}
    return JsonTokenizer(Tokenizer.from_str(json.dumps(parts)), tokenizer.name, tokenizer.eos, config=tokenizer.config)


@pytest.mark.slow
@pytest.mark.parametrize('path', sorted(Path(FOLDER).glob('*.gguf')) if FOLDER else [None], ids=lambda p: p.stem if p else 'none')
def test_our_set_in_real_vocabularies_is_its_whole_text(path):
    "All 1,100 records under six famous wordings: equal to what `tokenizers` makes of the whole text, but for tokens across the border, which are named"
    if path is None: pytest.skip('SFT_NB_VOCABULARIES names no folder of .gguf files')
    get, _ = open_gguf(path)
    try: real = gguf_tokenizer(get, path.stem)
    except InputError as e: pytest.skip(str(e))
    records = load_records(Path(__file__).parent.parent/'data/sft/train/instruction-data.json')
    for own in filter(None, (real, space_first(real))):
        for name, template in FAMOUS.items():
            tokenizer = own.with_control_tokens(missing_tokens(template(), own))
            rows = encode_rows(records, template(), tokenizer)
            n_across = 0
            for record, row in zip(records, rows):
                whole = render_record(record, template())
                start = tokenizer.start if whole.bare else ''
                theirs = tokenizer.tok.encode(start + whole.text, add_special_tokens=False).ids + [tokenizer.eos_id]*(whole.segments[-1].text == '')
                n_across += bool(row.across)
                assert (flat(row) == theirs) != bool(row.across), (path.stem, name, record.where)
            for record, row in zip(records[::50], rows[::50]):
                prompt = encode_prompt(record, template(), tokenizer)
                assert flat(row)[:len(prompt)] == prompt, (path.stem, name, record.where)
            print(f'{path.stem:34} {name:8} {len(rows)-n_across:,} equal, {n_across} with a token across the border')
