"Two options for all tests: --slow also runs what takes minutes, --quick only what every system and Python should pass in a few."
import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')          # no test may wait for a hub
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1') # one core a worker
import signal

import pytest

QUICK = {'test_collate', 'test_data', 'test_device', 'test_fetch', 'test_hub', 'test_places', 'test_plain', 'test_records', 'test_scratchpad', 'test_sync', 'test_templates'}

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler) # in the background of a shell


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', default=False, help='also run tests that take minutes')
    parser.addoption('--quick', action='store_true', default=False, help='run the files in QUICK only')


def pytest_ignore_collect(collection_path, config):
    if config.getoption('--quick') and collection_path.suffix == '.py' and collection_path.stem not in QUICK: return True
    return None  # the rest is as pytest has it


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; runs only with --slow')
    try: import hypothesis
    except ImportError: return # some of the quick tests' machines do without
    hypothesis.settings.register_profile('same', derandomize=True) # the test command says the same twice; --slow draws anew
    if not config.getoption('--slow'): hypothesis.settings.load_profile('same')


def pytest_collection_modifyitems(config, items):
    if config.getoption('--slow'): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='slow: runs with --slow'))
