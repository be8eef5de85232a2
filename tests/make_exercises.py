"""Refresh the exercises in nbs/exercises: python tests/make_exercises.py [NOTEBOOK ...]

The notebooks are written by hand, but for what they take from the pages: a cell whose metadata say `exercise` is made from the exported cell
that holds `name` on page `from`. `as` is 'empty' (its body is left out), 'fault' (each pair of `change` is put in) or 'solution' (folded away). So an
exercise cannot drift from the library. What is shown below the cells comes from a run of the unsolved notebook."""
import ast
import json
import sys
from pathlib import Path

from handwriting import EXPORT, code_cells

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT/'nbs/exercises'
YOURS = '... # your lines, in place of these dots'


def exported_cell(page, name):
    "The exported cell of a page that defines `name`, without its directive"
    for _, source in code_cells(ROOT/f'nbs/{page}.ipynb'):
        if not EXPORT.search(source): continue
        if any(getattr(n, 'name', None) == name.partition('.')[0] for n in ast.parse(source).body):
            return '\n'.join(l for l in source.split('\n') if not l.startswith('#|')).strip()
    raise ValueError(f'{page}: exports no {name}; name a function or class, or Class.method, that it does')


def find_function(source, name):
    "The definition of a function, or of a method written as `Class.method`"
    nodes = ast.parse(source).body
    for part in name.split('.'):
        node = next(n for n in nodes if getattr(n, 'name', None) == part)
        nodes = getattr(node, 'body', [])
    return node


def emptied(source, name):
    "The cell with the body of `name` left out; its signature and docstring stay"
    node, lines = find_function(source, name), source.split('\n')
    has_doc = ast.get_docstring(node) is not None
    n_head = node.body[0].end_lineno if has_doc else node.body[0].lineno-1
    return '\n'.join([*lines[:n_head], ' '*node.body[-1].col_offset + YOURS, *lines[node.end_lineno:]])


def changed(source, pairs):
    "The cell with each pair put in; each has to stand there once"
    for old, new in pairs:
        if source.count(old) != 1: raise ValueError(f'{old!r} stands {source.count(old)} times in:\n{source}')
        source = source.replace(old, new)
    return source


def folded(title, text): return f'<details><summary>{title}</summary>\n\n{text}\n\n</details>'


def derived(spec):
    "The source of a cell that is made from a page"
    source = exported_cell(spec['from'], spec['name'])
    if spec['as'] == 'empty': return emptied(source, spec['name'])
    if spec['as'] == 'fault': return changed(source, spec['change'])
    return folded('Solution', f'From [{spec["from"]}](../{spec["from"]}.ipynb):\n\n```python\n{source}\n```')


def refreshed(nb):
    "The notebook with its derived cells made anew"
    for cell in nb['cells']:
        spec = cell['metadata'].get('exercise')
        if spec: cell['source'] = derived(spec).splitlines(keepends=True)
    return nb


def write(nb, path): path.write_text(json.dumps(nb, ensure_ascii=False, indent=1, sort_keys=True)+'\n', encoding='utf-8')


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    from fill_outputs import fill
    for path in [Path(a).resolve() for a in sys.argv[1:]] or sorted(FOLDER.glob('*.ipynb')):
        write(refreshed(json.loads(path.read_text(encoding='utf-8'))), path)
        fill(path)
        nb = json.loads(path.read_text(encoding='utf-8'))
        for cell in nb['cells']: cell.update({'execution_count': None} if cell['cell_type'] == 'code' else {})
        for cell in nb['cells']:
            for out in cell.get('outputs', ()):
                if 'execution_count' in out: out['execution_count'] = None
        write(nb, path)
