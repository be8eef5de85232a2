"What is derived equals its source: modules from notebooks, README from index, commands in CI from the README."
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from make_readme import readme_text

ROOT = Path(__file__).resolve().parent.parent
COPIED = ('settings.ini', 'setup.py', 'README.md', 'nbs', 'sft_nb')


def run(args, cwd): return subprocess.run(args, cwd=cwd, capture_output=True, text=True, timeout=300)


def snapshot(root):
    return {p.relative_to(root): p.read_bytes() for folder in ('nbs', 'sft_nb') for p in sorted((root/folder).rglob('*'))
            if p.is_file() and '__pycache__' not in p.parts and '.ipynb_checkpoints' not in p.parts}


def test_export_and_clean_leave_no_diff(tmp_path):
    for name in COPIED:
        src = ROOT/name
        if src.is_dir(): shutil.copytree(src, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__'))
        else: shutil.copy(src, tmp_path/name)
    before = snapshot(tmp_path)
    for tool in ('nbdev_export', 'nbdev_clean'):
        done = run([str(Path(sys.executable).parent/tool)], tmp_path)
        assert done.returncode == 0, done.stderr
    after = snapshot(tmp_path)
    assert sorted(before) == sorted(after)
    assert [str(p) for p in before if before[p] != after[p]] == []


def test_readme_is_made_from_index():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == readme_text(ROOT/'nbs/index.ipynb'), \
        "README.md is out of date: python tests/make_readme.py"


def test_readme_commands_are_those_that_ci_runs():
    readme, ci = (ROOT/'README.md').read_text(encoding='utf-8'), (ROOT/'.ci/run').read_text(encoding='utf-8')
    line = next(l for l in readme.splitlines() if 'pytest' in l and l.startswith('python3 '))
    assert line in ci
    flow = (ROOT/'.github/workflows/test.yml').read_text(encoding='utf-8')
    assert line in flow


def test_every_requirement_is_pinned():
    pins = {re.split(r'==', l)[0].lower().replace('_', '-') for l in (ROOT/'constraints.txt').read_text().splitlines() if '==' in l}
    setup = (ROOT/'settings.ini').read_text(encoding='utf-8')
    wanted = re.findall(r'^(?:(?:dev_)?requirements|extra_docs)\s*=\s*(.*)$', setup, re.M)
    names = {re.split(r'[<>=\[ ]', w.strip('"'))[0].lower().replace('_', '-') for line in wanted for w in line.split() if w[0] not in '<>='}
    assert names - pins == set()


def test_light_modules_do_not_import_torch():
    for name in ('data', 'templates', 'cli'):
        done = run([sys.executable, '-c', f"import sys, sft_nb.{name}; sys.exit('torch' in sys.modules)"], ROOT)
        assert done.returncode == 0, f'sft_nb.{name} imports torch\n{done.stderr}'


def test_modules_import_from_another_folder(tmp_path):
    for path in sorted((ROOT/'sft_nb').glob('[a-z]*.py')):
        importlib.import_module(f'sft_nb.{path.stem}')
    done = run([sys.executable, '-c', 'import sft_nb.evaluation, sft_nb.run'], tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_face_is_what_type_checkers_see():
    import ast
    import sft_nb
    tree = ast.parse((ROOT/'sft_nb/__init__.py').read_text(encoding='utf-8'))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {a.asname: n.module for n in block.body for a in n.names}
    assert seen == {name: room for name, (room, _) in sft_nb.FACE.items()}


def test_the_face_works_from_anywhere(tmp_path):
    done = run([sys.executable, '-c', 'import sft_nb; print(sft_nb.load_model)'], tmp_path)
    assert done.returncode == 0 and 'function load_model' in done.stdout, done.stderr


def test_readme_names_every_page():
    readme = (ROOT/'README.md').read_text(encoding='utf-8')
    pages = sorted(p.name for p in (ROOT/'nbs').glob('0*.ipynb'))
    assert [p for p in pages if f'(nbs/{p})' not in readme] == []
    assert [link for link in re.findall(r'\(nbs/([^)]+)\)', readme) if not (ROOT/'nbs'/link).exists()] == []


def test_the_map_stands_at_the_head_of_every_page():
    from sft_nb.figures import book_map
    for page in sorted((ROOT/'nbs').glob('0*.ipynb')):
        cells = json.loads(page.read_text(encoding='utf-8'))['cells'][:4]
        shown = [c for c in cells if c['cell_type'] == 'code' and 'book_map(' in ''.join(c['source'])]
        assert len(shown) == 1, f'{page.stem}: no book_map(...) in the first cells'
        lit = re.findall(r"'(\w+)'", ''.join(shown[0]['source']).partition('book_map(')[2])
        stored = ''.join(shown[0]['outputs'][0]['data']['text/html'])
        assert stored == book_map(*lit)._repr_html_(), f'{page.stem}: the stored map is not the one of its call'


def is_picture(output):
    "A plot, a drawing or coloured text; the map at the head is none"
    data = output.get('data', {})
    return bool({'image/png', 'image/svg+xml'} & set(data)) or 'style=' in ''.join(data.get('text/html', ''))


def test_every_page_has_a_picture_or_says_why_not():
    without = []
    for page in sorted((ROOT/'nbs').glob('0*.ipynb')):
        cells = json.loads(page.read_text(encoding='utf-8'))['cells']
        outputs = [o for c in cells if 'book_map' not in ''.join(c['source']) for o in c.get('outputs', ())]
        prose = ' '.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        if any(map(is_picture, outputs)) == ('There is no picture on this page' in prose): without.append(page.stem)
    assert without == [], 'a picture, or "There is no picture on this page" and the reason; not both'


def test_every_plot_has_axes_with_names_and_a_sentence_after_it():
    bare = []
    for page in sorted((ROOT/'nbs').glob('0*.ipynb')):
        cells = json.loads(page.read_text(encoding='utf-8'))['cells']
        sources = [''.join(c['source']) for c in cells]
        for i, cell in enumerate(cells):
            if not any('image/png' in o.get('data', {}) for o in cell.get('outputs', ())): continue
            drawn = any(re.search(r'xlabel|get_ylabel|axis\(.off.\)|\bdraw\w*\(|plot_\w+\(', s) for s in sources[i:i+1])
            after = next((s for c, s in zip(cells[i+1:], sources[i+1:]) if c['cell_type'] == 'markdown'), '##') # checks may stand between
            if not drawn or after.startswith('#'): bare.append((page.stem, i))
        assert not re.search(r'plt\.(subplots|figure)\(', '\n'.join(sources)) or page.stem == '00d_figures', f'{page.stem}: use figure()'
    assert bare == []


def test_exercises_take_from_pages_what_stands_there():
    from make_exercises import FOLDER, refreshed
    for path in sorted(FOLDER.glob('*.ipynb')):
        nb = json.loads(path.read_text(encoding='utf-8'))
        assert refreshed(json.loads(json.dumps(nb))) == nb, f'{path.stem}: python tests/make_exercises.py nbs/exercises/{path.name}'
