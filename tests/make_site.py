"""Make the site of the notebooks: python tests/make_site.py [FOLDER] writes _docs/, or FOLDER. No network, nothing is run again.

Sphinx, MyST-NB and Furo do the work (pip install -e '.[docs]'); their settings stand in tests/site/conf.py."""
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT/'tests/site'
sys.path.insert(0, str(SITE))
from reading import (CHAPTER, DIRECTIVE, EXPORT, exercises, exported_from, module_definitions,  # noqa: E402
                     notebooks, page_name, settings, source_of, title_of)

PAGES = {'.github/CONTRIBUTING.md': 'contributing', 'CHANGELOG.md': 'changelog'} # Markdown files that become pages
MARK = '.nojekyll' # GitHub's pages are served as they are, and a folder that has it is a site
LINK = re.compile(r'\]\(([^)\s]+)\)')


def site_link(target, page):
    "Where a link of the notebook `page` leads on the site"
    if re.match(r'[a-z]+:|#', target): return target
    path, _, anchor = target.partition('#')
    folder = ROOT if page == 'index' else (ROOT/'nbs'/page).parent
    file = (folder/path).resolve()
    if not file.is_relative_to(ROOT): return target
    inside, up = file.relative_to(ROOT).as_posix(), '../'*page.count('/')
    if inside in PAGES: return f'{up}{PAGES[inside]}.md'
    if inside.startswith('nbs/') and file.is_dir(): inside, anchor = sorted(file.glob('*.ipynb'))[0].relative_to(ROOT).as_posix(), ''
    if inside.startswith('nbs/') and inside.endswith(('.ipynb', '.png')):
        return up + inside.removeprefix('nbs/') + (f'#{anchor}' if anchor else '')
    return f"{settings()['git_url']}/blob/{settings()['branch']}/{inside}"


def site_prose(text, page): return LINK.sub(lambda m: f']({site_link(m[1], page)})', text)


def site_output(output, page):
    "An output, whose links between notebooks lead to pages"
    html = ''.join(output.get('data', {}).get('text/html', ''))
    if not html: return output
    html = re.sub(r'href="([^"]+\.ipynb)(#[^"]*)?"', lambda m: f'href="{m[1][:-6]}.html{m[2] or ""}"', html)
    return output | {'data': output['data'] | {'text/html': html}}


def site_cell(cell, page):
    "A cell as the site shows it, or None: directives gone, exported code marked, plumbing folded"
    source = source_of(cell)
    if cell['cell_type'] == 'markdown': return cell | {'source': site_prose(source, page)}
    if cell['cell_type'] != 'code': return None
    cell = cell | {'outputs': [site_output(o, page) for o in cell['outputs']]}
    code = DIRECTIVE.sub('', source).strip('\n')
    if not code or 'nbdev_export(' in code: return None
    tags = list(cell.get('metadata', {}).get('tags', []))
    if EXPORT.search(source): tags.append('exported')
    if re.search(r'^#\|\s*hide\b', source, re.M): tags.append('hide-cell')
    if re.search(r'^#\|\s*code-fold:\s*true', source, re.M): tags.append('hide-input')
    if re.search(r'^#\|\s*echo:\s*false', source, re.M): tags.append('remove-input')
    return cell | {'source': code, 'metadata': {'tags': tags}}


def markdown_cell(text): return {'cell_type': 'markdown', 'id': hashlib.sha256(text.encode()).hexdigest()[:8], 'metadata': {}, 'source': text}


def toctree(pages, caption=None, hidden=False):
    "A list of (title, page) as Sphinx wants it"
    options = ([f':caption: {caption}'] if caption else []) + ([':hidden:'] if hidden else [':maxdepth: 1'])
    return '\n'.join(['```{toctree}', *options, '', *(f'{title} </{page}>' for title, page in pages), '```'])


def label(path):
    "What the sidebar calls a page: 03a Batches"
    number, _, rest = path.stem.partition('_')
    return f'{number} {title_of(path)}' if rest and number[:1].isdigit() else title_of(path)


def is_chapter(path): return path.parent == ROOT/'nbs' and CHAPTER.fullmatch(path.stem) is not None


def engine_of(chapter): return [p for p in notebooks() if p.stem[:2] == chapter.stem[:2] and p != chapter and p.stem[:3] != '000']


def contents():
    "The site's table of contents: (caption, pages); engine pages hang on their chapters"
    top = [p for p in notebooks() if p.stem != 'index']
    chapters = [p for p in top if is_chapter(p)]
    behind = {q for c in chapters for q in engine_of(c)}
    rest = [p for p in top if p not in behind and p not in chapters]
    named = {name: [(label(p), page_name(p)) for p in pages] for name, pages in {
        'Begin': [p for p in rest if p.stem.startswith('000')], 'The book': chapters, 'Exercises': exercises(),
        'At work': [p for p in rest if p.stem.startswith('07')],
        'Measured': [p for p in rest if not p.stem.startswith(('000', '07'))]}.items()}
    return named | {'Reference': [('All names', 'api/index'), *((n.capitalize(), n) for n in PAGES.values())]}


def site_notebook(path):
    "A notebook of the site"
    nb, page = json.loads(path.read_text(encoding='utf-8')), page_name(path)
    cells = [c for c in (site_cell(c, page) for c in nb['cells']) if c]
    if page == 'index':
        cells += [markdown_cell(toctree(pages, caption, hidden=True)) for caption, pages in contents().items() if pages]
    elif is_chapter(path):
        pages = [(label(p), page_name(p)) for p in engine_of(path)]
        cells.append(markdown_cell('## Behind this chapter\n\nThe engine makes it fast, safe and complete.\n\n' + toctree(pages)))
    return nb | {'cells': cells}


def escaped(text):
    "Plain text with code in backticks, as Markdown that means the same"
    parts = re.split(r'(`[^`]*`)', text)
    return ''.join(p if p.startswith('`') else re.sub(r'([\\*_\[\]<>{}$|#~])', r'\\\1', p) for p in parts)


def signature(d):
    "The head of a definition, in one line"
    if d.kind == 'data': return d.name
    parts = []
    for p in d.parameters:
        text = p.star + p.name + (f': {p.kind}' if p.kind else '')
        parts.append(text + (f' = {p.default}' if p.default is not None else ''))
    back = f' -> {d.returns}' if d.returns else ''
    return d.name if d.kind == 'property' else f"{d.name}({', '.join(parts)}){back}"


def api_entry(d, page, colons=4):
    "One definition in Markdown"
    head = [f"{':'*colons}{{py:{d.kind}}} {signature(d)}"]
    if d.kind == 'data' and d.value: head.append(f':value: {d.value}')
    if d.kind == 'property' and d.returns: head.append(f':type: {d.returns}')
    body = [escaped(' '.join(d.says.split()))] if d.says else []
    fields = [f':param {p.name}: {escaped(p.says)}' for p in d.parameters if p.name and p.says]
    if d.returns_says: fields.append(f':returns: {escaped(d.returns_says)}')
    if fields: body.append('\n'.join(fields))
    if page: body.append(f'[Its code](code:{d.name})')
    body += [api_entry(m, None, colons-1) for m in d.methods]
    return '\n'.join([*head, '', '\n\n'.join(body), ':'*colons])


def api_page(module, page):
    "All public names of a module"
    says, definitions = module_definitions(ROOT/f'sft_nb/{module}.py')
    head = f'# {module}\n\n{escaped(says)}. The page [{page}](/{page}.ipynb) builds it.\n\n```{{py:module}} sft_nb.{module}\n```'
    return '\n\n'.join([head, *(api_entry(d, page) for d in definitions)]) + '\n'


def api_pages():
    "Name of a file -> its text, for all modules that have public names"
    pages, rows = {}, []
    for path in notebooks():
        module, page = exported_from(path)[0], page_name(path)
        if module is None or not module_definitions(ROOT/f'sft_nb/{module}.py')[1]: continue
        pages[f'api/{module}'] = api_page(module, page)
        names = ', '.join(f'{{py:obj}}`~sft_nb.{module}.{d.name}`' for d in module_definitions(ROOT/f'sft_nb/{module}.py')[1])
        rows.append(f'| [{module}]({module}.md) | {names} |')
    tree = toctree([(n.removeprefix('api/'), n) for n in pages], hidden=True)
    head = '# All names\n\nEvery public name of the package, by module, in the order of the pages. Each leads to its signature, what its parameters mean, and its code. The [index](code:) has them by the alphabet.'
    return pages | {'api/index': f'{head}\n\n| module | names |\n|---|---|\n' + '\n'.join(rows) + f'\n\n{tree}\n'}


def write_sources(folder):
    "All that Sphinx reads"
    for path in notebooks() + exercises():
        target = folder/f'{page_name(path)}.ipynb'
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(site_notebook(path), ensure_ascii=False), encoding='utf-8')
    shutil.copytree(ROOT/'nbs/pictures', folder/'pictures')
    pages = {name: site_prose((ROOT/file).read_text(encoding='utf-8'), 'index') for file, name in PAGES.items()}
    for name, text in (pages | api_pages()).items():
        (folder/f'{name}.md').parent.mkdir(exist_ok=True)
        (folder/f'{name}.md').write_text(text, encoding='utf-8')


def make_site(out):
    "Write the site into the folder `out`; a warning is an error"
    if out.exists() and any(out.iterdir()) and not (out/MARK).exists():
        sys.exit(f'{out}: is not empty and holds no site; name another folder')
    with tempfile.TemporaryDirectory() as sources:
        write_sources(Path(sources)/'pages')
        if out.exists(): shutil.rmtree(out)
        places = ['-c', str(SITE), '-d', f'{sources}/read', f'{sources}/pages', str(out)]
        code = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', *places]).returncode
    (out/MARK).touch()
    return code


if __name__ == '__main__':
    sys.exit(make_site(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/'_docs').resolve()))
