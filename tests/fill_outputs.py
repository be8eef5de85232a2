"""Run notebooks from top to bottom and store their outputs: python tests/fill_outputs.py [--check] [NOTEBOOK ...]

Plain PNG plots, no kernel needed; cells marked `eval: false` or `notest` keep what they have. Clean with nbdev_clean after.
With --check nothing is stored: each cell is named that shows something else than it holds, and the status is 1 if there is one."""
import os
import re
import sys
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell

ROOT = Path(__file__).resolve().parent.parent
UNRUN = re.compile(r'^\s*#\s*\|\s*(eval:\s*false|notest)', re.M)
ADDRESS = re.compile(r' at 0x[0-9a-f]+')


def filled(path):
    "The notebook with the outputs of a run"
    os.chdir(path.parent)
    nb = read_nb(path)
    for c in nb.cells: # a cell that prints no more keeps nothing
        if c.cell_type == 'code' and not UNRUN.search(c.source): c.outputs = []
    CaptureShell(path.parent, mpl_format='png').run_all(
        nb, exc_stop=True, preproc=lambda c: c.cell_type != 'code' or bool(UNRUN.search(c.source)))
    return nb


def fill(path): write_nb(filled(path), path)


def shown(cell):
    "The text that a cell shows, and the kinds of what it shows besides; a picture's pixels depend on fonts"
    printed = ''.join(''.join(o['text']) for o in cell.outputs if 'text' in o)
    data = [{kind: ''.join(value) if kind.startswith('text/') else '' for kind, value in o['data'].items()} for o in cell.outputs if 'data' in o]
    return printed.strip(), [{kind: ADDRESS.sub('', text).strip() for kind, text in d.items()} for d in data]


def differences(path):
    "A line for each cell that does not hold what a run shows"
    pairs = zip(read_nb(path).cells, filled(path).cells, strict=True)
    return [f'{path.stem} {was.id}: holds {shown(was)}, a run shows {shown(now)}'
            for was, now in pairs if was.cell_type == 'code' and shown(was) != shown(now)]


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    words = [w for w in sys.argv[1:] if w != '--check']
    pages = [Path(w).resolve() for w in words] or sorted((ROOT/'nbs').glob('*.ipynb'))
    if '--check' not in sys.argv:
        for page in pages: fill(page)
    elif found := [line for page in pages for line in differences(page)]: sys.exit('\n'.join(found))
