"The project's own record set: its form, its make-up, and every answer that a program can compute."
import datetime
import json
import math
import re
import statistics
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from sft_nb.data import as_records
from sft_nb.lint import find_near_duplicates, lint_records
from sft_nb.split import split_records

ROOT = Path(__file__).resolve().parent.parent
DATA = json.loads((ROOT/'data/sft/train/instruction-data.json').read_text(encoding='utf-8'))
KINDS = json.loads((ROOT/'data/sft/kinds.json').read_text(encoding='utf-8'))
CHECKS = json.loads((ROOT/'tests/answer_checks.json').read_text(encoding='utf-8'))
RECORDS = as_records(DATA)
BY_ID = {r.id: r for r in RECORDS}


def test_size_form_and_text():
    assert len(DATA) == 1100 and len(BY_ID) == 1100
    for row in DATA:
        assert list(row) == ['instruction', 'input', 'output']
        assert row['instruction'] and row['output']
        for text in row.values():
            assert text == text.strip() and text == unicodedata.normalize('NFC', text)
            assert not re.search(r'[\u2018\u2019\u201c\u201d\u00a0\u200b\ufffd]|[\x00-\x09\x0b-\x1f]|###|<\|', text)


def test_make_up():
    assert set(KINDS) == set(BY_ID)
    counts = Counter(KINDS.values())
    assert len(counts) >= 25 and max(counts.values()) <= 0.08*len(DATA)
    assert 0.30 <= sum(bool(r['input']) for r in DATA)/len(DATA) <= 0.45
    words = [len(r['output'].split()) for r in DATA]
    assert 12 <= statistics.median(words) <= 20 and min(words) == 1 and 75 <= max(words) <= 95


def test_parts_have_the_same_make_up():
    split = split_records(RECORDS)
    assert [len(p) for p in (split.train, split.test, split.val)] == [935, 110, 55]
    counts = Counter(KINDS.values())
    in_test = Counter(KINDS[r.id] for r in split.test)
    assert all(abs(in_test[k] - n/10) <= 2 for k, n in counts.items())


def test_no_near_duplicates_and_no_lint():
    assert find_near_duplicates(RECORDS, threshold=0.7) == []
    assert lint_records(RECORDS) == []


@pytest.mark.parametrize('row', CHECKS, ids=lambda r: r['id'])
def test_computed_answer(row):
    "A check is an expression that is True, or whose value stands in the answer (with or without thousands commas)"
    record = BY_ID[row['id']]
    value = eval(row['check'], dict(json=json, math=math, datetime=datetime, output=record.output, input=record.input))
    if value is True: return
    assert value is not False
    assert str(value) in record.output or (isinstance(value, int) and f'{value:,}' in record.output)


def test_computed_kinds_are_computed():
    computed = Counter(KINDS[row['id']] for row in CHECKS)
    for kind in ('arithmetic', 'number-sense', 'unit-conversion', 'time-and-dates', 'date-formats', 'json', 'ordering'):
        assert computed[kind] == Counter(KINDS.values())[kind], kind
