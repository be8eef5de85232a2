"A hub of models on this machine: as much of its protocol as a download or an upload needs, and a list of what it was asked for."
import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = 'a'*40


class Hub(BaseHTTPRequestHandler):
    repos, asked, store, blobs = {}, [], None, {}

    def log_message(self, *_): pass

    def do_HEAD(self): self.do_GET(body=False)

    def do_GET(self, body=True):
        self.asked.append(self.path)
        path = self.path.split('?')[0]
        if path == '/api/whoami-v2' and self.store: return self.answer(200, json.dumps({'name': 'me', 'type': 'user', 'orgs': []}).encode(), {}, body)
        if self.store and (m := re.fullmatch(r'/api/models/([^/]+/[^/]+)', path)) and self.about(m[1]):
            return self.answer(200, json.dumps(dict(id=m[1], modelId=m[1], sha=COMMIT, siblings=[], private=self.about(m[1])['private'])).encode(), {}, body)
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

    def about(self, repo):
        "What is known of a repository that was made here"
        kept = self.store/f'{repo}.about.json'
        return json.loads(kept.read_text()) if kept.is_file() else None

    def tell(self, status, **told): self.answer(status, json.dumps(told).encode(), {'Content-Type': 'application/json'}, True)

    def do_POST(self):
        "Making a repository, and the four steps of a commit: how each file goes, where the large ones go, and the commit itself"
        self.asked.append(self.path)
        path, data = self.path.split('?')[0], self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Authorization') != 'Bearer hf_good': return self.tell(401, error='Invalid username or password.')
        if path == '/api/repos/create':
            asked = json.loads(data)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if not repo.startswith('me/'): return self.tell(403, error='You have no right to create a model there')
            url = f'http://127.0.0.1:{self.server.server_port}/{repo}'
            if self.about(repo): return self.tell(409, error='You already created this model repo', url=url)
            (self.store/repo).mkdir(parents=True)
            (self.store/f'{repo}.about.json').write_text(json.dumps({'private': asked.get('private', asked.get('visibility') == 'private')}))
            return self.tell(200, url=url, name=repo, id='1')
        if path == '/api/validate-yaml': return self.tell(200, errors=[], warnings=[])
        if path.endswith('/preupload/main'):
            files = [f['path'] for f in json.loads(data)['files']]
            return self.tell(200, files=[dict(path=f, uploadMode='lfs' if f.endswith('.safetensors') else 'regular', shouldIgnore=False) for f in files])
        if path.endswith('.git/info/lfs/objects/batch'):
            href = f'http://127.0.0.1:{self.server.server_port}/blobs/'
            objects = [o | dict(actions=dict(upload=dict(href=href + o['oid'], header={}))) for o in json.loads(data)['objects']]
            return self.tell(200, objects=objects, transfer='basic')
        if m := re.fullmatch(r'/api/models/([^/]+/[^/]+)/commit/main', path):
            for line in map(json.loads, data.splitlines()):
                value = line['value']
                if line['key'] == 'file': content = base64.b64decode(value['content'])
                elif line['key'] == 'lfsFile': content = self.blobs[value['oid']]
                else: continue
                (self.store/m[1]/value['path']).write_bytes(content)
            return self.tell(200, success=True, commitOid=COMMIT, commitUrl=f'http://127.0.0.1:{self.server.server_port}/{m[1]}/commit/{COMMIT}')
        self.tell(404, error=f'{path}: unknown')

    def do_PUT(self):
        data = self.rfile.read(int(self.headers['Content-Length']))
        assert hashlib.sha256(data).hexdigest() == self.path.rpartition('/')[2]
        self.blobs[self.path.rpartition('/')[2]] = data
        self.answer(200, b'', {}, True)

    def answer(self, status, data, headers, body):
        self.send_response(status)
        for k, v in (headers | {'Content-Length': str(len(data))}).items(): self.send_header(k, v)
        self.end_headers()
        if body: self.wfile.write(data)


@contextmanager
def toy_hub(repos, home, store=None):
    "Serve `repos`, name -> folder, keep what is sent in the folder `store`, and give (variables for a process that shall use this hub, list of the paths it asks for)"
    handler = type('Handler', (Hub,), dict(repos=repos, asked=[], store=store, blobs={}))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_OFFLINE='0', OMP_NUM_THREADS='1')
    try: yield env, handler.asked
    finally:
        server.shutdown()
        server.server_close()
