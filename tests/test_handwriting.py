"One handwriting over all pages: what CONTRIBUTING.md asks, as far as programs can see it."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from handwriting import EXPORT, code_cells, module_faults, module_of, page_measures

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT/'nbs').glob('0*.ipynb'))
CHAPTERS = [p for p in PAGES if re.fullmatch(r'0[0-6]_(data|templates|dataset|collate|model|training|evaluation)', p.stem)]
EXCUSED = {} # (page, beginning of a fault after its place) -> why the page is better this way


def excused(fault):
    page, _, rest = fault.partition(' [')
    return any(page == p and rest.partition('] ')[2].startswith(start) for p, start in EXCUSED)


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_page_keeps_the_handwriting(page):
    module = module_of(page)
    faults = page_measures(page)[0] + (list(module_faults(module)) if module else [])
    assert [f for f in faults if not excused(f)] == []


def test_most_definitions_are_tested_before_the_next():
    numbers = [page_measures(p)[1:3] for p in PAGES]
    assert sum(tested for _, tested in numbers) >= .75*sum(n for n, _ in numbers)


def test_the_book_is_short():
    assert len(CHAPTERS) == 7
    assert sum(len(json.loads(p.read_text(encoding='utf-8'))['cells']) for p in CHAPTERS) <= 420


def imports_of(path):
    "Modules of the package that the exported cells of a page import, wherever they stand"
    trees = [ast.parse(s) for _, s in code_cells(path) if EXPORT.search(s)]
    return {n.module.removeprefix('sft_nb.') for t in trees for n in ast.walk(t)
            if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('sft_nb.')}


def test_pages_import_only_earlier_ones():
    place = {module_of(p).stem: i for i, p in enumerate(PAGES) if module_of(p)}
    back = [(p.stem, m) for i, p in enumerate(PAGES) for m in imports_of(p) if place[m] >= i]
    assert back == []


def test_names_have_one_home():
    homes = {}
    for page in PAGES:
        for _, s in code_cells(page):
            if not EXPORT.search(s): continue
            for n in ast.parse(s).body:
                if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_'): homes.setdefault(n.name, []).append(page.stem)
    assert {name: pages for name, pages in homes.items() if len(pages) > 1} == {}


def test_ruff_is_content():
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--config', '.github/ruff.toml', 'sft_nb', 'nbs'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def test_types_are_consistent():
    done = subprocess.run([sys.executable, '-m', 'mypy', '--config-file', '.github/mypy.ini', 'sft_nb'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
