"`sft_nb serve` as its clients meet it: openai's Python client, many at once, clients that go away, a full queue, a taken port."
import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import torch
from test_cli import complaint, home, sft_nb # noqa: F401

from sft_nb.batching import Engine
from sft_nb.choices import JobConfig, Sampling, Stops
from sft_nb.cli import main
from sft_nb.data import as_records
from sft_nb.decoder import Decoder
from sft_nb.families import config_from_hf
from sft_nb.generation import answer_records, generate
from sft_nb.rows import encode_prompt
from sft_nb.seats import Budget
from sft_nb.serve import bind_port, make_house, serving

ROOT = Path(__file__).resolve().parent.parent
ASKED = [f'Add {i} and {i+7}, then name tree number {i%9}.' for i in range(40)]
SIZES = {'n_embd': 32, 'n_layer': 2, 'n_head': 2, 'n_positions': 160}
TOOLS = [{'type': 'function', 'function': {'name': 'now', 'parameters': {'type': 'object', 'properties': {}}}}]


def turns(text): return [{'role': 'user', 'content': text}]


def until(holds, secs=120):
    "Wait until something holds; the bound is against hanging only"
    end = time.monotonic() + secs
    while not holds():
        assert time.monotonic()<end
        time.sleep(.005)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A model of chats with random weights"
    from sft_nb.saving import save_model
    from sft_nb.shelf import get_template
    from sft_nb.tokenizer import gpt2_as_json
    path = tmp_path_factory.mktemp('served')/'chatty'
    gpt2 = gpt2_as_json(['<|im_start|>', '<|im_end|>'])
    torch.manual_seed(5)
    model = Decoder(config_from_hf({'model_type': 'gpt2', 'vocab_size': gpt2.n_vocab} | SIZES))
    for p in model.parameters():
        if p.dim()==2: torch.nn.init.normal_(p, std=.2)
    return save_model(path, model, gpt2, get_template('chatml'))


@pytest.fixture(scope='module')
def house(folder): return make_house(JobConfig(model=folder), say=lambda line: None)


@contextmanager
def served(house, *, seats=8, queue=64, **more):
    "The engine, and an address that serves it"
    who, model = house
    with Engine(model, who.tokenizer, n_queue=queue, within=Budget(seats)) as engine:
        with serving(who, engine, bind_port('127.0.0.1', 0)) as url: yield engine, url


@pytest.fixture(scope='module')
def shared(house):
    with served(house, queue=400) as (_, url): yield url


@pytest.fixture(scope='module')
def client(shared):
    with openai.OpenAI(base_url=shared, api_key='none', max_retries=0, timeout=300) as client: yield client


@pytest.fixture(scope='module')
def responded(house):
    "What `respond` answers"
    who, model = house
    records = as_records([{'messages': turns(text)} for text in ASKED], need_answer=False)
    return [a.text for a in answer_records(model, who.tokenizer, who.template, records, until=Stops(16))]


def test_greedy_answers_are_those_of_respond_command(folder, house, shared, responded, tmp_path):
    "Through the command and a file, and through openai's client"
    (tmp_path/'asked.json').write_text(json.dumps([{'messages': turns(text)} for text in ASKED[:9]]))
    done = sft_nb('respond', '--model', folder, '--data', 'asked.json', '--out', 'said.json', '--max-new', '16', cwd=tmp_path)
    assert done.returncode==0, done.stderr
    rows = json.loads((tmp_path/'said.json').read_text())
    assert [r['model_response'] for r in rows]==responded[:9]
    assert len(set(responded))>30 # a model that says the same to all would prove nothing


def test_chat_whole_and_streamed(client, house, responded):
    model = house[0].name
    assert [m.id for m in client.models.list()]==[model]==[client.models.retrieve(model).id]
    for text, want in list(zip(ASKED, responded))[:6]:
        said = client.chat.completions.create(model=model, messages=turns(text), max_tokens=16)
        assert said.choices[0].message.content==want and said.choices[0].finish_reason in ('stop', 'length')
        assert said.usage.prompt_tokens==len(encode_prompt(as_records([{'messages': turns(text)}], need_answer=False)[0], house[0].template, house[0].tokenizer))
        assert said.usage.total_tokens==said.usage.prompt_tokens + said.usage.completion_tokens
        pieces = list(client.chat.completions.create(model=model, messages=turns(text), max_tokens=16, stream=True, stream_options={'include_usage': True}))
        assert ''.join(p.choices[0].delta.content or '' for p in pieces if p.choices)==want
        assert [p.choices[0].finish_reason for p in pieces if p.choices][-1]==said.choices[0].finish_reason
        assert pieces[-1].usage==said.usage and len({p.id for p in pieces})==1


def test_stop_strings_end_an_answer_before_them(client, house, responded):
    for text, want in list(zip(ASKED, responded))[:5]:
        stop = want[len(want)//2:][:4]
        for stream in (False, True):
            said = client.chat.completions.create(model=house[0].name, messages=turns(text), max_tokens=16, stop=[stop, 'never seen'], stream=stream)
            got = said.choices[0].message.content if not stream else ''.join(p.choices[0].delta.content or '' for p in said)
            assert got==want[:want.index(stop)]


def test_draws_follow_seed_and_neighbours_change_nothing(client, house):
    who, model = house
    prompt = who.tokenizer.encode('Once upon a time')
    wish = dict(model=who.name, prompt='Once upon a time', max_tokens=12, temperature=.9, top_p=.95, seed=7, n=3)
    want = generate(model, who.tokenizer, [prompt]*3, Sampling(.9, top_p=.95), Stops(12, ids=who.until.ids), generator=torch.Generator().manual_seed(7))
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(client.completions.create, model=who.name, prompt=text, max_tokens=20, temperature=1.5) for text in ASKED]
        mine = [pool.submit(client.completions.create, **wish) for _ in range(4)]
        for one in mine: assert [c.text for c in one.result().choices]==[a.text for a in want]
        for one in others: assert one.result().usage.completion_tokens
    assert client.completions.create(**wish | {'seed': 8}).choices[0].text!=want[0].text
    penal = client.completions.create(model=who.name, prompt='Once upon a time', max_tokens=12, extra_body={'repetition_penalty': 1.4})
    [alone] = generate(model, who.tokenizer, [prompt], Sampling(repetition_penalty=1.4), Stops(12, ids=who.until.ids))
    assert penal.choices[0].text==alone.text


@torch.no_grad()
def scores_of(house, ids):
    "Log-probabilities after each id, by a forward pass that knows no cache"
    from sft_nb.batches import collate_prompts
    who, model = house
    return torch.stack([model.head(model.hidden(collate_prompts([ids[:t+1]]), None))[-1].float().log_softmax(-1) for t in range(len(ids))])


def test_probabilities_are_those_of_a_forward_pass(client, house):
    who, _ = house
    said = client.chat.completions.create(model=who.name, messages=turns(ASKED[0]), max_tokens=6, logprobs=True, top_logprobs=3)
    record = as_records([{'messages': turns(ASKED[0])}], need_answer=False)[0]
    prompt = encode_prompt(record, who.template, who.tokenizer)
    got = said.choices[0].logprobs.content
    ids = who.tokenizer.encode(said.choices[0].message.content)
    if len(ids)==len(got): # the text splits into the ids it was made of
        logs = scores_of(house, prompt + ids)[len(prompt)-1:-1]
        for token, i, row in zip(got, ids, logs):
            assert abs(token.logprob - float(row[i]))<1e-4
            best = row.topk(3)
            assert [t.logprob for t in token.top_logprobs]==pytest.approx(best.values.tolist(), abs=1e-4)
            assert [t.token for t in token.top_logprobs]==[who.tokenizer.decode([j]) for j in best.indices.tolist()]
    assert len(got)>=5


def test_echo_gives_what_a_harness_asks_for(client, house):
    "lm-eval sends ids with echo, logprobs=1 and max_tokens=1, and leaves out the last token"
    who, _ = house
    ids = who.tokenizer.encode('The oak is a tree, and so is the elm that stands beside it. '*4)
    assert len(ids)>64 # more than are read aloud at a time
    several = [ids, ids[:9], ids[3:50]]
    said = client.completions.create(model=who.name, prompt=several, max_tokens=1, echo=True, logprobs=1, temperature=0)
    for row, choice in zip(several, said.choices):
        logs = scores_of(house, row)
        lp = choice.logprobs
        assert len(lp.tokens)==len(row) + 1 and lp.token_logprobs[0] is None and lp.top_logprobs[0] is None
        assert lp.token_logprobs[1:-1]==pytest.approx(logs[:-1].gather(1, torch.tensor(row[1:])[:,None])[:,0].tolist(), abs=1e-4)
        greedy = [p==max(top.values()) for p, top in zip(lp.token_logprobs[1:], lp.top_logprobs[1:])]
        assert greedy[:-1]==[i==j for i, j in zip(row[1:], logs.argmax(-1).tolist())] and greedy[-1]
        assert choice.text==''.join(lp.tokens) and lp.text_offset[1]==len(lp.tokens[0])
    only = client.completions.create(model=who.name, prompt=ids, max_tokens=0, echo=True, logprobs=0)
    assert only.choices[0].logprobs.token_logprobs==pytest.approx(said.choices[0].logprobs.token_logprobs[:-1], abs=1e-4)
    assert only.usage.completion_tokens==0


def test_200_clients_at_once_lose_nothing(shared, house, responded):
    "Each in a connection of its own, half of them streams"
    async def one(http, i):
        body = {'model': house[0].name, 'messages': turns(ASKED[i%40]), 'max_tokens': 16, 'stream': i%2==0}
        reply = await http.post(f'{shared}/chat/completions', json=body)
        assert reply.status_code==200, reply.text
        if i%2: return reply.json()['choices'][0]['message']['content']
        lines = [line[6:] for line in reply.text.split('\n\n') if line]
        assert lines[-1]=='[DONE]'
        return ''.join(json.loads(line)['choices'][0]['delta'].get('content', '') for line in lines[:-1])

    async def all_of_them():
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=300, limits=limits) as http: return await asyncio.gather(*[one(http, i) for i in range(200)])

    assert asyncio.run(all_of_them())==[responded[i%40] for i in range(200)]


def test_a_full_queue_says_so_and_loses_nothing(house, responded):
    "100 clients for 2 seats and 8 places: each gets its answer or 429, and who asks again gets it in the end"
    async def once(http, url, i):
        body = {'messages': turns(ASKED[i%40]), 'max_tokens': 16}
        reply = await http.post(f'{url}/chat/completions', json=body)
        if reply.status_code==429: assert reply.headers['retry-after'] and reply.json()['error']['type']=='rate_limit_error'
        else: assert reply.status_code==200 and reply.json()['choices'][0]['message']['content']==responded[i%40]
        return reply.status_code

    async def storm(url):
        async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=100)) as http:
            first = await asyncio.gather(*[once(http, url, i) for i in range(100)])
            again = [i for i, status in enumerate(first) if status==429]
            while again:
                statuses = await asyncio.gather(*[once(http, url, i) for i in again[:9]])
                again = [i for i, status in zip(again, statuses) if status==429] + again[9:]
        return first

    with served(house, seats=2, queue=8) as (engine, url):
        first = asyncio.run(storm(url))
        assert set(first)=={200, 429} and first.count(200)>=10
        until(lambda: engine.n_open==0)
        assert all(p.seats is None and not p.waiting for p in engine.pools)


@pytest.mark.parametrize('stream', [False, True])
def test_a_client_that_goes_away_frees_its_seat(house, responded, stream):
    "Four sit on the only seat and in the queue, all go away without a word, and the next is answered"
    with served(house, seats=1, queue=3) as (engine, url):
        port = int(re.search(r':(\d+)/', url)[1])
        for _ in range(3):
            body = json.dumps({'prompt': 'a', 'max_tokens': 150, 'temperature': 1, 'stream': stream, 'stop': ['never seen']}).encode()
            head = f'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n'.encode()
            gone = []
            for _ in range(4):
                gone.append(socket.create_connection(('127.0.0.1', port)))
                gone[-1].sendall(head + body)
            for s in gone: s.close()
            until(lambda: engine.n_open==0)
        said = httpx.post(f'{url}/chat/completions', json={'messages': turns(ASKED[0]), 'max_tokens': 16}, timeout=300).json()
        assert said['choices'][0]['message']['content']==responded[0]


def test_orders_of_clients_that_go_away_are_given_up(house):
    "Without that, an answer of 150 tokens would be written to its end"
    class Slow:
        "A tokenizer that stops the engine after the third id until it is let go on"
        def __init__(self, own):
            self.own, self.third, self.go_on, self.most = own, threading.Event(), threading.Event(), 0
        def __getattr__(self, name): return getattr(self.own, name)
        def decode_content(self, ids):
            self.most = max(self.most, len(ids))
            if len(ids)==3:
                self.third.set()
                assert self.go_on.wait(120)
            return self.own.decode_content(ids)
    from dataclasses import replace
    who, model = house
    slow = Slow(who.tokenizer)
    who = replace(who, tokenizer=slow)
    with Engine(model, slow, within=Budget(2)) as engine, serving(who, engine, bind_port('127.0.0.1', 0)) as url:
        with httpx.Client(timeout=300) as http:
            with http.stream('POST', f'{url}/completions', json={'prompt': 'a', 'max_tokens': 150, 'stream': True, 'temperature': 1, 'stop': 'never'}) as reply:
                lines = reply.iter_lines()
                next(lines)
                assert slow.third.wait(120)
        [draft] = engine.pools[0].seats.drafts
        until(lambda: draft.order.gone)
        slow.go_on.set()
        until(lambda: engine.n_open==0)
        assert slow.most==3 and not draft.finish


def test_the_end_of_a_server_is_told(house):
    "Who waits when the server ends gets an error, and the server does end"
    with ThreadPoolExecutor(4) as pool:
        with served(house, seats=1, queue=8) as (engine, url):
            wish = {'prompt': 'a', 'max_tokens': 155, 'temperature': 1, 'stop': ['never seen']}
            asked = [pool.submit(httpx.post, f'{url}/completions', json=wish | {'stream': i%2==0}, timeout=300) for i in range(4)]
            until(lambda: engine.n_open==4 or any(a.done() for a in asked))
        replies = [a.result() for a in asked]
    for reply in replies: assert reply.status_code in (200, 500, 429), reply.text
    assert any('the server is closing' in reply.text for reply in replies)


def test_errors_are_openais(client, house):
    name = house[0].name
    for wish, kind, key in ((dict(model='gpt-4'), openai.NotFoundError, 'model'), (dict(temperature=-1), openai.BadRequestError, 'temperature'),
                            (dict(logit_bias={'5': 1}), openai.BadRequestError, 'logit_bias'), (dict(extra_body={'best': 1}), openai.BadRequestError, 'best'),
                            (dict(response_format={'type': 'json_object'}), openai.BadRequestError, 'response_format'), (dict(n=0), openai.BadRequestError, 'n'),
                            (dict(messages=[*turns('Hi'), {'role': 'assistant', 'content': 'Hm'}]), openai.BadRequestError, 'messages'),
                            (dict(messages=turns('Hi '*500)), openai.BadRequestError, None), (dict(tools=TOOLS), openai.BadRequestError, 'tools')):
        with pytest.raises(kind) as e: client.chat.completions.create(**dict(model=name, messages=turns('Hi'), max_tokens=2) | wish)
        assert e.value.body['param']==key and e.value.body['message'], wish
    said = client.chat.completions.create(model=name, messages=turns('Hi'), max_completion_tokens=2, user='me', n=1, frequency_penalty=0, metadata={'a': 'b'})
    assert said.usage.completion_tokens<=2


@pytest.mark.parametrize('body', [b'', b'[', b'{"messages": 3}', b'[]', b'{"n": NaN}', b'['*9000, b'\xff\xfe', b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
                                  b'{"prompt": [[1e99]]}', b'{"prompt": [99999999]}', b'{"prompt": [-1]}', b'{"prompt": "a", "seed": 1e400}', b'{"prompt": "a", "max_tokens": 99999999999999999999999}'])
def test_bodies_of_nonsense_are_refused_or_answered(shared, body):
    for path in ('completions', 'chat/completions'):
        reply = httpx.post(f'{shared}/{path}', content=body, timeout=120)
        assert reply.status_code in (200, 400) and (reply.status_code==200 or reply.json()['error']['message'])
    assert httpx.get(f'{shared}/models', timeout=120).status_code==200


def test_a_body_without_end_is_cut_off(shared):
    def forever():
        for _ in range(40): yield b' '*2**17
    reply = httpx.post(f'{shared}/completions', content=forever(), timeout=120)
    assert reply.status_code==413 and 'is longer than' in reply.json()['error']['message']


def test_our_own_judge_asks_it(folder, house, shared, tmp_path):
    "A random model is no judge; that the exam says so, and not that the server failed, is the point"
    rows = [{'instruction': f'Name tree {i}.', 'output': 'An oak.', 'model_response': f'Tree {i}.'} for i in range(4)]
    (tmp_path/'answers.json').write_text(json.dumps(rows))
    done = sft_nb('judge', 'answers.json', '--judge-url', shared, '--judge-exam', '2', cwd=tmp_path)
    assert done.returncode in (0, 2) and 'Traceback' not in done.stderr
    assert 'no answer (' not in done.stderr + done.stdout and '500' not in done.stderr, done.stderr


@contextmanager
def command(folder, cwd, *words):
    "The running command, and the address that it tells"
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    run = subprocess.Popen([sys.executable, '-m', 'sft_nb.cli', 'serve', str(folder), '--port', '0', '--json', *words], cwd=cwd, env=env,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        told = {}
        for line in run.stdout:
            told = json.loads(line)
            if told['stage']=='serve': break
        yield run, told
    finally:
        run.kill()
        run.communicate()


@pytest.mark.skipif(sys.platform=='win32', reason='signals of POSIX')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_end(folder, house, responded, tmp_path, number):
    words = ['--max-new', '16', '--queue', '3', '--context', '99'] if number==signal.SIGINT else ['--max-new', '5', '--stop', 'zz', '--temperature', '1']
    with command(folder, tmp_path, *words) as (run, told):
        assert told['model']==str(folder)
        said = httpx.post(f"{told['url']}/chat/completions", json={'messages': turns(ASKED[3])}, timeout=300).json()
        if number==signal.SIGINT:
            assert said['choices'][0]['message']['content']==responded[3]
            assert '3 more wait, 99 tokens each' in told['text']
            long = httpx.post(f"{told['url']}/completions", json={'prompt': 'word '*99}, timeout=300)
            assert long.status_code==400 and 'have 99 together' in long.json()['error']['message']
        else: assert said['usage']['completion_tokens']<=5 and '64 more wait, 160 tokens each' in told['text']
        run.send_signal(number)
        out, err = run.communicate(timeout=120)
        assert run.returncode==0 and err=='' and json.loads(out.splitlines()[-1])['text']=='ended', err


def test_what_cannot_be_served_is_one_line(home, monkeypatch, capsys): # noqa: F811
    monkeypatch.chdir(home)
    with bind_port('127.0.0.1', 0) as taken:
        port = taken.getsockname()[1]
        line = complaint(sft_nb('serve', 'no/model/is/read', '--port', port, cwd=home))
        assert 'already in use' in line and str(port) in line and '--port' in line
    for words, said in ((['a', '--model', 'b'], "two models, got 'a' and --model 'b'"), (['tinny', '--port', '0'], 'did you mean'),
                        (['tiny', '--port', '70000'], 'port must be at most 65535'), (['tiny', '--queue', '-1'], 'queue must be at least 0'),
                        (['tiny', '--context', '1'], 'context must be at least 2'), (['tiny', '--host', '203.0.113.5'], 'cannot listen on 203.0.113.5')):
        assert main(['serve', *words])==2
        told = capsys.readouterr()
        assert said in told.err and told.err.count('\n')==1, told


def test_the_extra_is_named_where_it_is_missing(home): # noqa: F811
    code = "import sys; sys.modules['starlette'] = None; sys.modules['uvicorn'] = None; from sft_nb.cli import main; sys.exit(main(['serve', 'tiny']))"
    done = subprocess.run([sys.executable, '-c', code], cwd=home, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=300)
    assert "pip install 'sft_nb[serve]'" in complaint(done)
    help_code = code.replace("main(['serve', 'tiny'])", "main(['serve', '--help'])")
    done = subprocess.run([sys.executable, '-c', help_code], cwd=home, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=300)
    assert done.returncode==0 and '--queue' in done.stdout
