"00_data, 00a_readers, 00b_lint and 00e_split beyond what a cell can hold: broken files, large files, other processes, an exhaustive oracle."
import gzip
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from sft_nb import basics, lint, readers
from sft_nb.basics import Groups, InputError, load_json, save_json, write_atomic
from sft_nb.data import Split, as_records
from sft_nb.readers import default_data_file, iter_records, load_records, save_records
from sft_nb.split import split_records

ROOT = Path(__file__).resolve().parent.parent
GOOD = {'instruction': 'Name the opposite.', 'input': 'hot', 'output': 'cold'}
text = st.text(st.characters(exclude_categories=['Cs']))


def alpaca(**changes): return json.dumps(GOOD | changes)


def python(code, check=True, **more):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, cwd=ROOT, check=check, **more)


# -- the corpus of broken files: name -> (content, part of the one line that the user reads)

BROKEN = {
    'empty.json': (b'', 'holds no records'),
    'blank.json': (b' \n\n ', 'holds no records'),
    'no-records.json': (b'[]', 'holds no records'),
    'cut-in-string.json': (f'[{alpaca()}, {{"instruction": "Na'.encode(), 'record 1: ends in the middle'),
    'cut-after-record.json': (f'[{alpaca()},'.encode(), 'record 1: ends in the middle'),
    'cut-before-bracket.json': (f'[{alpaca()}'.encode(), "the list's closing bracket is missing"),
    'cut-line.jsonl': (f'{alpaca()}\n{alpaca()[:-9]}'.encode(), 'line 2: ends in the middle'),
    'cut-literal.jsonl': (b'{"instruction": nul', 'line 1: ends in the middle'),
    'trailing-comma.json': (f'[{alpaca()},\n]'.encode(), "a comma stands before the list's closing bracket"),
    'trailing-comma-object.json': (b'[{"instruction": "a",}]', 'a comma stands before a closing bracket at line 1'),
    'no-comma.json': (f'[{alpaca()}\n{alpaca()}]'.encode(), "line 2: after record 0 a comma is missing, got '{'"),
    'text-after.json': (f'[{alpaca()}] and more'.encode(), "text after the list's closing bracket, got 'and more'"),
    'two-on-a-line.jsonl': (f'{alpaca()} {alpaca()}'.encode(), 'line 1: holds more than one value'),
    'cut-list-on-a-line.json': (json.dumps([GOOD, GOOD])[:-9].encode(), 'record 1: ends in the middle'),
    'pretty-object.json': (json.dumps(GOOD, indent=4).encode(), "line 1: holds only the beginning of a value, got '{'"),
    'pretty-wrapped.json': (json.dumps({'things': [GOOD]}, indent=1).encode(), 'write one record a line, or a list in'),
    'wrapped.json': (json.dumps({'things': [GOOD]}).encode(), "format not recognised, got fields ['things']"),
    'words.json': (b'Once upon a time', 'line 1: is not JSON'),
    'single-quotes.json': (b"[{'instruction': 'a'}]", 'is not JSON'),
    'utf16.json': (f'[{alpaca()}]'.encode('utf-16'), 'is UTF-16'),
    'utf16-no-mark.json': (f'[{alpaca()}]'.encode('utf-16-le'), 'got a NUL byte'),
    'utf32.json': (f'[{alpaca()}]'.encode('utf-32'), 'is UTF-16'),
    'latin1.jsonl': (f'{alpaca()}\n{json.dumps({"instruction": "Zürich"}, ensure_ascii=False)}'.encode('latin-1'),
                     'line 2: is not UTF-8'),
    'cut-utf8.json': ('["é'.encode()[:-1], 'is not UTF-8'),
    'nul-bytes.json': (b'[{"instruction": "a\0b"}]', 'got a NUL byte'),
    'raw-control.json': (b'[{"instruction": "a\x01b"}]', 'is not JSON (Invalid control character'),
    'null-record.json': (b'[null]', 'record 0: a record must be an object with named fields, got None'),
    'list-record.json': (b'[["a", "b"]]', "got ['a', 'b']"),
    'number-record.jsonl': (b'17', 'line 1: a record must be an object with named fields, got 17'),
    'null-output.json': (f'[{alpaca(output=None)}]'.encode(), "'output' must be text, got None"),
    'number-output.json': (f'[{alpaca(output=4)}]'.encode(), "'output' must be text, got 4"),
    'nested-output.json': (f'[{alpaca(output=[[["cold"]]])}]'.encode(), "'output' must be text, got [[[...]]]"),
    'object-input.json': (f'[{alpaca(input={"a": 1})}]'.encode(), "'input' must be text, got {'a': 1}"),
    'no-output.json': (b'[{"instruction": "a"}]', "field 'output' is missing, got fields ['instruction']"),
    'no-instruction.json': (f'[{alpaca()}, {{"output": "a"}}]'.encode(), "record 1: field 'instruction' is missing"),
    'typing-error.json': (b'[{"instruction": "a", "imput": "b", "output": "c"}]',
                          "'imput' is not read; did you mean 'input'"),
    'duplicate-key.json': (b'[{"instruction": "a", "output": "b", "output": "c"}]', "key 'output' appears twice"),
    'duplicate-deep.json': (b'[{"instruction": "a", "output": "b", "x": {"y": 1, "y": 2}}]', "key 'y' appears twice"),
    'nan.json': (f'[{alpaca()[:-1]}, "score": NaN}}]'.encode(), "'NaN' is not a number that JSON can hold"),
    'huge-float.json': (f'[{alpaca()[:-1]}, "score": 1e999}}]'.encode(), "'1e999' is not a number"),
    'huge-int.json': (f'[{alpaca()[:-1]}, "score": {"9"*9999}}}]'.encode(), 'Exceeds the limit'),
    'deep-list.json': (b'['*100_000, 'nested too deeply'),
    'deep-object.jsonl': (b'{"a":'*100_000, 'nested too deeply'),
    'half-surrogate.json': (b'[{"instruction": "a", "output": "b\\ud83d"}]', 'half a surrogate pair'),
    'no-turns.jsonl': (b'{"messages": []}', 'must be a list of turns, got []'),
    'null-turns.jsonl': (b'{"messages": null}', 'must be a list of turns, got None'),
    'string-turn.jsonl': (b'{"messages": ["Hi"]}', "turn 0: a turn must be an object, got 'Hi'"),
    'null-content.jsonl': (b'{"messages": [{"role": "assistant", "content": null}]}', "turn 0: 'content' must be text"),
    'empty-parts.jsonl': (b'{"messages": [{"role": "assistant", "content": []}]}', "turn 0: 'content' must be text"),
    'image.jsonl': (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
                    "only parts of type 'text'"),
    'role.jsonl': (b'{"messages": [{"role": "assistent", "content": "a"}]}', "did you mean 'assistant'"),
    'tool.jsonl': (b'{"messages": [{"role": "narrator", "content": "a"}]}', "unknown role 'narrator'"),
    'weight.jsonl': (b'{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}',
                     "'weight' must be 0 or 1, got 2"),
    'no-answer.jsonl': (b'{"messages": [{"role": "user", "content": "a"}]}', "no turn is the assistant's"),
    'sharegpt.jsonl': (b'{"conversations": [{"from": "human", "value": 1}]}', "turn 0: 'value' must be text, got 1"),
    'completion.jsonl': (b'{"prompt": "a"}', "field 'completion' is missing"),
    'phi3.jsonl': (b'{"text": "Just a story."}', "'text' must begin with <|user|>"),
    'mixed.jsonl': (f'{alpaca()}\n{{"messages": []}}'.encode(),
                    "line 2: field 'instruction' is missing (the set is in 'alpaca'"),
    'damaged.json.gz': (gzip.compress(b'[1, 2, 3]'*99)[:-12], 'cannot be read to its end'),
    'not-gzip.json.gz': (b'\x1f\x8bnot really', 'cannot be read to its end'),
    'ragged.csv': (b'instruction,output\na,b\nc\n', 'line 3: has 1 values, but the header names 2'),
    'twice.csv': (b'output,output\na,b\n', 'a column name appears twice'),
    'quotes.csv': (b'instruction,output\n"a,b\n', 'is not CSV'),
    'latin1.csv': ('instruction,output\nZürich,b\n'.encode('latin-1'), 'is not UTF-8'),
    'header-only.csv': (b'instruction,output\n', 'holds no records'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_file_is_one_clear_line(tmp_path, name):
    content, wanted = BROKEN[name]
    (tmp_path/name).write_bytes(content)
    with pytest.raises(InputError) as e: load_records(tmp_path/name)
    message = str(e.value)
    assert wanted in message and name in message
    assert '\n' not in message and len(message) < len(str(tmp_path)) + 400
    assert '; ' in message or '?' in message, 'no word on what to do'


@pytest.mark.parametrize('name', ['null-output', 'number-output', 'no-output', 'half-surrogate', 'typing-error'])
def test_broken_record_can_be_dropped_and_is_counted(tmp_path, name):
    bad = json.loads(BROKEN[f'{name}.json'][0])
    file = tmp_path/'a.json'
    file.write_text(json.dumps([GOOD] + bad + [GOOD]))
    dropped = []
    assert len(load_records(file, dropped=dropped)) == 2
    assert len(dropped) == 1 and BROKEN[f'{name}.json'][1].removeprefix('record 1: ') in dropped[0]


def test_broken_lines_are_dropped_one_by_one(tmp_path):
    lines = [alpaca(), '{"instruction": ', alpaca(output=None), '[]', '', 'NaN', alpaca(), alpaca() + 'x']
    (tmp_path/'a.jsonl').write_text('\n'.join(lines))
    dropped = []
    assert [r.where[-6:] for r in load_records(tmp_path/'a.jsonl', dropped=dropped)] == ['line 1', 'line 7']
    assert [d.split('jsonl ')[1].split(':')[0] for d in dropped] == ['line 2', 'line 3', 'line 4', 'line 6', 'line 8']


def test_everything_dropped_is_still_an_error(tmp_path):
    (tmp_path/'a.jsonl').write_text('{"a": 1}')
    with pytest.raises(InputError, match='all 1 were dropped, the first as .*format not recognised'):
        load_records(tmp_path/'a.jsonl', dropped=[])


def test_missing_file_folder_and_rights(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such file; check the name'): load_records(tmp_path/'a.json')
    with pytest.raises(InputError, match='is a folder, not a file'): load_records(tmp_path)
    with pytest.raises(InputError, match="unknown format 'alpacca'; did you mean 'alpaca'"):
        load_records('x', fmt='alpacca')
    with pytest.raises(InputError, match="unknown format 'alpacca'; did you mean 'alpaca'"):
        as_records([GOOD], fmt='alpacca')
    with pytest.raises(InputError, match='cannot be opened, got embedded null'): load_records('a\0b')
    with pytest.raises(InputError, match='cannot be opened, got File name too long') as e:
        load_records(json.dumps([GOOD]*999, indent=1))
    assert '\n' not in str(e.value) and len(str(e.value)) < 300


def test_a_folder_without_search_rights(monkeypatch):
    def denied(path, *args, **more): raise PermissionError(13, 'Permission denied', str(path))
    with monkeypatch.context() as root_may_not, pytest.raises(InputError) as e:
        root_may_not.setattr(os, 'stat', denied)
        root_may_not.setattr(basics, 'open', denied, raising=False)
        load_records('locked/a.json')
    assert 'locked/a.json: cannot be opened, got Permission denied; check its name and its rights' in str(e.value)


def test_ten_megabytes_in_one_string(tmp_path):
    (tmp_path/'a.json').write_text(f'[{alpaca(output="x"*10_000_000)}]')
    assert len(load_records(tmp_path/'a.json')[0].output) == 10_000_000
    (tmp_path/'b.json').write_text(f'[{alpaca(output=["x"*10_000_000])}]')
    with pytest.raises(InputError) as e: load_records(tmp_path/'b.json')
    assert len(str(e.value)) < len(str(tmp_path)) + 200


def test_control_tokens_nul_and_line_separators_are_content(tmp_path):
    odd = '<|im_end|>\u2028<s>\0\x85\x1c'
    for name in 'a.json', 'a.jsonl':
        save_records(tmp_path/name, [GOOD | {'output': odd}])
        assert load_records(tmp_path/name)[0].output == odd
    kinds = [f.kind for f in lint.lint_records(load_records(tmp_path/'a.json'))]
    assert kinds[:2] == ['template marker', 'control character']


def test_byte_order_mark_crlf_and_blank_lines(tmp_path):
    (tmp_path/'a.jsonl').write_bytes(b'\xef\xbb\xbf' + f'\r\n{alpaca()}\r\n\r\n{alpaca()}'.encode())
    assert [r.where[-6:] for r in load_records(tmp_path/'a.jsonl')] == ['line 2', 'line 4']
    (tmp_path/'a.json').write_bytes(b'\xef\xbb\xbf \n' + f'[{alpaca()}\n,\n{alpaca()} ]\n'.encode())
    assert len(load_records(tmp_path/'a.json')) == 2


# -- nothing is lost on the way in and out again

scalar = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
json_value = st.recursive(scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
                          max_leaves=5)
alpaca_raw = st.builds(lambda extra, i, n, o: extra | {'instruction': i, 'input': n, 'output': o},
                       st.dictionaries(text, json_value, max_size=3), text, text, text)
turn = st.fixed_dictionaries({'role': st.sampled_from(['system', 'user', 'assistant']), 'content': text},
                             optional={'name': text})
answer = st.fixed_dictionaries({'role': st.just('assistant'), 'content': text, 'weight': st.sampled_from([0, 1])})
chat_raw = st.builds(lambda turns, last: {'messages': turns + [last]}, st.lists(turn, max_size=4), answer)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(alpaca_raw, min_size=1, max_size=4) | st.lists(chat_raw, min_size=1, max_size=4),
       name=st.sampled_from(['a.json', 'a.jsonl', 'a.json.gz', 'a.jsonl.gz']))
def test_round_trip_is_lossless(tmp_path_factory, rows, name):
    file = tmp_path_factory.mktemp('trip')/name
    save_records(file, as_records(rows))
    back = load_records(file)
    assert [r.raw for r in back] == rows
    assert [list(r.raw) for r in back] == [list(r) for r in rows], 'order of the fields'
    assert [r.id for r in back] == [r.id for r in as_records(rows)]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(json_value, max_size=6), indent=st.sampled_from([None, 0, 4]), size=st.integers(1, 40))
def test_piecewise_reading_equals_json_load(rows, indent, size):
    content = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    found = readers._list_rows(readers._list_portions(io.BytesIO(content), 'x', size), 'x')
    assert [row for _, row in found] == json.loads(content)


@settings(max_examples=100, deadline=None)
@given(content=st.text('é🙂",[\n1', max_size=60).map(str.encode), size=st.integers(1, 9))
def test_portions_of_a_list_lose_nothing(content, size):
    portions = list(readers._list_portions(io.BytesIO(content), 'x', size))
    assert ''.join(t for _, t in portions).encode() == content
    assert [n for n, _ in portions] == [1+''.join(t for _, t in portions[:i]).count('\n') for i in range(len(portions))]


def test_a_byte_order_mark_is_dropped_at_the_beginning_only():
    content = b'\xef\xbb\xbf["\xef\xbb\xbfa", "\xef\xbb\xbf"]'
    for size in 1, 2, 3, 4, 7, 99:
        found = readers._list_rows(readers._list_portions(io.BytesIO(content), 'x', size), 'x')
        assert [row for _, row in found] == ['\ufeffa', '\ufeff']


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text('[]{}",:ntrue0.\\u', max_size=40).map(str.encode))
def test_no_bytes_make_a_traceback(content):
    file = Path('/tmp')/f'sft_nb-{os.getpid()}.json'
    file.write_bytes(content)
    try: load_records(file)
    except InputError as e: assert '\n' not in str(e)
    finally: file.unlink()


def test_a_set_larger_than_one_portion(tmp_path):
    rows = [GOOD | {'output': 'é'*500, 'n': i} for i in range(8000)]
    for indent in None, 1:
        (tmp_path/'a.json').write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding='utf-8')
        assert [r.raw['n'] for r in iter_records(tmp_path/'a.json')] == list(range(8000))
    broken = (tmp_path/'a.json').read_text(encoding='utf-8').replace('"n": 7000', '"n": 7000 7', 1)
    (tmp_path/'a.json').write_text(broken, encoding='utf-8')
    with pytest.raises(InputError, match=r"record 7000: is not JSON \(Expecting ',' delimiter\) at line 42006"):
        load_records(tmp_path/'a.json')


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='counts memory as Linux does')
@pytest.mark.parametrize('between', [',\n', ', '])
def test_memory_stays_small(tmp_path, between):
    row = json.dumps(GOOD | {'output': 'wörd '*300}, ensure_ascii=False)
    (tmp_path/'a.json').write_text('[' + between.join([row]*30_000) + ']', encoding='utf-8')
    code = f"from sft_nb.readers import *; n = sum(1 for _ in iter_records({str(tmp_path/'a.json')!r})); " \
           "print(n, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    n, kilobytes = map(int, python(code).stdout.split())
    assert n == 30_000 and kilobytes < 60_000, 'the file has 48 MB'


@pytest.mark.parametrize('message, at', [('Expecting property name enclosed in double quotes', 20),
                                         ('Illegal trailing comma before end of object', 19)])
def test_both_words_of_python_for_a_trailing_comma(monkeypatch, message, at):
    class Reader:
        def raw_decode(self, text, start): raise json.JSONDecodeError(message, text, at)
    monkeypatch.setattr(basics, '_json', Reader())
    with pytest.raises(InputError, match='x: a comma stands before a closing bracket at line 1'):
        basics.parse_json('{"instruction": "a",}', 'x')


def test_rename_loses_no_field_and_wants_to_be_used(tmp_path):
    file = tmp_path/'a.jsonl'
    file.write_text('{"question": "1+1?", "instruction": "Add.", "output": "2"}\n'*2)
    with pytest.raises(InputError, match="line 1: rename gives two fields the name 'instruction', got"):
        load_records(file, rename={'question': 'instruction'})
    dropped = []
    with pytest.raises(InputError, match='all 2 were dropped'):
        load_records(file, rename={'question': 'instruction'}, dropped=dropped)
    swapped = load_records(file, rename={'question': 'instruction', 'instruction': 'question'})
    assert swapped[0].raw == {'instruction': '1+1?', 'question': 'Add.', 'output': '2'}
    with pytest.raises(InputError, match="no record has the field 'quesion' of rename; did you mean 'question'"):
        load_records(file, rename={'quesion': 'instruction'})
    file.write_text('')
    with pytest.raises(InputError, match='holds no records'): load_records(file, rename={'question': 'instruction'})


# -- other sources

def test_standard_input_plain_and_gzipped():
    code = "from sft_nb.readers import load_records; print([r.where for r in load_records('-')])"
    for content in alpaca().encode(), gzip.compress(f'[{alpaca()}]'.encode()):
        assert b'standard input' in python(code, input=content).stdout


def test_csv_keeps_text_as_text(tmp_path):
    content = '\ufeffinstruction,input,output,n\nA,,NA,007\n"B\nb","x, y","say ""hi""",1e5\n'
    (tmp_path/'a.csv').write_text(content, encoding='utf-8')
    a, b = load_records(tmp_path/'a.csv')
    assert (a.output, a.raw['n'], a.where[-6:]) == ('NA', '007', 'line 2')
    assert (b.instruction, b.input, b.output, b.where[-6:]) == ('B\nb', 'x, y', 'say "hi"', 'line 4')
    (tmp_path/'a.tsv.gz').write_bytes(gzip.compress(b'prompt\tcompletion\n2+2=\t4\n'))
    assert load_records(tmp_path/'a.tsv.gz')[0].output == '4'


def test_parquet(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    hi = {'role': 'user', 'content': 'Hi'}
    rows = [{'messages': [hi, {'role': 'assistant', 'content': f'{i}'}]} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path/'a.parquet')
    records = load_records(tmp_path/'a.parquet')
    assert [r.raw for r in records] == rows and records[-1].where.endswith('a.parquet row 2499')
    whole = (tmp_path/'a.parquet').read_bytes()
    for cut in whole[:len(whole)//2], whole[:200] + whole[260:]:
        (tmp_path/'a.parquet').write_bytes(cut)
        with pytest.raises(InputError, match='is a damaged Parquet file'): load_records(tmp_path/'a.parquet')


def test_parquet_holds_what_json_cannot(tmp_path):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq
    from datetime import datetime, timezone
    made = datetime(2026, 11, 22, 12, 30, tzinfo=timezone.utc)
    pq.write_table(pa.Table.from_pylist([GOOD | {'made': [made]}]), tmp_path/'a.parquet')
    records = load_records(tmp_path/'a.parquet')
    assert records[0].raw == GOOD | {'made': ['2026-11-22T12:30:00+00:00']}
    save_records(tmp_path/'b.json', records)
    for value in float('nan'), b'\x89PNG':
        pq.write_table(pa.Table.from_pylist([GOOD | {'extra': value}]), tmp_path/'a.parquet')
        with pytest.raises(InputError, match="parquet row 0: field 'extra' holds what JSON cannot, got (nan|b'.x89P)"):
            load_records(tmp_path/'a.parquet')
    some = pa.table({'instruction': ['a', 'b'], 'output': ['c', 'd'], 'score': pa.array([1.5, float('nan')])})
    pq.write_table(some, tmp_path/'a.parquet')
    dropped = []
    assert [r.raw['score'] for r in load_records(tmp_path/'a.parquet', dropped=dropped)] == [1.5] and len(dropped) == 1


def test_hub_set(tmp_path, monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path/'cache'))
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine').mkdir()
    save_records('mine/train.jsonl', [GOOD])
    save_records('mine/test.jsonl', [GOOD | {'output': 'cool'}])
    assert [r.raw for r in load_records('hub:mine')] == [GOOD]
    assert load_records('hub:mine:test')[0].output == 'cool'
    with pytest.raises(InputError, match='hub:nobody/nothing: cannot be loaded, got'):
        load_records('hub:nobody/nothing')


@pytest.mark.parametrize('package, path', [('datasets', 'hub:owner/name'), ('pyarrow.parquet', 'a.parquet')])
def test_missing_package_is_named(tmp_path, monkeypatch, package, path):
    monkeypatch.chdir(tmp_path)
    Path('a.parquet').write_bytes(b'PAR1'*9)
    monkeypatch.setitem(sys.modules, package, None)
    wanted = f"needs the package '{package.split('.')[0]}', which is not installed; pip install"
    with pytest.raises(InputError, match=wanted): load_records(path)


def test_import_is_light():
    heavy = "('torch', 'numpy', 'transformers', 'ftfy', 'datasets')"
    rooms = 'sft_nb.data, sft_nb.readers, sft_nb.split'
    out = python(f'import sys, {rooms}; print([m for m in {heavy} if m in sys.modules])').stdout
    assert out.strip() == b'[]'


# -- writing

def test_a_killed_writer_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path/'a.txt', 'old')
    code = f"import os; os.fsync = lambda f: os.kill(os.getpid(), 9)\n" \
           f"from sft_nb.basics import write_atomic; write_atomic({str(tmp_path/'a.txt')!r}, 'new'*9999)"
    assert python(code, check=False).returncode == -9
    assert (tmp_path/'a.txt').read_text() == 'old'


def test_a_failing_writer_leaves_no_litter(tmp_path, monkeypatch):
    write_atomic(tmp_path/'a.txt', 'old')
    def full(f): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'): write_atomic(tmp_path/'a.txt', 'new')
    assert os.listdir(tmp_path) == ['a.txt'] and (tmp_path/'a.txt').read_text() == 'old'


def test_what_json_cannot_hold_is_refused(tmp_path):
    nested = []
    for _ in range(100_000): nested = [nested]
    for value in float('inf'), {1, 2}, nested:
        with pytest.raises(InputError, match='cannot be written as JSON'): save_json(tmp_path/'a.json', {'a': value})
    assert os.listdir(tmp_path) == []
    (tmp_path/'b.json').write_text('{} {}')
    with pytest.raises(InputError, match='text after the end'): load_json(tmp_path/'b.json')


# -- splitting

def test_split_is_the_same_in_another_process():
    code = "from sft_nb.readers import *; from sft_nb.split import *; " \
           "s = split_records(load_records(default_data_file()), seed=7); "\
           "print(s.test[0].id, s.val[-1].id)"
    runs = {python(code, env=os.environ | {'PYTHONHASHSEED': str(h)}).stdout.decode() for h in (1, 2)}
    split = split_records(load_records(default_data_file()), seed=7)
    assert runs == {f'{split.test[0].id} {split.val[-1].id}\n'}


@settings(max_examples=50, deadline=None)
@given(names=st.lists(st.sampled_from('abcdefghijklmnopqrstuvwxyz'), min_size=40, max_size=80), seed=st.integers(0, 99))
def test_split_keeps_every_record_once_and_equal_prompts_together(names, seed):
    records = as_records([{'instruction': n, 'output': f'{i}'} for i, n in enumerate(names)])
    try: split = split_records(records, 0.6, 0.2, seed=seed)
    except InputError: return
    assert sorted(r.id for part in split for r in part) == sorted(r.id for r in records)
    prompts = [{r.instruction for r in part} for part in split]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])


def test_adding_records_hardly_moves_the_old_ones():
    records = load_records(default_data_file())
    before = {r.id for r in split_records(records[:1000], seed=3).train}
    after = {r.id for r in split_records(records, seed=3).train}
    assert len(before - after) < 60


def test_together_holds_indices_of_these_records():
    records = load_records(default_data_file())[:50]
    for pair in (0, 50), (-1, 0):
        with pytest.raises(InputError, match='together= holds indices from 0 to 49, got'):
            split_records(records, seed=7, together=[pair])


# -- lint

@pytest.mark.parametrize('kind, row', {
    'empty answer': {'output': 'N/A'}, 'empty question': {'instruction': ' ', 'input': ''},
    'unread field': {'rejected': 'b'},
    'placeholder input': {'input': '<noinput>'}, 'template marker': {'output': 'x### Response: y'},
    'control character': {'output': 'a\u200bb'}, 'mojibake': {'output': 'The cafÃ© is closed.'},
    'over-long': {'input': 'x'*20_001}, 'outer space': {'output': ' cold'},
    'answer repeats the prompt': {'instruction': 'z '*30 + 'z', 'input': '', 'output': 'z '*30 + 'z'},
}.items())
def test_each_lint_rule_finds_something(kind, row):
    assert kind in [f.kind for f in lint.lint_records([GOOD | row])]
    assert kind in lint.count_findings(lint.lint_records([GOOD | row]))


@pytest.mark.parametrize('text', [
    'none of them came', 'Annan', 'N', '42', '-5', '私は学生です', 'naïve café “quoted” – dash', 'a < b > c', 'Use `<s` here',
    '👩‍👩‍👧 family', 'می‌خواهم', 'line\n\ttab', 'Null Island', '!', '?', '👍', '(B)', '*', '100%'])
def test_lint_has_no_word_on_good_text(text):
    found = [f.kind for f in lint.lint_records([GOOD | {'output': text}])]
    assert found == []


def test_what_was_found_is_quoted_once():
    found = lint.lint_records([GOOD | {'output': 'a\0b ' + 'x'*20_001, 'input': '</s>'}])
    assert [f.got for f in found] == ["'</s>'", r"'\x00'", '20,005 characters']


def test_conversation_rules():
    turns = lambda *roles: {'messages': [{'role': r, 'content': f'{r} {i}'} for i, r in enumerate(roles)]}
    kinds = lambda *roles: [f.kind for f in lint.lint_records([turns(*roles)])]
    assert kinds('system', 'user', 'assistant', 'user', 'assistant') == []
    assert kinds('user', 'assistant', 'user') == ['no last answer']
    assert kinds('user', 'user', 'assistant') == ['same role twice']


# -- near duplicates, against the comparison of all pairs

def variations(n, seed):
    rng = random.Random(seed)
    words = ' '.join(r.instruction for r in load_records(default_data_file())).split()
    texts = [' '.join(rng.choice(words) for _ in range(rng.randint(4, 25))) for _ in range(n)]
    for _ in range(n//4):
        changed = texts[rng.randrange(n)].split()
        for _ in range(rng.randint(1, 3)): changed[rng.randrange(len(changed))] = rng.choice(words)
        texts[rng.randrange(n)] = ' '.join(changed)
    return texts


@pytest.mark.parametrize('threshold', [0.5, 0.7, 0.8, 0.9])
def test_search_finds_what_all_pairs_find(threshold):
    texts = variations(600, seed=5)
    grams = [lint.trigrams(t) for t in texts]
    alike = lambda i, j: len(grams[i] & grams[j])/len(grams[i] | grams[j])
    near = {(i, j): s for j in range(600) for i in range(j) if (s := alike(i, j)) >= threshold}
    found = lint.find_near_duplicates([{'instruction': t, 'output': ''} for t in texts], threshold)
    assert all(near[p.i, p.j] == p.similarity for p in found), 'nothing is reported that is not so'
    later = {j for _, j in near}
    assert len(later - {p.j for p in found}) <= len(later)*0.01
    whole, joined = Groups(600), Groups(600)
    for i, j in near: whole.join(i, j)
    for p in found: joined.join(p.i, p.j)
    assert sum(a != b for a, b in zip(whole.lists(), joined.lists())) <= 2


def test_signatures_estimate_similarity():
    texts = variations(300, seed=6)
    signatures = lint.minhash(texts, 400)
    errors = [(signatures[i] == signatures[j]).mean() - lint.similarity(texts[i], texts[j])
              for j in range(300) for i in range(max(0, j-20), j)]
    assert abs(sum(errors)/len(errors)) < 0.003 and max(map(abs, errors)) < 0.13


def test_short_empty_and_foreign_texts():
    texts = ['', ' ', 'a', 'A ', '東京', '東京', '🙂', 'x']
    found = lint.find_near_duplicates([{'instruction': t, 'output': ''} for t in texts])
    assert [(p.i, p.j) for p in found] == [(0, 1), (2, 3), (4, 5)]


def test_52000_rows_in_seconds():
    texts = variations(52_000, seed=7)
    rows = as_records([{'instruction': t, 'output': ''} for t in texts])
    start = time.perf_counter()
    found = lint.find_near_duplicates(rows)
    assert time.perf_counter() - start < 20 # 1.5 s on an idle core
    assert len(found) > 1000


def test_a_crowd_of_equal_looking_prompts_is_no_trap():
    texts = [f'Work out this sum and write the number only: what is {i} plus {i*7 % 1000}?' for i in range(1500)]
    grams = [lint.trigrams(t) for t in texts]
    later = {j for j in range(1500) if any(len(grams[i] & grams[j]) >= 0.8*len(grams[i] | grams[j]) for i in range(j))}
    start = time.perf_counter()
    found = lint.find_near_duplicates([{'instruction': t, 'output': ''} for t in texts], 0.8)
    assert time.perf_counter() - start < 20
    assert len(found) < 2*len(later), 'no more pairs than it takes to join them'
    assert len(later) > 1400 and len({p.j for p in found} ^ later) <= 15, (len(later), len(found))


def test_a_leak_behind_an_equal_prompt_is_found():
    rows = lambda *prompts: as_records([{'instruction': p, 'output': ''} for p in prompts])
    train, twice = 'Write a poem about the sea and the wind.', 'Write a poem about the sea and the winds.'
    leaks = lint.find_leaks(Split(rows('Count.', train), rows(twice, 'Stop.', twice), rows(twice.upper())))
    assert [(l.parts, l.a.instruction, l.b.instruction) for l in leaks] == [
        ('train and test', train, twice), ('train and test', train, twice), ('test and val', twice, twice.upper())]


def test_leaks_name_both_records():
    records = load_records(default_data_file())
    split = split_records(records)
    planted = {**split.train[5].raw, 'instruction': split.train[5].instruction.upper()}
    leaks = lint.find_leaks(split._replace(test=split.test + as_records([planted])))
    assert [(l.parts, l.a, l.similarity) for l in leaks] == [('train and test', split.train[5], 1.0)]
