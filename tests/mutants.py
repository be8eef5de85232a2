"""Bugs planted on purpose, one at a time, and who catches each: python tests/mutants.py --part 1/8, --only NAME, --list, --control

The list stands in `planted.py`, the table of the last runs in `mutants.md`, which each run brings up to date. (mutmut and cosmic-ray change modules only; a
notebook defines its cells itself, so there every bug of theirs would survive the page that holds it: hence this runner.) Linux and macOS only."""
import argparse
import ast
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

from planted import BUGS

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT/'tests/mutants.md'
HEAD = '''# Planted bugs, and who catches them

Written by `python tests/mutants.py` from `tests/planted.py`. A name such as `00e_split` is a page, usually the one that holds the code.

| bug | module | what it breaks | caught by |
|---|---|---|---|
'''
SECS = 240 # a page or a test file that takes longer hangs
HEAVY = ('torch', 'torch.distributed', 'nbdev.test', 'matplotlib.figure', 'scipy.stats', 'httpx', 'tokenizers', 'tiktoken', 'jinja2', 'pytest', 'hypothesis',
         'safetensors.torch', 'tenacity', 'tqdm.auto') # imported once, and there in every child


class Stale(Exception): "An entry whose text no longer stands where it should"


@cache
def module_text(path): return path.read_text(encoding='utf-8')


@cache
def exported_cells(path):
    "The sources of a notebook's exported cells"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells if c['cell_type']=='code']
    return [s for s in sources if re.search(r'^#\| *export', s, re.M)]


@cache
def page_of(module): # Such as 'run'; the notebook that it is made from, relative to the repository
    return Path(re.search(r'File to edit: \.\./(nbs/\S+\.ipynb)', module_text(ROOT/f'sft_nb/{module}.py'))[1])


def catcher_file(bug, name):
    "'page' is the bug's own; else a test, perhaps with ::name, or another page's name"
    if name=='page': return ROOT/page_of(bug.module)
    path = name.partition('::')[0]
    return ROOT/'tests'/path if path.endswith('.py') else ROOT/f'nbs/{path}.ipynb'


def check_entry(bug):
    "Raise `Stale` if a bug cannot be planted in one place of module and page, changes nothing, or has a catcher that is not there"
    text = module_text(ROOT/f'sft_nb/{bug.module}.py')
    if text.count(bug.before)!=1: raise Stale(f'{bug.name}: sft_nb/{bug.module}.py holds the text {text.count(bug.before)} times, not once')
    counts = [s.count(bug.before) for s in exported_cells(ROOT/page_of(bug.module))]
    if sum(counts)!=1: raise Stale(f'{bug.name}: {page_of(bug.module)} holds the text {sum(counts)} times in exported cells, not once')
    cell = exported_cells(ROOT/page_of(bug.module))[counts.index(1)]
    if ast.dump(ast.parse(cell))==ast.dump(ast.parse(cell.replace(bug.before, bug.after))): raise Stale(f'{bug.name}: changes nothing')
    gone = [name for name in bug.catchers if not catcher_file(bug, name).exists()]
    if gone: raise Stale(f'{bug.name}: there is no {gone[0]}')


def planted_page(bug, path):
    "The notebook with the bug in the one exported cell that holds its place"
    page = json.loads(path.read_text(encoding='utf-8'))
    for cell in page['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type']=='code' and re.search(r'^#\| *export', source, re.M):
            cell['source'] = source.replace(bug.before, bug.after).splitlines(keepends=True)
    return json.dumps(page, ensure_ascii=False, indent=1)


@contextlib.contextmanager
def planted(
    bug,
    root, # A copy of the repository
):
    "While inside, the copy holds the bug in module and page alike"
    module = root/f'sft_nb/{bug.module}.py'
    page = root/page_of(bug.module)
    old = {path: path.read_bytes() for path in (module, page)}
    module.write_text(module.read_text(encoding='utf-8').replace(bug.before, bug.after), encoding='utf-8')
    page.write_text(planted_page(bug, page), encoding='utf-8')
    try: yield
    finally:
        for path, data in old.items(): path.write_bytes(data)


def _in_child(root, path, words, said):
    "Run a page or a test in a process that has not imported sft_nb yet, and end with status 0 if it passes"
    os.setsid() # so that all it starts can be ended with it
    with open(said, 'w') as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    os.environ |= dict(PYTHONPATH=str(root), HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
    sys.dont_write_bytecode = True
    sys.path = [str(root), *(p for p in sys.path if Path(p or '.').resolve() not in (ROOT, ROOT/'tests'))]
    for name in ('planted', 'mutants'): sys.modules.pop(name, None)
    os.chdir(root)
    if path.suffix=='.ipynb':
        from nbdev.test import test_nb
        good, _ = test_nb(path, skip_flags=['notest'], basepath=root)
    else:
        import pytest
        good = pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '--no-header', *words, str(path)])==0
    for stream in (sys.stdout, sys.stderr): stream.flush()
    os._exit(not good)


def run_catcher(root, bug, name):
    "What failed: a test, or a page; '' if all passed"
    path = root/catcher_file(bug, name).relative_to(ROOT)
    words = ['-k', name.partition('::')[2]] if '::' in name else []
    said = root.parent/'said.txt'
    child = multiprocessing.get_context('fork').Process(target=_in_child, args=(root, path, words, said))
    child.start()
    child.join(SECS)
    hangs = ' (hangs)' if child.is_alive() else ''
    with contextlib.suppress(ProcessLookupError): os.killpg(child.pid, signal.SIGKILL)
    child.join()
    if child.exitcode==0 and not hangs: return ''
    named = re.findall(r'^(?:FAILED|ERROR) \S*?tests/([^\s\[]+)', said.read_text(encoding='utf-8', errors='replace'), re.M)
    return (named[0] if named else path.name.removesuffix('.ipynb')) + hangs


def hunt(bug, root):
    "Plant `bug` and look who catches it, in the order of its catchers; '' if nobody does"
    with planted(bug, root): return next(filter(None, (run_catcher(root, bug, name) for name in bug.catchers)), '')


def copy_repository(folder):
    skip = shutil.ignore_patterns('.git', '__pycache__', '.venv', 'runs', '.*_cache', '.hypothesis', '*.egg-info', 'build', 'dist')
    return Path(shutil.copytree(ROOT, Path(folder)/'copy', ignore=skip))


def work(bugs, control):
    "Hunt some bugs in a copy of one's own: a list of (its name, who catches it, seconds); with `control` who fails without it"
    for name in HEAVY: importlib.import_module(name)
    found = []
    passed = {}
    with tempfile.TemporaryDirectory() as folder:
        root = copy_repository(folder)
        for bug in bugs:
            begun = time.perf_counter()
            if not control: who = hunt(bug, root)
            else:
                for name in bug.catchers:
                    key = catcher_file(bug, name), name
                    if key not in passed: passed[key] = run_catcher(root, bug, name)
                who = ', '.join(filter(None, (passed[catcher_file(bug, name), name] for name in bug.catchers)))
            secs = time.perf_counter() - begun
            found.append((bug.name, who, secs))
            print(f"{bug.name:40} {who or ('passes' if control else 'SURVIVES')} ({secs:.0f} s)", flush=True)
    return found


def read_table():
    "Bug -> its line of `mutants.md`"
    lines = TABLE.read_text(encoding='utf-8').splitlines() if TABLE.exists() else []
    return {line.split(' | ')[0].removeprefix('| '): line for line in lines if line.startswith('| ') and not line.startswith('| bug')}


def write_table(found):
    lines = read_table()
    bugs = {bug.name: bug for bug in BUGS}
    for name, who, _ in found: lines[name] = f'| {name} | {bugs[name].module} | {bugs[name].breaks} | {who or "**nobody**"} |'
    TABLE.write_text(HEAD + ''.join(f'{lines[bug.name]}\n' for bug in BUGS if bug.name in lines), encoding='utf-8')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--part', default='1/1', metavar='K/N', help='every N-th bug, from the K-th on')
    parser.add_argument('--only', nargs='+', default=[''], metavar='NAME', help='beginnings of names of bugs, or modules')
    parser.add_argument('--list', action='store_true', help='name them and plant nothing')
    parser.add_argument('--control', action='store_true', help='plant nothing: does all pass that shall fail?')
    parser.add_argument('--at-once', type=int, default=2, metavar='N', help='how many at a time [2]')
    args = parser.parse_args()
    k, n = map(int, args.part.split('/'))
    bugs = [bug for bug in BUGS[k-1::n] if any(bug.name.startswith(o) or bug.module==o for o in args.only)]
    if args.list: return print('\n'.join(f'{bug.name:40} {bug.module:14} {bug.breaks}' for bug in bugs))
    for bug in bugs: check_entry(bug)
    begun = time.perf_counter()
    shares = [bugs[i::args.at_once] for i in range(args.at_once)]
    with ProcessPoolExecutor(args.at_once, multiprocessing.get_context('spawn')) as pool:
        found = [one for share in pool.map(work, shares, [args.control]*len(shares)) for one in share]
    bad = [name for name, who, _ in found if bool(who)==args.control]
    if not args.control: write_table(found)
    told = 'fail without a bug' if args.control else 'caught by nobody'
    print(f"{len(found)} bugs in {(time.perf_counter() - begun)/60:.1f} minutes; {told}: {', '.join(bad) or 'none'}")
    return sys.exit(bool(bad))


if __name__=='__main__': main()
