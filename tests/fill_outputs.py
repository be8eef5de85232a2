"""Run notebooks from top to bottom and store their outputs: python tests/fill_outputs.py [NOTEBOOK ...]

Plain PNG plots, no kernel needed; cells marked `eval: false` or `notest` keep what they have. Clean with nbdev_clean after."""
import os
import re
import sys
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell

ROOT = Path(__file__).resolve().parent.parent
UNRUN = re.compile(r'^\s*#\s*\|\s*(eval:\s*false|notest)', re.M)


def fill(path):
    os.chdir(path.parent)
    nb = read_nb(path)
    for c in nb.cells: # a cell that prints no more keeps nothing
        if c.cell_type == 'code' and not UNRUN.search(c.source): c.outputs = []
    CaptureShell(path.parent, mpl_format='png').run_all(
        nb, exc_stop=True, preproc=lambda c: c.cell_type != 'code' or bool(UNRUN.search(c.source)))
    write_nb(nb, path)


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    for p in [Path(a).resolve() for a in sys.argv[1:]] or sorted((ROOT/'nbs').glob('*.ipynb')): fill(p)
