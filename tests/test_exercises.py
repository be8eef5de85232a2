"The exercises from both sides: unsolved each check is red and says what was expected, and the folded solution passes it."
import ast
import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from matplotlib import pyplot
from make_exercises import FOLDER
from test_handwriting import CHAPTERS, PAGES

NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))
BAD = (None, ..., 17.25, -91, 'x', [], {}, True, object(), lambda *a, **k: None, lambda: 5, int)


def cells_of(path): return json.loads(path.read_text(encoding='utf-8'))['cells']


def role(cell): return cell['id'].rpartition('-')[2].rstrip('0123456789')


def text(cell): return ''.join(cell['source'])


def exercises(path):
    "For each exercise its cells: role -> cell"
    found = {}
    for cell in cells_of(path):
        if not cell['id'].startswith('top-'): found.setdefault(cell['id'].rpartition('-')[0], {})[role(cell)] = cell
    return found


def run(source, names):
    "What the last line of a cell gives; what a cell prints is of no interest"
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(tree, 'cell', 'exec'), names)
        return eval(compile(ast.Expression(last.value), 'cell', 'eval'), names) if last else None


def solution_of(cell): return re.search(r'```python\n(.*?)\n```', text(cell), re.S)[1]


def names_bound(source):
    "What a cell defines"
    tree = ast.parse(source)
    defined = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assigned = [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
    return (defined or assigned)[-1:]


@pytest.fixture(autouse=True)
def in_the_folder(monkeypatch):
    pyplot.switch_backend('Agg')
    monkeypatch.chdir(FOLDER)
    yield
    pyplot.close('all')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_red_when_empty_and_blue_when_solved(path):
    names, solutions = {'__name__': 'exercise'}, exercises(path)
    for cell in cells_of(path):
        if cell['cell_type'] != 'code': continue
        if role(cell) != 'check':
            run(text(cell), names)
            continue
        key = cell['id'].removesuffix('-check')
        mine = solutions[key]
        between = between_of(path, key)
        empty = run(text(cell), names)
        assert empty.right is False, f'{key}: passes unsolved'
        assert re.search('should (give|be)', empty.words), (key, empty.words)
        stored = ''.join(cell['outputs'][0]['data']['text/plain'])
        assert stored == repr(empty), f'{key}: the stored verdict is {stored}; python tests/make_exercises.py'
        for name in names_bound(text(mine['yours'])):
            for bad in BAD:
                names[name] = bad
                said = run(text(cell), names)
                assert not said.right and re.search('should (give|be)', said.words), (key, bad, said)
                for source in between: run(source, names) # pictures are drawn of anything
                pyplot.close('all')
            names.pop(name)
            said = run(text(cell), names)
            assert not said.right and f'{name} is not there' in said.words, (key, said)
        run(solution_of(mine['solution']), names)
        for source in between: run(source, names)
        solved = run(text(cell), names)
        assert solved.right is True, (key, solved.words)


def between_of(path, key):
    "Sources of the cells between what the reader writes and its check"
    cells = cells_of(path)
    at = {c['id']: i for i, c in enumerate(cells)}
    return [text(c) for c in cells[at[f'{key}-yours']+1:at[f'{key}-check']] if c['cell_type'] == 'code']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_each_exercise_is_whole(path):
    for key, cells in exercises(path).items():
        assert {'task', 'yours', 'check', 'hint', 'solution'} <= set(cells), key
        assert all(text(cells[part]).startswith('<details>') for part in ('hint', 'solution')), key
        assert '](../' in text(cells['task']) or path.stem in {p.stem for p in CHAPTERS}, f'{key}: names no page'


def test_enough_of_them():
    "Three to five a chapter, and one for every second page of the engine at least"
    for chapter in CHAPTERS: assert 3 <= len(exercises(FOLDER/chapter.name)) <= 5, chapter.stem
    tasks = ''.join(text(cells['task']) for path in NOTEBOOKS for cells in exercises(path).values())
    pages = {p.stem for p in PAGES} - {p.stem for p in CHAPTERS} - {'000_tour'}
    asked = pages & set(re.findall(r'\]\(\.\./(\w+)\.ipynb\)', tasks))
    assert 2*len(asked) >= len(pages), f'{len(asked)} of {len(pages)} pages'


def test_pages_lead_to_their_exercises():
    for path in NOTEBOOKS:
        tasks = ''.join(text(cells['task']) for cells in exercises(path).values())
        for page in {path.stem} & {p.stem for p in CHAPTERS} | set(re.findall(r'\]\(\.\./(\w+)\.ipynb\)', tasks)):
            prose = ''.join(text(c) for c in cells_of(FOLDER.parent/f'{page}.ipynb') if c['cell_type'] == 'markdown')
            assert f'(exercises/{path.name})' in prose, f'{page} does not name exercises/{path.name}'
