"One option for all tests: --slow also runs what takes minutes."
import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')          # no test may wait for a hub
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1') # one core a worker
import pytest


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', default=False, help='also run tests that take minutes')


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; runs only with --slow')


def pytest_collection_modifyitems(config, items):
    if config.getoption('--slow'): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='slow: runs with --slow'))
