"The notebooks are the test suite: each runs from top to bottom, and nothing that looks like a check is left unrun."
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from execnb.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
UNRUN = re.compile(r'^\s*#\s*\|\s*(eval:\s*false|notest)', re.M)
CHECK = re.compile(r'^\s*(assert\b|test_\w+\(|with expect_fail|torch\.testing)', re.M)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    "`nbdev_test`, a fresh process a notebook, so that no notebook leans on another's state"
    command = shutil.which('nbdev_test', path=str(Path(sys.executable).parent))
    done = subprocess.run([command, '--path', path, '--n_workers', '0'],
                          cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_no_check_is_left_unrun(path):
    "nbdev skips `eval: false`, flagged cells and any cell naming nbdev_export(: none of these may hold a check"
    cells = [c for c in read_nb(path).cells if c.cell_type == 'code']
    unrun = [c.source for c in cells if UNRUN.search(c.source) or 'nbdev_export(' in c.source]
    assert not [s for s in unrun if CHECK.search(s)]
    assert not any('skip_exec' in c.source for c in read_nb(path).cells if c.cell_type == 'raw')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_committed_and_small(path):
    "A page can be read without running it: no error outputs, no carriage-return progress bars, at most 200 KB"
    outputs = [o for c in read_nb(path).cells if c.cell_type == 'code' for o in c.outputs]
    assert not [o for o in outputs if o.output_type == 'error']
    text = ''.join(''.join(o.get('text', '')) for o in outputs)
    assert '\r' not in text
    assert '/root/' not in text and '/home/' not in text and '/tmp/' not in text
    assert path.stat().st_size <= 250_000


@pytest.mark.slow
@pytest.mark.parametrize('path', [*NOTEBOOKS, *sorted((ROOT/'nbs/exercises').glob('*.ipynb'))], ids=lambda p: p.stem)
def test_outputs_are_those_of_a_rerun(path):
    "What a page shows is what it does today, on whatever processor"
    done = subprocess.run([sys.executable, ROOT/'tests/fill_outputs.py', '--check', path], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
