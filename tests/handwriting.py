"""What `.github/CONTRIBUTING.md` asks of a page, as far as a program can see it: python tests/handwriting.py [NOTEBOOK ...] prints each fault."""
import ast
import io
import json
import re
import statistics
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = re.compile(r'^\s*(for .*: *)?(assert\b|test_\w+\(|with (expect_fail|ExceptionExpected)|(torch\.)?testing\.|assert_\w+\()')
DIRECTIVE = re.compile(r'^\s*#\s*\|')
EXPORT = re.compile(r'^\s*#\s*\|\s*exports?\b', re.M)
DEFINITION = re.compile(r'^(def|class|async def|@)', re.M)
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
MAX_WIDTH, MAX_SILENT, MAX_MODULE, MAX_TOKENS, MAX_PACKED, MAX_ARGS = 110, 40, 450, 10.8, 1, 5
NOT_NAMES = {'save', 'go', 'step', 'check'}
TAKES_FLAG = {'get', 'getattr', 'setdefault', 'pop', 'put', 'setattr', 'append', 'next', 'isinstance', 'print', 'bool', 'int', 'full', 'fill_', 'masked_fill',
              'masked_fill_', 'requires_grad_', 'array', 'repr', 'sum', 'fromkeys', 'all_equal', 'set_grad_enabled', 'index_fill_', 'add', 'add_'}


def code_cells(path):
    "(index, source) of each cell of code"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [(i, ''.join(c['source'])) for i, c in enumerate(cells) if c['cell_type'] == 'code']


def code_lines(source): return [l for l in source.split('\n') if l.strip() and not DIRECTIVE.match(l)]


def docstring_lines(tree):
    "Numbers of the lines that docstrings take"
    owners = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(n) is not None]
    return {line for n in owners for line in range(n.body[0].lineno, n.body[0].end_lineno+1)}


def tokens_a_line(source):
    "(Tokens, lines) of what is code"
    skip, per_line = docstring_lines(ast.parse(source)), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE and token.start[0] not in skip:
            per_line[token.start[0]] = per_line.get(token.start[0], 0)+1
    return sum(per_line.values()), len(per_line)


def is_packed(node):
    "Several values in one assignment that have nothing to do with each other (a swap has)"
    if not (isinstance(node, ast.Assign) and len(node.targets) == 1): return False
    target, value = node.targets[0], node.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)): return False
    names = [{x.id for x in ast.walk(side) if isinstance(x, ast.Name)} for side in (target, value)]
    return not names[0] & names[1]


def return_is_described(node, lines):
    "Has the line that closes the signature a comment after its colon?"
    if node.returns is None: return not any(isinstance(n, ast.Return) and n.value is not None for n in own_nodes(node))
    if isinstance(node.returns, ast.Constant) and node.returns.value is None: return True
    end = node.body[0].lineno-1 if node.body[0].lineno > node.returns.end_lineno else node.returns.end_lineno
    return any('#' in line for line in lines[node.returns.end_lineno-1:end])


def own_nodes(function):
    "The nodes of a function without those of functions inside it"
    todo = list(function.body)
    while todo:
        n = todo.pop()
        yield n
        if not isinstance(n, (ast.FunctionDef, ast.Lambda, ast.ClassDef)): todo.extend(ast.iter_child_nodes(n))


def functions_of(tree):
    "(Function, owning class or None) at the top and in classes"
    for n in tree.body:
        if isinstance(n, ast.FunctionDef): yield n, None
        if isinstance(n, ast.ClassDef): yield from ((m, n) for m in n.body if isinstance(m, ast.FunctionDef))


def signature_faults(node, owner, lines):
    "What is wrong with a function's head"
    name = node.name if owner is None else f'{owner.name}.{node.name}'
    args = [a for a in node.args.posonlyargs + node.args.args if a.arg not in ('self', 'cls', 'ctx')]
    by_autograd = owner is not None and node.name in ('forward', 'backward')
    if len(args) > MAX_ARGS and not by_autograd: yield f'{name}: {len(args)} positional parameters; make those after {MAX_ARGS} keyword-only'
    if owner is None and node.args.args and node.args.args[0].arg == 'self': yield f'{name}: takes self outside a class'
    public = not node.name.startswith('_') and (owner is None or not owner.name.startswith('_'))
    if not public or by_autograd: return
    for a in args + node.args.kwonlyargs:
        if a.annotation is None: yield f'{name}: parameter {a.arg} has no type'
        elif '#' not in lines[a.end_lineno-1]: yield f'{name}: parameter {a.arg} has no docment'
    if ast.get_docstring(node) is None: yield f'{name}: no docstring'
    if not return_is_described(node, lines): yield f'{name}: what it returns is not described'


def has_reason(node, lines):
    "Does a comment stand on the import or above it, where only imports may stand between?"
    at = node.end_lineno-1
    while at >= 0 and (lines[at].strip().startswith(('import ', 'from ', '#')) or at >= node.lineno-1):
        if '#' in lines[at]: return True
        at -= 1
    return False


def cell_faults(source):
    "What is wrong with one exported cell"
    tree, lines = ast.parse(source), source.split('\n')
    definitions = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    if len(definitions) > 1: yield f"{len(definitions)} definitions in a cell: {', '.join(d.name for d in definitions)}"
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_WIDTH: yield f'line {number} has {len(line)} characters'
    for node, owner in functions_of(tree): yield from signature_faults(node, owner, lines)
    for n in ast.walk(tree):
        if is_packed(n): yield f'line {n.lineno}: packs unrelated values in an assignment'
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda): yield f'line {n.lineno}: names a lambda'
        if isinstance(n, ast.Call):
            called = n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, 'id', '')
            flags = [a for a in n.args if isinstance(a, ast.Constant) and isinstance(a.value, bool)]
            if flags and called not in TAKES_FLAG: yield f'line {n.lineno}: positional {flags[0].value} in a call of {called}'
        if isinstance(n, ast.FunctionDef):
            inside = [m for m in ast.walk(n) if isinstance(m, (ast.Import, ast.ImportFrom))]
            for m in inside:
                if not has_reason(m, lines): yield f'line {m.lineno}: an import inside a function needs its reason in a comment'


def page_measures(path):
    "Faults of a page, and its numbers: definitions, tested ones, lengths of its cells of code"
    faults, kinds, lengths, silent = [], [], [], 0
    for i, source in code_cells(path):
        lines = code_lines(source)
        if lines: lengths.append(len(lines))
        if not EXPORT.search(source):
            silent = 0
            kinds.append('test' if any(CHECK.match(l) for l in lines) else 'run')
            continue
        faults += [f'{path.stem} [{i}] {fault}' for fault in cell_faults(source)]
        if not DEFINITION.search(source): continue
        kinds.append('definition')
        silent += len(lines)
        if silent > MAX_SILENT: faults.append(f'{path.stem} [{i}] {silent} exported lines without one being run')
    at = [i for i, k in enumerate(kinds) if k == 'definition']
    tested = sum('test' in kinds[i+1:(at[j+1] if j+1 < len(at) else None)] for j, i in enumerate(at))
    return faults, len(at), tested, lengths


def module_faults(path):
    "What is wrong with a module as a whole"
    source = path.read_text(encoding='utf-8')
    tokens, lines = tokens_a_line(source)
    packed = sum(map(is_packed, ast.walk(ast.parse(source))))
    if len(source.splitlines()) > MAX_MODULE: yield f'{path.name}: {len(source.splitlines())} lines; split the page'
    if tokens > MAX_TOKENS*lines: yield f'{path.name}: {tokens/lines:.1f} tokens a line of code'
    if 100*packed > MAX_PACKED*lines: yield f'{path.name}: {packed} packed assignments in {lines} lines'
    names = re.search(r'^__all__ = (\[.*?\])', source, re.M | re.S)
    bad = sorted(NOT_NAMES & set(ast.literal_eval(names[1]))) if names else []
    if bad: yield f"{path.name}: __all__ holds {', '.join(bad)}"


def module_of(path):
    "The module that a page exports, or None"
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(s for _, s in code_cells(path)[:3]), re.M)
    return ROOT/f'sft_nb/{found[1]}.py' if found else None


if __name__ == '__main__':
    for page in [Path(a) for a in sys.argv[1:]] or sorted((ROOT/'nbs').glob('0*.ipynb')):
        ROOT = page.resolve().parent.parent
        faults, n, tested, lengths = page_measures(page)
        module = module_of(page)
        if module and module.exists(): faults += list(module_faults(module))
        print(*faults, sep='\n')
        size = f'{len(module.read_text().splitlines())} lines, %.1f tokens a line' % (lambda t: t[0]/max(t[1], 1))(tokens_a_line(module.read_text())) if module and module.exists() else ''
        print(f'== {page.stem}: {len(faults)} faults; {tested} of {n} definitions tested; median cell {statistics.median(lengths):g} lines; {size}')
