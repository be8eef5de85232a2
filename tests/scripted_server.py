"""A chat server on loopback that misbehaves by script: OpenAI's dialect, and an emulation of Ollama's.

As a program it serves until it is killed: python tests/scripted_server.py PORT SCRIPT [SEED], where SCRIPT is a name in SCRIPTS."""
import json
import random
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWER = re.compile(r'\n\[answer (\w+)\]\n(.*?)\n\[end of answer \1\]', re.S)
REFERENCE = re.compile(r'\n\[reference (\w+)\]\n(.*?)\n\[end of reference \1\]', re.S)


def fair_level(prompt):
    "5 where the answer is the reference, 1 where it shares no word, 3 otherwise; 4 to anything that is no judge's prompt"
    answer, reference = ANSWER.search(prompt), REFERENCE.search(prompt)
    if not answer or not reference: return '4'
    if answer[2].strip() == reference[2].strip(): return '5'
    return '3' if set(answer[2].lower().split()) & set(reference[2].lower().split()) else '1'


SCRIPTS = {  # what may happen to a request, and how often
    'good': {'good': 1},
    'storm': {'good': 5, '429': 2, '500': 2, '503': 1, 'garbage': 1, 'cut': 1, 'reset': 1, 'no object': 1, 'no choices': 1},
    'chatty': {'good': 4, 'fenced': 2, 'prose': 2, 'thinking': 2},
    'unreadable': {'good': 5, 'empty': 1, 'two numbers': 1, 'out of range': 1, 'refusal': 1, 'at the limit': 1},
    'down': {'500': 1},
    'slow': {'late': 1},
}


class Scripted(ThreadingHTTPServer):
    "A server whose behaviour is drawn from a script; `seen` counts the prompts it answered with a verdict"
    daemon_threads = True

    def __init__(self, script='good', port=0, seed=0, level=fair_level, ollama=None):
        super().__init__(('127.0.0.1', port), Handler)
        self.script, self.level, self.ollama = SCRIPTS[script], level, ollama
        self.rng, self.lock, self.seen, self.asked, self.bodies = random.Random(seed), threading.Lock(), {}, 0, []

    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}/v1'

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address): pass  # broken pipes are the point


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def send(self, status, body, headers=(), length=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in headers: self.send_header(k, v)
        self.send_header('Content-Length', str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path.endswith('/api/tags') and self.server.ollama: return self.send(200, {'models': [{'name': 'llama3:latest'}]})
        if self.path.endswith('/models') and not self.server.ollama: return self.send(200, {'data': [{'id': 'scripted'}]})
        self.send(404, {'error': 'not found'})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        if self.path.endswith('/api/chat') and self.server.ollama: return self.ollama(body)
        if not self.path.endswith('/chat/completions') or self.server.ollama: return self.send(404, {'error': 'not found'})
        prompt = body['messages'][-1]['content']
        with self.server.lock:
            self.server.asked += 1
            self.server.bodies.append(body)
            preflight = not ANSWER.search(prompt)
            act = 'good' if preflight else self.server.rng.choices(*zip(*self.server.script.items()))[0]
        self.act(act, prompt)

    def act(self, act, prompt):
        if act.isdigit(): return self.send(int(act), {'error': {'message': 'not now'}}, [('Retry-After', '0')])
        if act == 'garbage': return self.send(200, b'<html>gateway</html>')
        if act == 'no object': return self.send(200, [1, 2])
        if act == 'no choices': return self.send(200, {'choices': []})
        if act == 'reset': return self.connection.close()
        if act == 'late': time.sleep(5)
        level = self.server.level(prompt)
        said = {'empty': '', 'fenced': f'```json\n{{"level": {level}}}\n```', 'prose': f'It compares well. **Level: {level}**/5',
                'thinking': f'<think>perhaps 2, or 1</think>\n{level}', 'two numbers': 'between 2 and 3', 'out of range': '9',
                'refusal': '', 'at the limit': 'The answer seems to be on level 2 but'}.get(act, level)
        message = {'role': 'assistant', 'content': said} | ({'refusal': 'I will not'} if act == 'refusal' else {})
        whole = json.dumps({'choices': [{'message': message, 'finish_reason': 'length' if act == 'at the limit' else 'stop'}],
                            'usage': {'prompt_tokens': len(prompt)//4+20, 'completion_tokens': 1}}).encode()
        if act == 'cut':
            self.send(200, whole[:len(whole)//2], length=len(whole))
            return self.connection.close()
        with self.server.lock: self.server.seen[prompt] = self.server.seen.get(prompt, 0)+1
        self.send(200, whole)

    def ollama(self, body):
        "An emulation of Ollama's own dialect: model names with tags, a window that cuts silently, logprobs, format"
        if body['model'] not in ('llama3', 'llama3:latest'): return self.send(404, {'error': f"model '{body['model']}' not found"})
        prompt, options = body['messages'][-1]['content'], body.get('options', {})
        with self.server.lock: self.server.bodies.append(body)
        level, n = self.server.level(prompt), len(prompt)//4+20
        reply = {'model': body['model'], 'message': {'role': 'assistant', 'content': level}, 'done': True, 'done_reason': 'stop',
                 'prompt_eval_count': min(n, options.get('num_ctx', 2048)), 'eval_count': 1}
        if body.get('format') and 'json' in self.server.ollama: reply['message']['content'] = json.dumps({'level': int(level)})
        if body.get('logprobs') and 'logprobs' in self.server.ollama:
            reply['logprobs'] = [{'token': level, 'logprob': -0.1, 'top_logprobs': [{'token': level, 'logprob': -0.1}, {'token': '2', 'logprob': -3.}]}]
        self.send(200, reply)


if __name__ == '__main__':
    Scripted(sys.argv[2], int(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else 0).serve_forever()
