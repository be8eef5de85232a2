"Files as users have them: columns with other names, keys that nobody reads, leaks, answers a line"
import ast
import csv
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_nb.basics import InputError
from sft_nb.columns import FieldBook
from sft_nb.data import read_record
from sft_nb.numbers import report_data
from sft_nb.readers import load_records
from sft_nb.responses import answer_file, load_meta, load_responses, prompt_and_reference, response_rows, save_responses

ROOT = Path(__file__).resolve().parent.parent

PAIRS = [{'instruction': f'Add {i} and {i}.', 'input': '', 'output': f'{2*i}'} for i in range(12)]


@pytest.mark.parametrize('name', ['a.json', 'a.jsonl', 'a.json.gz', 'a.jsonl.gz'])
def test_a_file_of_answers_is_what_its_name_says(tmp_path, name):
    rows = answer_file(tmp_path/name, PAIRS, lambda records: [r.output for r in records], {'model': name}, batch_size=5)
    data = (tmp_path/name).read_bytes()
    text = (gzip.decompress(data) if name.endswith('.gz') else data).decode()
    whole = [json.loads(line) for line in text.splitlines()] if 'jsonl' in name else json.loads(text)
    assert whole == rows == load_responses(tmp_path/name)
    assert load_meta(tmp_path/name)['settings'] == {'model': name}
    assert report_data(None, tmp_path/name).headline.after == 100


def test_files_of_all_kinds_side_by_side_keep_their_own_facts(tmp_path):
    names = ['a.json', 'a.jsonl', 'a.json.gz', 'a.jsonl.gz']
    for name in names: save_responses(tmp_path/name, PAIRS, ['x']*12, {'model': name})
    assert [load_meta(tmp_path/name)['settings']['model'] for name in names] == names


def test_a_name_that_cannot_be_written_is_refused_before_anything_is_answered(tmp_path):
    asked = []
    for name in 'a.csv', 'a.parquet', 'a':
        with pytest.raises(InputError, match='written as .json or .jsonl'): answer_file(tmp_path/name, PAIRS, asked.extend, {})
    assert not asked and not list(tmp_path.iterdir())


@pytest.mark.parametrize('ids', [[7]*12, [i/2 for i in range(12)], [i//2 for i in range(12)], ['a']*12, [None, *range(11)], [0.5]*12, [True, *range(11)]])
def test_a_users_own_ids_come_back_as_they_were(tmp_path, ids):
    rows = [row | {'id': i, 'own_id': 'mine'} for row, i in zip(PAIRS, ids)]
    answered = response_rows(rows, ['x']*12)
    assert len({row['id'] for row in answered}) == 12 and [row['own_id'] for row in answered] == ['mine']*12
    assert [row.get('own_id_2', row['id']) for row in answered] == ids
    plain = response_rows([row | {'id': i} for row, i in zip(PAIRS, ids)], ['x']*12)
    assert [row.get('own_id', row['id']) for row in plain] == ids and [type(row.get('own_id', row['id'])) for row in plain] == list(map(type, ids))


# columns with other names

NAMES = [('question', 'answer'), ('query', 'response'), ('Question', 'Answer'), ('prompt', 'response'), ('prompt', 'completion'), ('prompt', 'answer'),
         ('instruction', 'response'), ('instruction', 'answer'), ('Instruction', 'Output'), ('input', 'output'), ('problem', 'solution'),
         ('user', 'assistant'), ('question', 'output'), ('QUERY', 'Response'), ('inputs', 'target')]


@pytest.mark.parametrize('asks, answers', NAMES)
@pytest.mark.parametrize('kind', ['csv', 'jsonl', 'json', 'data.json', 'parquet'])
def test_usual_names_are_read_from_every_kind_of_file(tmp_path, asks, answers, kind):
    rows = [{'id': str(i), asks: f'What is {i}?', answers: f'{i}'} for i in range(4)]
    path = write_rows(tmp_path/f'a.{kind}', rows)
    records = load_records(path)
    assert [(r.instruction, r.output) for r in records] == [(f'What is {i}?', f'{i}') for i in range(4)]
    assert [r.raw for r in records] == rows                      # the answers are written under the file's own names
    answered = response_rows(records, ['x']*4)
    save_responses(tmp_path/'answers.jsonl', records, ['x']*4)
    assert load_responses(tmp_path/'answers.jsonl') == answered and prompt_and_reference(answered[1]) == ('What is 1?', '1')


def write_rows(path, rows):
    "Rows in the form that the file's name says"
    if path.name.endswith('.data.json'): path.write_text(json.dumps({'version': '1.0', 'n': len(rows), 'data': rows, 'tags': ['a']}, indent=1))
    elif path.suffix == '.json': path.write_text(json.dumps(rows))
    elif path.suffix == '.jsonl': path.write_text(''.join(json.dumps(row)+'\n' for row in rows))
    elif path.suffix == '.csv':
        with open(path, 'w', newline='') as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip('pyarrow')
        pytest.importorskip('pyarrow.parquet').write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize('row', [{'question': 'a', 'query': 'b', 'answer': 'c'}, {'title': 'a', 'body': 'b'}])
def test_nothing_is_guessed_where_two_columns_could_be_meant(row):
    with pytest.raises(InputError, match='--rename A=B'): read_record(row)


@pytest.mark.parametrize('kind', ['csv', 'jsonl', 'parquet'])
def test_turns_as_json_text_in_a_column(tmp_path, kind):
    turns = [{'role': 'user', 'content': 'Weather?', 'time': 1}, {'role': 'assistant', 'content': 'Dry.'}]
    rows = [{'messages': json.dumps(turns), 'tools': json.dumps([{'type': 'function', 'function': {'name': 'f'}}])}]*2
    book = FieldBook(carry=('time',))
    [record, _] = load_records(write_rows(tmp_path/f'a.{kind}', rows), fields=book)
    assert [m.content for m in record.messages] == ['Weather?', 'Dry.'] and record.tools[0]['function'] == {'name': 'f'}
    assert book.facts() == {'found': 14, 'read': 12, 'carried': 2, 'reported': 0, 'ignored': {}, 'carried keys': {'messages.time': 2}, 'not read': {}}


@pytest.mark.parametrize('text, wanted', [
    ('{"data": [{"instruction": "a", "output": "b"}], "data2": [{"instruction": "c"}]}', 'holds two lists of records'),
    ('{"data": [{"instruction": "a", "output": "b"}]} 7', "text after the object's closing bracket"),
    ('{"data": [{"instruction": "a", "output": "b"} {', 'a comma is missing'), ('{"data": [{"instruction": "a", "out', 'ends in the middle'),
    ('{"data": []}', 'holds no records')])
def test_a_wrapped_list_that_is_broken_is_one_line(tmp_path, text, wanted):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(InputError, match=wanted) as e: load_records(tmp_path/'a.json')
    assert len(str(e.value).splitlines()) == 1


# the law of fields

def random_record(chance):
    "A record of a random format with random keys that nobody reads"
    extra = {name: chance.choice([None, '', 'x', 7, ['a'], {'b': 1}]) for name in chance.sample(['source', 'note', 'id', 'lang', 'when', 'url'], chance.randrange(4))}
    turn = {'mood': 'good'} if chance.random() < .5 else {}
    turns = [{'role': 'user', 'content': 'Hi'} | turn, {'role': 'assistant', 'content': 'Yo', 'weight': 1}]
    kinds = [{'instruction': 'Hi', 'input': '', 'output': 'Yo'}, {'messages': turns}, {'prompt': 'Hi', 'completion': 'Yo'}, {'question': 'Hi', 'answer': 'Yo'},
             {'conversations': [{'from': 'human', 'value': 'Hi'} | turn, {'from': 'gpt', 'value': 'Yo'}], 'system': 'Be kind.'}]
    return chance.choice(kinds) | extra


@pytest.mark.parametrize('seed', range(20))
def test_every_key_has_a_fate_and_the_sums_balance(tmp_path, seed):
    chance = random.Random(seed)
    kinds = [random_record(chance) for _ in range(60)]
    rows = [row for row in kinds if set(row) & set(kinds[0]) & {'instruction', 'messages', 'prompt', 'question', 'conversations'}]
    rows[0] |= {'source': 'me', 'note': 'mine'}
    book = FieldBook(carry=('source',), ignore=('note',))
    records = load_records(write_rows(tmp_path/'a.jsonl', rows), fields=book)
    found = sum(len(row) for row in rows) + sum(len(turn) for row in rows for turn in row.get('messages', row.get('conversations', [])))
    facts = book.facts()
    assert facts['found'] == found == facts['read'] + facts['carried'] + facts['reported']
    assert facts['carried'] == sum('source' in row for row in rows) and book.ignored == {'note': sum('note' in row for row in rows)}
    assert [r.raw for r in records] == [{k: v for k, v in row.items() if k != 'note'} for row in rows]


@pytest.mark.parametrize('row, wanted', [
    ({'instruction': 'a', 'output': 'b', 'imput': 'c'}, "did you mean 'input'"), ({'instruction': 'a', 'outptu': 'b'}, "did you mean 'output'"),
    ({'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}], 'tool': [{'a': 1}]}, "did you mean 'tools'"),
    ({'prompt': 'a', 'completon': 'b'}, "did you mean 'completion'")])
def test_near_misses_are_refused_and_can_be_renamed_carried_or_ignored(tmp_path, row, wanted):
    key = [k for k in row if k not in ('instruction', 'output', 'messages', 'prompt')][0]
    path = write_rows(tmp_path/'a.jsonl', [row]*3)
    with pytest.raises(InputError, match=wanted) as e: load_records(path)
    assert all(f'--{way} {key}' in str(e.value) for way in ('rename', 'carry', 'ignore'))
    near = wanted.split("'")[1]
    if near != 'tools': assert load_records(path, rename={key: near})[0].fmt == load_records(path, need_answer=False, fields=FieldBook(ignore=(key,)))[0].fmt
    carried = load_records(path, need_answer=False, fields=FieldBook(carry=(key,)))
    assert carried[0].raw == row and key in load_saved(tmp_path, carried)[0]


def load_saved(folder, records):
    save_responses(folder/'answers.json', records, ['x']*len(records))
    return load_responses(folder/'answers.json')


def test_what_is_read_cannot_only_be_carried_and_absent_keys_are_typing_errors(tmp_path):
    path = write_rows(tmp_path/'a.jsonl', [{'instruction': 'a', 'input': 'b', 'output': 'c', 'source': 'd'}]*3)
    with pytest.raises(InputError, match="'input' is read in alpaca records"): load_records(path, fields=FieldBook(carry=('input',)))
    assert load_records(path, fields=FieldBook(ignore=('input',)))[0].input == ''
    with pytest.raises(InputError, match="'sorce' of carry; did you mean 'source'"): load_records(path, fields=FieldBook(carry=('sorce',)))
    with pytest.raises(InputError, match="'sorce' of ignore; did you mean 'source'"): load_records(path, fields=FieldBook(ignore=('sorce',)))


# calls and thoughts that are not whole

def talk(*turns): return {'messages': [{'role': 'user', 'content': 'Hi'}, *turns]}


CALL = {'role': 'assistant', 'content': None, 'tool_calls': [{'id': 'c1', 'type': 'function', 'function': {'name': 'f', 'arguments': '{}'}}]}
TOLD = {'role': 'tool', 'tool_call_id': 'c1', 'content': 'dry'}
SAID = {'role': 'assistant', 'content': 'Dry.'}
MARKED = {'role': 'assistant', 'content': '<tool_call>{"name": "f", "arguments": {}}</tool_call>'}


def told(turn, **function):
    "A turn whose call has other entries"
    call = turn['tool_calls'][0]
    return turn | {'tool_calls': [call | {'function': call['function'] | function}]}


@pytest.mark.parametrize('raw, wanted', [
    (talk(CALL, SAID), "the call of 'f' has no result"), (talk(CALL, {'role': 'user', 'content': 'And?'}, SAID), "the call of 'f' has no result"),
    (talk(CALL, TOLD | {'tool_call_id': 'c2'}, SAID), "the call of 'f' has no result of its tool_call_id"),
    (talk(CALL, TOLD, TOLD | {'tool_call_id': 'c9'}, SAID), "names call 'c9', which nobody made"),
    (talk(TOLD, SAID), 'the result of a tool follows no call'), ({'messages': [TOLD, {'role': 'user', 'content': 'And?'}, SAID]}, 'turn 0: the result of a tool follows no call'),
    (talk(SAID, TOLD, SAID), 'turn 2: the result of a tool follows no call'), (talk(CALL, TOLD, TOLD, SAID), 'has 1 calls and 2 results'),
    (talk(told(CALL, arguments='{"town": "Ulm", "town": "Bonn"}')), "'arguments': key 'town' appears twice in one object"),
    (talk(told(CALL, arguments='{"days": NaN}')), "'arguments': 'NaN' is not a number"), (talk(told(CALL, arguments='{"days": 1e999}')), "is not a number that JSON can hold"),
    ({'instruction': 'Hi', 'output': 'Yo', 'history': '[["a", "b"]'}, "'history' is no JSON"),
    ({'conversations': [{'from': 'human', 'value': 'Hi'}, {'from': 'observation', 'value': 'dry'}, {'from': 'gpt', 'value': 'Dry.'}]}, 'follows no call'),
    (talk({'role': 'assistant', 'content': '<think>I wonder'}), 'the think block never closes'),
    (talk({'role': 'assistant', 'content': '\n<think>\nI wonder\nSunny.'}, {'role': 'user', 'content': 'And?'}, SAID), 'the think block never closes'),
    ({'instruction': 'Hi', 'output': '<think>I wonder'}, 'the think block never closes')])
def test_half_a_call_and_half_a_thought_are_refused(raw, wanted):
    with pytest.raises(InputError, match=wanted): read_record(raw)


@pytest.mark.parametrize('raw', [talk(CALL), talk(CALL, TOLD), talk(CALL, TOLD, SAID), talk(CALL, CALL, TOLD, SAID), talk(CALL, TOLD, CALL, TOLD, SAID),
                                 talk(MARKED, {'role': 'tool', 'content': 'dry'}, SAID), talk({'role': 'assistant', 'content': 'Action: f'}, {'role': 'tool', 'content': 'dry'}, SAID),
                                 talk({'role': 'assistant', 'content': 'The mark <think> opens.'}), talk({'role': 'assistant', 'content': '<think></think>Dry.'})])
def test_whole_calls_and_thoughts_are_read(raw): assert len(read_record(raw).messages) == len(raw['messages'])


# the command line

TINY = dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=50257, n_embd=16, n_layer=1, n_head=2, n_positions=256)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with a tiny random model"
    import torch

    from sft_nb.decoder import Decoder
    from sft_nb.families import config_from_hf
    from sft_nb.saving import save_model
    from sft_nb.tokenizer import get_gpt2_tokenizer
    path = tmp_path_factory.mktemp('home')
    torch.manual_seed(7)
    save_model(path/'tiny', Decoder(config_from_hf(TINY)), get_gpt2_tokenizer())
    return path


def sft_nb(*words, cwd, **more):
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent.parent), OMP_NUM_THREADS='1') | more
    return subprocess.run([sys.executable, '-m', 'sft_nb.cli', *map(str, words)], cwd=cwd, env=env, capture_output=True, timeout=300)


FAST = '--model', 'tiny', '--dtype', 'float32', '--no-preflight'


def test_what_the_template_refuses_is_dropped_and_counted(home):
    rows = [{'messages': [{'role': 'user', 'content': f'q{i}'}, {'role': 'assistant', 'content': 'a'}], 'source': 'me'} for i in range(30)]
    for i in 5, 27: rows[i]['messages'].insert(0, {'role': 'system', 'content': 'Be short.'})
    write_rows(home/'polite.jsonl', rows)
    words = '--data', 'polite.jsonl', '--template', 'gemma'
    assert sft_nb('train', *words, *FAST, '--out', 'no', cwd=home).returncode == 2 and not (home/'no').exists()
    for command in ('train', 'run'):
        done = sft_nb(command, *words, *FAST, '--drop-broken', '--carry', 'source', '--out', command, *(['--max-new', '2'] if command == 'run' else []), cwd=home)
        assert done.returncode == 0, done.stderr
        assert b'2 records that template gemma refuses' in done.stdout and b'360 fields' not in done.stdout
        said = json.loads((home/command/'receipt.json').read_text())
        assert (said['data']['records found'], said['data']['records'], said['data']['dropped']) == (30, 28, 2)
        assert said['training']['rows_in'] + said['validation']['rows_in'] + 2 == 28
        assert said['data']['fields'] | {'not read': 0} == {'found': 184, 'read': 154, 'carried': 30, 'reported': 0, 'ignored': {}, 'carried keys': {'source': 30}, 'not read': 0}
    assert all(row['source'] == 'me' for row in json.loads((home/'run'/'responses.json').read_text()))
    done = sft_nb('inspect', 'polite.jsonl', *words[2:], '--model', 'tiny', '--drop-broken', '--rows', '0', cwd=home)
    assert done.returncode == 0 and b'2 records that template gemma refuses' in done.stdout


def test_a_set_that_the_template_refuses_whole_is_one_line(home):
    write_rows(home/'all.jsonl', [{'system': 'Be kind.', 'instruction': f'q{i}', 'output': 'a'} for i in range(20)])
    done = sft_nb('train', '--data', 'all.jsonl', '--template', 'gemma', '--drop-broken', *FAST, '--out', 'none', cwd=home)
    assert done.returncode == 2 and b'all 20 were dropped, the first as' in done.stderr and len(done.stderr.splitlines()) == 1


def test_leaks_and_empty_answers_are_said_before_and_beside_the_scores(home):
    rows = [{'instruction': f'Name town {i} of {7*i % 11} and {i*i}.', 'output': '' if i == 3 else f'{i}'} for i in range(40)]
    for row, i in zip(rows[34:37], (4, 5, 6)): row['instruction'] = rows[i]['instruction']
    write_rows(home/'leak.jsonl', rows)
    done = sft_nb('run', '--data', 'leak.jsonl', *FAST, '--max-new', '2', '--out', 'leaky', cwd=home)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode()
    start, end = said.index('3 of 4 test rows stand in training'), said.index('3 of 4 test rows ask almost what a training row asks')
    assert start < said.index('training  ') < said.index('score ') < end and 'empty answer' in said[:start]
    report = json.loads((home/'leaky'/'report.json').read_text())
    assert [note[:16] for note in report['notes']] == ['3 of 4 test rows', '1 answers are em']
    assert '3 of 4 test rows' in (home/'leaky'/'report.md').read_text() and '3 of 4 test rows' in (home/'leaky'/'report.html').read_text()


@pytest.mark.parametrize('n', [1, 9, 10])
def test_a_first_look_needs_no_split(home, n):
    write_rows(home/f'few{n}.jsonl', [{'instruction': f'q{i}', 'output': 'a'} for i in range(n)])
    done = sft_nb('inspect', f'few{n}.jsonl', '--model', 'tiny', cwd=home)
    assert done.returncode == 0 and f'train {8 if n == 10 else n}, test {int(n == 10)}'.encode() in done.stdout, done.stderr


def test_inspect_writes_the_set_without_repeats(home):
    rows = [{'question': f'Please name all the towns that begin with {chr(97+i)} and lie at a river.', 'answer': f'The town number {i*i*7919}'} for i in range(12)]
    twice = [row | {'question': row['question'].upper()} for row in rows[:5]]
    other = [row | {'answer': 'Nobody knows of any.'} for row in rows[:1]]
    write_rows(home/'twice.jsonl', rows + twice + other)
    done = sft_nb('inspect', 'twice.jsonl', '--model', 'tiny', '--rows', '0', '--dedupe', 'once.jsonl', cwd=home)
    assert done.returncode == 0, done.stderr
    assert [r.raw for r in load_records(home/'once.jsonl')] == rows + other
    receipt = json.loads((home/'once.jsonl.receipt.json').read_text())
    assert (receipt['records in'], receipt['records out'], len(receipt['left out'])) == (18, 13, 5)
    assert [(gone['record'], gone['repeats']) for gone in receipt['left out']] == [(f'twice.jsonl line {13+i}', f'twice.jsonl line {1+i}') for i in range(5)]
    again = sft_nb('inspect', 'twice.jsonl', '--model', 'tiny', '--dedupe', 'once.jsonl', cwd=home)
    assert again.returncode == 2 and b'once.jsonl: exists' in again.stderr


def test_columns_are_named_on_the_command_line(home):
    write_rows(home/'odd.csv', [{'frage': f'q{i}', 'antwort': 'a', 'quelle': 'me', 'laune': 'good'} for i in range(20)])
    words = '--rename', 'frage=instruction', '--rename', 'antwort=output', '--carry', 'quelle', '--ignore', 'laune'
    done = sft_nb('respond', '--data', 'odd.csv', '--model', 'tiny', '--max-new', '2', '--out', 'odd.jsonl', *words, cwd=home)
    assert done.returncode == 0, done.stderr
    assert b'fields found: 80 = 40 read + 20 carried + 20 reported' in done.stdout and b'fields ignored: laune (20)' in done.stdout
    assert [sorted(row) for row in map(json.loads, (home/'odd.jsonl').read_text().splitlines())] == [['id', 'instruction', 'model_response', 'output', 'quelle']]*20
    for bad, wanted in (('frage', 'write A=B'), ('frage=instruction --rename frage=text', "argument --rename: 'frage' is given twice"), ('fraeg=instruction', "did you mean 'frage'")):
        done = sft_nb('inspect', 'odd.csv', '--model', 'tiny', '--rename', *bad.split(), cwd=home)
        assert done.returncode == 2 and wanted.encode() in done.stderr and len(done.stderr.splitlines()) == 1


PRESS = """import atexit, os, signal, sys
when = sys.argv.pop(1)
def press(event='', args=('late',)):
    if args[0] == when and event in ('import', ''): os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(press)
atexit.register(press)
sys.argv[0] = 'sft_nb'
from sft_nb.cli import main
sys.exit(main())"""


@pytest.mark.skipif(os.name == 'nt', reason='there Ctrl-C is no signal')
@pytest.mark.parametrize('when', ['sft_nb.basics', 'argparse', 'numpy', 'torch', 'tokenizers', 'sft_nb.decoder', 'sft_nb.job', 'late'])
def test_ctrl_c_while_libraries_load_is_one_line(home, when):
    "Pressed as a library begins to load, however slow the machine; pressed when all is done, it means nothing"
    write_rows(home/'few.jsonl', PAIRS)
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent.parent), OMP_NUM_THREADS='1')
    words = [sys.executable, '-c', PRESS, when, 'inspect', 'few.jsonl', '--model', 'tiny']
    done = subprocess.run(words, cwd=home, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == ((0, '') if when == 'late' else (130, 'sft_nb: interrupted\n'))
    assert ('receipt' in done.stdout) == (when == 'late')


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere file names are text')
def test_names_that_are_no_utf8_are_read_and_reported(home):
    name, out = (os.fsdecode(raw) for raw in (b'm\xfcller.jsonl', b'm\xfcller.answers.jsonl'))
    write_rows(home/name, [row | {'instruction': f'Name town {i % 11} of {i % 11}.'} for i, row in enumerate(PAIRS*3)])
    done = sft_nb('run', '--data', name, *FAST, '--max-new', '2', '--out', 'named', cwd=home, PYTHONIOENCODING='utf-8:strict')
    assert done.returncode == 0 and 'ller.jsonl' in (home/'named'/'report.md').read_text(), done.stderr
    assert sft_nb('respond', '--data', name, '--model', 'tiny', '--max-new', '2', '--out', out, cwd=home).returncode == 0
    assert sft_nb('compare', out, out, '--out', 'odd-report', cwd=home).returncode == 0 and (home/'odd-report'/'report.html').read_text()
    refused = sft_nb('train', '--data', name, *FAST, '--out', os.fsdecode(b'\xfc'), cwd=home)
    assert refused.returncode == 2 and b'is no UTF-8' in refused.stderr and len(refused.stderr.splitlines()) == 1


# hints that can be followed

def messages():
    "(file, line, words) of every error that the package raises"
    for path in sorted((ROOT/'sft_nb').glob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('InputError', 'CutOffError', 'FileExistsError', 'FileNotFoundError', 'Stage'):
                yield path.name, node.lineno, ''.join(c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str))


def test_every_flag_that_a_message_names_is_there():
    helps = ' '.join(sft_nb(command, '--help', cwd=ROOT).stdout.decode() for command in ('run', 'inspect', 'respond', 'judge', 'export', 'push', 'serve', 'evaluate'))
    named = {(where, flag) for where, _, words in messages() for flag in re.findall(r'(?<![\w-])--[a-z][a-z-]*[a-z]', words)}
    assert len(named) > 20 and [pair for pair in sorted(named) if not re.search(rf'{pair[1]}(?![\w-])', helps)] == []


PYTHON_ONLY = {'attention.py', 'audit.py', 'collate.py', 'dataset.py', 'kernels.py', 'optimizer.py', 'watch.py', 'stretches.py', 'whole_text.py', 'families.py', 'flex.py'}


def test_messages_of_the_command_line_name_no_arguments_of_python():
    said = [(file, line, word) for file, line, words in messages() for word in re.findall(r'(\w+)=(?![=\w]*\[)', words.rpartition(';')[2])
            if file not in PYTHON_ONLY and '--' + word.replace('_', '-') not in words]
    allowed = {('split.py', 'seed'), ('run.py', 'out'), ('steps.py', 'out'), ('data.py', 'A'), ('data.py', 'train'), ('data.py', 'test')}
    assert [s for s in said if (s[0], s[2]) not in allowed] == []
