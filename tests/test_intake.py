"Files as users have them: columns with other names, keys that nobody reads, leaks, answers a line"
import gzip
import json

import pytest

from sft_nb.basics import InputError
from sft_nb.numbers import report_data
from sft_nb.responses import answer_file, load_meta, load_responses, response_rows, save_responses

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
