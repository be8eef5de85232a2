"A hub of models on this machine: as much of its protocol as a download needs, and a list of what it was asked for."
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = 'a'*40


class Hub(BaseHTTPRequestHandler):
    repos, asked = {}, []

    def log_message(self, *_): pass

    def do_HEAD(self): self.do_GET(body=False)

    def do_GET(self, body=True):
        self.asked.append(self.path)
        path = self.path.split('?')[0]
        if m := re.fullmatch(r'/api/models/([^/]+/[^/]+)/(?:revision|tree)/([^/]+)(/.*)?', path):
            folder = self.repos.get(m[1])
            if folder is None: return self.answer(404, b'{}', {'X-Error-Code': 'RepoNotFound'}, body)
            if m[2] not in ('main', 'v2', COMMIT): return self.answer(404, b'{}', {'X-Error-Code': 'RevisionNotFound'}, body)
            files = sorted(p.name for p in folder.iterdir())
            if '/tree/' in path: data = [dict(type='file', path=f, size=(folder/f).stat().st_size, oid='0'*40) for f in files]
            else: data = dict(id=m[1], modelId=m[1], sha=COMMIT, siblings=[dict(rfilename=f) for f in files])
            return self.answer(200, json.dumps(data).encode(), {'Content-Type': 'application/json'}, body)
        m = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
        if m and m[1] in self.repos:
            data = (self.repos[m[1]]/m[3]).read_bytes()
            return self.answer(200, data, {'X-Repo-Commit': COMMIT, 'ETag': f'"{hashlib.sha256(data).hexdigest()}"'}, body)
        self.answer(404, b'{}', {'X-Error-Code': 'RepoNotFound'}, body)

    def answer(self, status, data, headers, body):
        self.send_response(status)
        for k, v in (headers | {'Content-Length': str(len(data))}).items(): self.send_header(k, v)
        self.end_headers()
        if body: self.wfile.write(data)


@contextmanager
def toy_hub(repos, home):
    "Serve `repos`, name -> folder, and give (variables for a process that shall use this hub, list of the paths it asks for)"
    handler = type('Handler', (Hub,), dict(repos=repos, asked=[]))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_OFFLINE='0', OMP_NUM_THREADS='1')
    try: yield env, handler.asked
    finally:
        server.shutdown()
        server.server_close()
