"Write README.md from nbs/index.ipynb: python tests/make_readme.py"
from pathlib import Path

from execnb.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent


def _cell_text(cell):
    if cell.cell_type == 'markdown': return cell.source.strip()
    if cell.cell_type != 'code' or '#| hide' in cell.source: return ''
    code = '\n'.join(l for l in cell.source.splitlines() if not l.startswith('#|')).strip()
    text = ''.join(''.join(o.get('text', '') or o.get('data', {}).get('text/plain', '')) for o in cell.outputs).strip()
    return f'```python\n{code}\n```' + (f'\n\n```text\n{text}\n```' if text else '')


def readme_text(
    path, # The index notebook
)->str: # Markdown: prose cells as they are, code and its text output in fences
    parts = [_cell_text(c) for c in read_nb(path).cells]
    return '\n\n'.join(p for p in parts if p) + '\n'


if __name__ == '__main__':
    (ROOT/'README.md').write_text(readme_text(ROOT/'nbs/index.ipynb'), encoding='utf-8')
