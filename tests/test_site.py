"The site: its sources hold together (quick); built and read in a browser, nothing is broken, too wide or too pale (--slow)."
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT/'tests'), str(ROOT/'tests/site')]
import make_site  # noqa: E402
from checks import Links, browser_faults, find_chromium, link_faults, reachable  # noqa: E402
from reading import exercises, imported_names, module_definitions, notebooks, page_name, public_names, read_cells, source_of  # noqa: E402

TOOLS = [name for name in ('sphinx', 'myst_nb', 'furo', 'playwright') if importlib.util.find_spec(name) is None]
PROSE = re.compile(r'```.*?```|`[^`\n]*`', re.S)


def prose_of(path):
    "What a source of the site says in Markdown"
    if path.suffix == '.md': return path.read_text(encoding='utf-8')
    return '\n\n'.join(source_of(c) for c in read_cells(path) if c['cell_type'] == 'markdown')


def broken_links(path, folder):
    "Links to files that are not there"
    links = make_site.LINK.findall(PROSE.sub('', prose_of(path)))
    return [link for link in links if not re.match(r'[a-z]+:|#', link) and not (folder/link.partition('#')[0]).exists()]


def test_links_of_the_sources_lead_somewhere():
    files = [*notebooks(), *exercises(), *(ROOT/f for f in make_site.PAGES), ROOT/'README.md']
    from_root = [ROOT/f for f in ('nbs/index.ipynb', 'README.md', *make_site.PAGES)]
    found = {p.relative_to(ROOT).as_posix(): broken_links(p, ROOT if p in from_root else p.parent) for p in files}
    assert len(found) > 60 and {name: links for name, links in found.items() if links} == {}


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path/'page.md'
    page.write_text('[a](page.md), [b](nowhere.ipynb), `[c](no)`, [d](https://x.org)')
    assert broken_links(page, tmp_path) == ['nowhere.ipynb']


def test_the_workflow_builds_the_site_as_the_readme_says():
    line = next(line for line in (ROOT/'README.md').read_text(encoding='utf-8').splitlines() if line.endswith('tests/make_site.py') and 'pip' in line)
    assert line in (ROOT/'.github/workflows/site.yml').read_text(encoding='utf-8')


def commands_of(text):
    "The lines of shell blocks that call this library's command, as lists of words"
    blocks = re.findall(r'^```sh\n(.*?)^```', text, re.M | re.S)
    lines = [part for block in blocks for line in block.replace('\\\n', ' ').splitlines() for part in re.split(r'&&|[|;]', line)]
    words = [re.split(r'\s[<>]', line)[0] for line in lines]
    return [w[1:] for w in (shlex.split(line, comments=True) for line in words) if w and w[0] == 'sft_nb']


def refusals(commands):
    "Commands that the command line does not know"
    from sft_nb.cli import _build_parser
    refused = []
    for words in commands:
        try: _build_parser().parse_args(words)
        except SystemExit: refused.append(words)
    return refused


def test_every_command_that_is_shown_exists(capsys):
    shown = {path.relative_to(ROOT).as_posix(): commands_of(prose_of(path)) for path in (*notebooks(), *exercises(), ROOT/'README.md')}
    assert sum(map(len, shown.values())) > 20
    assert {name: refusals(commands) for name, commands in shown.items() if refusals(commands)} == {}
    assert refusals(commands_of('```sh\nsft_nb run --no-such x # why\nsft_nb run\nls\n```')) == [['run', '--no-such', 'x']]


def test_every_page_is_in_the_contents():
    listed = [page for pages in make_site.contents().values() for _, page in pages]
    behind = [page_name(p) for c in notebooks() if make_site.is_chapter(c) for p in make_site.engine_of(c)]
    pages = [page_name(p) for p in notebooks() + exercises() if p.stem != 'index']
    assert sorted(listed + behind) == sorted([*pages, 'api/index', *make_site.PAGES.values()])


def test_chapters_lead_to_their_engine_and_exercises_of_the_same_name_do_not():
    last = {folder: make_site.site_notebook(ROOT/f'nbs/{folder}03_collate.ipynb')['cells'][-1]['source'] for folder in ('', 'exercises/')}
    assert '03b Loaders </03b_loaders>' in last['']
    assert 'Behind this chapter' not in last['exercises/']


def test_every_public_name_has_an_entry():
    missing = {}
    for path in (ROOT/'sft_nb').glob('[a-z]*.py'):
        names = public_names(path.read_text(encoding='utf-8'))
        entries = [d.name for d in module_definitions(path)[1]]
        if names != entries: missing[path.stem] = set(names) - set(entries)
    assert missing == {}


TOY = '''"A toy"
__all__ = ['LIMIT', 'Sampling', 'fit']
LIMIT = 7 # Most of them
@dataclass
class Sampling:
    "How: `Sampling(0.7)`"
    heat:float = field(default=0., metadata=rule(least=0)) # Divides *the* scores
    def draw(self, n:int)->list: # `n` ids
        "Draw"
def fit(
    rows:list, # What is <fitted>
    *,
    lr:float|None = None, # Above 0
)->tuple[int, str]: # Two things
    "Fit `rows`"
'''


def test_entries_hold_the_docments(tmp_path):
    (tmp_path/'toy.py').write_text(TOY)
    says, (limit, sampling, fit) = module_definitions(tmp_path/'toy.py')
    assert (says, limit.value, limit.says) == ('A toy', '7', 'Most of them')
    assert make_site.signature(sampling) == 'Sampling(heat: float = 0.0)' and sampling.parameters[0].says == 'Divides *the* scores'
    assert [(m.name, m.returns_says) for m in sampling.methods] == [('draw', '`n` ids')]
    assert make_site.signature(fit) == 'fit(rows: list, *, lr: float | None = None) -> tuple[int, str]'
    entry = make_site.api_entry(fit, 'page')
    assert ':param rows: What is \\<fitted\\>' in entry and ':returns: Two things' in entry and '(code:fit)' in entry
    assert 'Divides \\*the\\* scores' in make_site.api_entry(sampling, 'page')


def test_cells_are_shown_without_directives():
    cell = {'cell_type': 'code', 'source': '#| export\ndef f(): pass', 'outputs': [], 'metadata': {}, 'id': 'a', 'execution_count': None}
    shown = make_site.site_cell(cell, '00_data')
    assert shown['source'] == 'def f(): pass' and shown['metadata']['tags'] == ['exported']
    assert make_site.site_cell(cell | {'source': '#| hide\nimport nbdev; nbdev.nbdev_export()'}, '00_data') is None
    assert make_site.site_link('nbs/03_collate.ipynb', 'index') == '03_collate.ipynb'
    assert make_site.site_link('../03_collate.ipynb#x', 'exercises/03_collate') == '../03_collate.ipynb#x'
    assert make_site.site_link('../tests/naive.py', '00_data').endswith('/blob/main/tests/naive.py')


def test_names_with_two_meanings_are_not_linked(tmp_path):
    source = 'from sft_nb.data import Record, as_records as read, exact\nfrom x import y\nexact = 5\n'
    (tmp_path/'a.ipynb').write_text('{"cells": [{"cell_type": "code", "source": %s}]}' % json.dumps(source))
    assert imported_names(tmp_path/'a.ipynb') == {'Record'}


def test_a_folder_that_is_no_site_is_not_emptied(tmp_path):
    (tmp_path/'mine.txt').write_text('keep me')
    with pytest.raises(SystemExit, match='holds no site'): make_site.make_site(tmp_path)
    assert (tmp_path/'mine.txt').exists()


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built once"
    if TOOLS: pytest.skip(f"{', '.join(TOOLS)} not installed: pip install -c constraints.txt -e '.[docs]'")
    out = tmp_path_factory.mktemp('site')/'html'
    done = subprocess.run([sys.executable, ROOT/'tests/make_site.py', out], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_no_link_of_the_site_is_broken(site):
    assert list(link_faults(site)) == []


@pytest.mark.slow
def test_every_page_can_be_clicked_to(site):
    pages = {p.relative_to(site).as_posix() for p in site.rglob('*.html')}
    assert pages - reachable(site) == {'search.html', 'py-modindex.html'} # the box in the sidebar leads to the first


@pytest.mark.slow
def test_prose_leads_to_definitions_and_the_index_of_search_knows_them(site):
    page = (site/'03_collate.html').read_text(encoding='utf-8')
    assert {'def-row_targets', 'def-custom_collate_fn'} <= Links(page).ids
    assert '<a class="name" href="01c_rows.html#def-Example"><span class="n">Example</span></a>' in page # in code
    assert '<span class="nf">row_targets</span>' in page # where it is defined it leads nowhere
    leads = {lead for p in site.glob('0*.html') for lead in Links(p.read_text(encoding='utf-8')).leads if '#def-' in lead}
    assert len(leads) > 100
    assert '../03_collate.html#def-custom_collate_fn' in Links((site/'api/collate.html').read_text(encoding='utf-8')).leads
    assert 'custom_collate_fn' in (site/'searchindex.js').read_text(encoding='utf-8')


@pytest.mark.slow
def test_outputs_are_those_of_the_notebooks(site):
    html = (site/'000_tour.html').read_text(encoding='utf-8')
    printed = [''.join(o['text']) for c in read_cells(ROOT/'nbs/000_tour.ipynb') if c['cell_type'] == 'code' for o in c['outputs'] if 'text' in o]
    text = re.sub(r'<[^>]+>', '', html)
    assert printed and all(line.split()[0] in text for out in printed for line in out.splitlines() if line.split() and line.split()[0].isalnum())


FAULTY = '''<!doctype html><title>x</title><body style="background:#fff"><p style="color:#888">pale</p>
<article><div style="width:900px">wide</div></article><img src="none.png"><script>undefined_name</script><p style="color:#000">good</p>'''


def need_browser():
    if find_chromium() is None: pytest.skip('no chromium on this machine: apt-get install chromium')
    if TOOLS: pytest.skip(f"{', '.join(TOOLS)} not installed: pip install -c constraints.txt -e '.[docs]'")


@pytest.mark.slow
def test_the_browser_sees_each_kind_of_fault(tmp_path):
    need_browser()
    (tmp_path/'index.html').write_text(FAULTY)
    (tmp_path/'favicon.ico').touch()
    faults, _ = browser_faults(tmp_path, ['index.html'], find_chromium(), themes=('light',))
    kinds = ' '.join(faults)
    assert all(kind in kinds for kind in ('contrast 3.5', '390 px: 518 px too wide', 'error: undefined_name', '404')), faults
    assert len(faults) == 4, faults


@pytest.mark.slow
def test_chromium_is_content(site):
    need_browser()
    pages = sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html'))
    faults, n_texts = browser_faults(site, pages, find_chromium())
    assert faults == {} and n_texts > 1000*len(pages)


@pytest.mark.slow
def test_search_finds_a_name_without_a_network(site):
    need_browser()
    from checks import served
    from playwright.sync_api import sync_playwright
    with served(site) as base, sync_playwright() as player:
        browser = player.chromium.launch(executable_path=find_chromium(), args=['--no-sandbox'])
        tab = browser.new_page()
        tab.goto(f'{base}search.html?q=custom_collate_fn')
        tab.wait_for_selector('ul.search li a', timeout=20_000)
        assert any('custom_collate_fn' in a.inner_text() for a in tab.query_selector_all('ul.search li a'))
        browser.close()
