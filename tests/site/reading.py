"What the site knows of the package by reading it: pages, modules, and every definition with its docments. Nothing is imported."
import ast
import io
import json
import re
import tokenize
from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DIRECTIVE = re.compile(r'^\s*#\s*\|.*\n?', re.M)
EXPORT = re.compile(r'^\s*#\s*\|\s*exports?\b', re.M)
CHAPTER = re.compile(r'0[0-6]_(data|templates|dataset|collate|model|training|evaluation)')


def settings():
    "The one section of settings.ini"
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']


def source_of(cell): return ''.join(cell['source'])


def read_cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']


def parsed(source):
    "The tree of a cell of code, or None where it is no plain Python"
    try: return ast.parse(DIRECTIVE.sub('\n', source))
    except SyntaxError: return None


def title_of(path):
    "The first heading of a notebook"
    text = '\n'.join(source_of(c) for c in read_cells(path) if c['cell_type'] == 'markdown')
    found = re.search(r'^#\s+(.*)$', text, re.M)
    return found[1].strip() if found else path.stem


def notebooks(): return sorted((ROOT/'nbs').glob('*.ipynb'))


def exercises(): return sorted((ROOT/'nbs').glob('*/**/*.ipynb'))


def page_name(path): return path.relative_to(ROOT/'nbs').with_suffix('').as_posix()


@dataclass
class Parameter:
    "One parameter or field"
    name: str
    kind: str # Its type, as written
    default: str|None # As written; None: it has to be given
    says: str # Its docment
    star: str = '' # '*', '**', or what stands before it


@dataclass
class Definition:
    "A public name, as the API page shows it"
    name: str
    kind: str # function, class, data, method, property
    says: str # Docstring, or the comment beside a constant
    parameters: list = field(default_factory=list)
    returns: str = ''
    returns_says: str = ''
    methods: list = field(default_factory=list)
    value: str = ''


def comments_of(source):
    "Comment by line, where a line has one after its code"
    lines = source.split('\n')
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip('# ').strip() for t in tokens
            if t.type == tokenize.COMMENT and lines[t.start[0]-1][:t.start[1]].strip()}


def unparse(node): return '' if node is None else ast.unparse(node)


def _shown_default(node):
    "A default for reading: what `field(default=...)` holds, and dots for what is long"
    if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'field':
        given = {k.arg: k.value for k in node.keywords}
        if 'default' in given: return _shown_default(given['default'])
        return f"{unparse(given['default_factory'])}()" if 'default_factory' in given else None
    text = unparse(node)
    return text if len(text) <= 40 and '\n' not in text else '...'


def _parameters(node, comments):
    spec = node.args
    plain = spec.posonlyargs + spec.args
    defaults = [None]*(len(plain) - len(spec.defaults)) + spec.defaults
    found = [(a, d, '') for a, d in zip(plain, defaults)]
    if spec.vararg: found.append((spec.vararg, None, '*'))
    elif spec.kwonlyargs: found.append((None, None, '*'))
    found += [(a, d, '') for a, d in zip(spec.kwonlyargs, spec.kw_defaults)]
    if spec.kwarg: found.append((spec.kwarg, None, '**'))
    for arg, default, star in found:
        if arg is None: yield Parameter('', '', None, '', star)
        elif arg.arg not in ('self', 'cls', 'ctx'):
            shown = None if default is None else _shown_default(default)
            closed = node.returns is not None and node.returns.lineno == arg.end_lineno # then the comment tells of what is returned
            yield Parameter(arg.arg, unparse(arg.annotation), shown, '' if closed else comments.get(arg.end_lineno, ''), star)


def _return_comment(node, comments):
    if node.returns is None: return ''
    end = max(node.body[0].lineno-1, node.returns.end_lineno)
    lines = range(node.returns.end_lineno, end+1)
    return next((comments[n] for n in lines if n in comments), '')


def _decorators(node): return {unparse(d).split('(')[0] for d in node.decorator_list}


def _function(node, comments, kind='function'):
    if kind == 'method' and _decorators(node) & {'property', 'cached_property'}: kind = 'property'
    return Definition(node.name, kind, ast.get_docstring(node) or '', list(_parameters(node, comments)),
                      unparse(node.returns), _return_comment(node, comments))


def _class(node, comments):
    own = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    init = next((n for n in own if n.name == '__init__'), None)
    parameters = list(_parameters(init, comments)) if init else []
    if 'dataclass' in _decorators(node):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and 'ClassVar' not in unparse(n.annotation)]
        parameters = [Parameter(n.target.id, unparse(n.annotation), None if n.value is None else _shown_default(n.value),
                                comments.get(n.end_lineno, '')) for n in fields]
    methods = [_function(n, comments, 'method') for n in own if not n.name.startswith('_')]
    return Definition(node.name, 'class', ast.get_docstring(node) or '', parameters, methods=methods)


def public_names(source):
    found = re.search(r'^__all__ = (\[.*?\])', source, re.M | re.S)
    return ast.literal_eval(found[1]) if found else []


def module_definitions(path):
    "(Docstring of a module, its public definitions in their order)"
    source = path.read_text(encoding='utf-8')
    tree, comments, public = ast.parse(source), comments_of(source), public_names(source)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef): found[node.name] = _function(node, comments)
        if isinstance(node, ast.ClassDef): found[node.name] = _class(node, comments)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            for name in names:
                value = unparse(node.value)
                shown = value if len(names) == 1 and len(value) <= 60 else ''
                found[name] = Definition(name, 'data', comments.get(node.end_lineno, ''), value=shown)
    return ast.get_docstring(tree) or '', [found[n] for n in public if n in found]


def exported_from(path):
    "(Module that a notebook exports or None, names defined at the top of its exported cells)"
    sources = [source_of(c) for c in read_cells(path) if c['cell_type'] == 'code']
    module = next((m[1] for s in sources for m in [re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M)] if m), None)
    trees = [parsed(s) for s in sources if EXPORT.search(s)]
    return module, [name for t in trees if t for name in defined_names(t)]


def defined_names(tree):
    "Names that a cell defines at its top: functions, classes and constants"
    names = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.append(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names += [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return names


def used_names(path):
    "All names that the code of a notebook mentions"
    trees = [parsed(source_of(c)) for c in read_cells(path) if c['cell_type'] == 'code']
    nodes = [n for t in trees if t for n in ast.walk(t)]
    return {n.id for n in nodes if isinstance(n, ast.Name)} | \
        {a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names} | \
        {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def imported_names(path):
    "Names that a notebook takes from the package as they are called there"
    trees = [parsed(source_of(c)) for c in read_cells(path) if c['cell_type'] == 'code']
    nodes = [n for t in trees if t for n in ast.walk(t)]
    ours = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or '').split('.')[0] == 'sft_nb']
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)} # a name with two meanings leads nowhere
    return {a.name for n in ours for a in n.names if a.asname is None} - bound
