"Planted bugs: the entries still apply, each was caught when last tried, and with --slow a sample is tried again."
import subprocess
import sys

import pytest
from mutants import BUGS, ROOT, Stale, check_entry, read_table


def test_every_entry_still_applies():
    "Text only: each stands once in its module and once in its page, and changes something"
    stale = []
    for bug in BUGS:
        try: check_entry(bug)
        except Stale as e: stale.append(str(e))
    assert not stale, stale + ['give the entries in tests/planted.py the new text, or take them out']


def test_there_are_enough_and_no_two_have_one_name():
    names = [bug.name for bug in BUGS]
    assert len(set(names)) == len(names) >= 120
    modules = {p.stem for p in (ROOT/'sft_nb').glob('[a-z]*.py')}
    without = modules - {bug.module for bug in BUGS}
    assert not without, f'pages without a bug in the list: {sorted(without)}'


def test_the_table_is_of_this_list():
    lines = read_table()
    assert list(lines) == [bug.name for bug in BUGS], 'python tests/mutants.py --only NAME'
    assert [name for name, line in lines.items() if '**nobody**' in line] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='processes are forked')
def test_a_sample_is_caught():
    "Every tenth; `python tests/mutants.py` tries them all"
    table = (ROOT/'tests/mutants.md').read_bytes()
    try: done = subprocess.run([sys.executable, 'tests/mutants.py', '--part', '1/10'], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    finally: (ROOT/'tests/mutants.md').write_bytes(table)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
