"Sphinx's settings for the site, and what it learns here: where a definition stands, and that prose and code which name it lead there"
import html
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).parent))
import reading  # noqa: E402

_settings = reading.settings()
project = _settings['lib_name']
release = _settings['version']
copyright = f"{_settings['copyright'].split()[0]} {_settings['author']}"
extensions = ['myst_nb']
root_doc = 'index'
suppress_warnings = ['mystnb.unknown_mime_type']

nb_execution_mode = 'off' # the outputs are those that the notebooks hold
nb_merge_streams = True
nb_code_prompt_show = 'Imports and plumbing'
myst_enable_extensions = ['colon_fence', 'fieldlist']
myst_url_schemes = ('http', 'https', 'mailto', 'code') # code:NAME leads to the cell that defines NAME
myst_heading_anchors = 3
myst_links_external_new_tab = False
maximum_signature_line_length = 80
add_module_names = False
python_use_unqualified_type_names = True
python_display_short_literal_types = True
toc_object_entries = False

html_theme = 'furo'
html_title = f'{project} {release}'
html_static_path = ['static']
html_css_files = ['site.css']
html_favicon = 'static/icon.svg'
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_use_index = True
pygments_style = 'a11y-high-contrast-light'
pygments_dark_style = 'a11y-high-contrast-dark'
html_theme_options = {'navigation_with_keys': True, 'top_of_page_buttons': []}

CALL = re.compile(r'(?:sft_nb\.)?((?:\w+\.)*\w+)(\(.*\))?', re.S)
PLAIN_WORD = re.compile(r'[a-z]+')


class Book:
    "Where each definition and each page stands"
    def __init__(self):
        self.pages = {reading.page_name(p): p for p in reading.notebooks()}
        self.homes, self.modules, self.api, self.uses = {}, {}, {}, {}
        self.imported = {page: reading.imported_names(p) for page, p in self.pages.items()}
        self.imported |= {reading.page_name(p): reading.imported_names(p) for p in reading.exercises()}
        for page, path in self.pages.items():
            module, names = reading.exported_from(path)
            self.uses[page] = reading.used_names(path)
            for name in names: self.homes.setdefault(name, page)
            self.imported[page] |= {name for name in names if not name.startswith('_')}
            if module:
                self.modules[module] = page
                for name in reading.public_names((reading.ROOT/f'sft_nb/{module}.py').read_text(encoding='utf-8')): self.api[name] = module

    def find(self, text, page):
        "(Page, anchor) of what a piece of code in prose names, or None; a plain word has to be known to its page"
        found = CALL.fullmatch(text.removesuffix('.ipynb'))
        if not found: return None
        whole, *rest = found[1].split('.')
        if not rest and whole in self.pages: return whole, ''
        if rest and whole in self.modules: whole, *rest = rest
        if whole not in self.homes: return None
        known = whole in self.uses.get(page, ()) or found[2] or text.startswith('sft_nb.')
        return (self.homes[whole], f'def-{whole}') if known or not PLAIN_WORD.fullmatch(whole) else None


BOOK = Book()


def is_cell(node, kind): return isinstance(node, nodes.container) and kind in node.get('classes', ())


def mark_definitions(app, doctree):
    "Give each exported definition an anchor, and each picture a text for who cannot see it"
    page, seen = app.env.docname, set()
    for block in doctree.findall(nodes.literal_block):
        tree = reading.parsed(block.astext()) if block.get('language', '') in ('ipython3', 'python', 'ipython') else None
        inside = block.parent
        if tree is None or not is_cell(inside, 'cell_input'): continue
        names = [n for n in reading.defined_names(tree) if BOOK.homes.get(n) == page]
        for name in names:
            label = f'def-{name}'
            if label in seen: continue
            seen.add(label)
            block['ids'].append(label)
    for image in doctree.findall(nodes.image):
        if not image.get('alt'): image['alt'] = what_to_see(image)


def what_to_see(image):
    "The first sentence of the prose after a picture"
    at = image
    while at is not None and not is_cell(at, 'cell'): at = at.parent
    after = at.next_node(nodes.paragraph, siblings=True, descend=False) if at is not None else None
    return after.astext().split('. ')[0].replace('\n', ' ') if after is not None else 'picture'


def link_names(app, doctree, page):
    "Prose that names a definition or a page leads to it"
    for link in doctree.findall(nodes.reference):
        if not link.get('refuri', '').startswith('code:'): continue
        name = link['refuri'].removeprefix('code:')
        where = (BOOK.homes[name], f'#def-{name}') if name else ('genindex', '')
        link['refuri'] = app.builder.get_relative_uri(page, where[0]) + where[1]
        link['internal'] = True
    for literal in list(doctree.findall(nodes.literal)):
        above = literal.parent
        if isinstance(above, nodes.reference) or any(isinstance(a, (nodes.title, nodes.reference)) for a in ancestors(literal)): continue
        if 'code' in literal.get('classes', ()) and 'inline' not in literal.get('classes', ()): continue
        found = BOOK.find(literal.astext(), page)
        if not found or found[0] == page and not found[1]: continue
        uri = app.builder.get_relative_uri(page, found[0]) if found[0] != page else ''
        link = nodes.reference('', '', internal=True, refuri=uri + (f'#{found[1]}' if found[1] else ''), classes=['name'])
        above.replace(literal, link)
        link += literal


TOKEN = re.compile(r'<span class="(\w+)">([^<]*)</span>')


def link_code(app, page, template, context, doctree):
    "A name of the package in a cell's code leads to the cell that defines it; nothing is run to know which name it is"
    known = BOOK.imported.get(page)
    if known is None or not context.get('body'): return

    def linked(cell):
        before = ['', '']
        def link(token):
            kind, text = token[1], html.unescape(token[2])
            after = cell[0][token.end():token.end()+40]
            whole = before[-1] != '.' or before[-2] == 'sft_nb' and text in BOOK.api # a name, or an attribute of the package
            before.append(text)
            place = BOOK.homes.get(text) if kind == 'n' and whole and (text in known or before[-2] == '.') else None
            if place is None or after.startswith('<span class="o">=</span>'): return token[0]
            uri = app.builder.get_relative_uri(page, place) if place != page else ''
            return f'<a class="name" href="{uri}#def-{text}">{token[0]}</a>'
        return TOKEN.sub(link, cell[0])

    context['body'] = re.sub(r'<div class="cell_input.*?</pre>', linked, context['body'], flags=re.S)


def ancestors(node):
    while node.parent is not None:
        node = node.parent
        yield node


def type_target(app, env, node, inside):
    "A type in a signature leads to its entry, whatever module it is from"
    name = node.get('reftarget', '').rpartition('.')[2]
    if node.get('refdomain') != 'py' or name not in BOOK.api: return None
    target = f'sft_nb.{BOOK.api[name]}.{name}'
    return make_refnode(app.builder, node['refdoc'], f'api/{BOOK.api[name]}', target, [inside], name)


def setup(app):
    app.connect('doctree-read', mark_definitions)
    app.connect('doctree-resolved', link_names)
    app.connect('missing-reference', type_target)
    app.connect('html-page-context', link_code)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
