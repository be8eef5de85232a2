"Ollama's prompts are those of the training: read by our reader of Go's templates and, with --slow, by Go itself"
import itertools
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sft_nb.basics import InputError
from sft_nb.chat import ChatTemplate
from sft_nb.cli import main
from sft_nb.data import Message, Record
from sft_nb.export import _text_settings
from sft_nb.go_text import ollama_data, print_go
from sft_nb.go_writer import is_plain, ollama_template, trimmed_roles
from sft_nb.gguf_file import read_gguf
from sft_nb.model import ModelConfig
from sft_nb.ollama import check_asked, modelfile
from sft_nb.readers import default_data_file, load_records
from sft_nb.rows import encode_prompt
from sft_nb.shelf import get_template, template_names
from sft_nb.templates import TextTemplate, render_prompt
from test_export import toy_folder
from test_whole_text import CONTROL, KINDS

# Templates of the kinds that models bring along, in our own words: where they differ is what decides about Go
MODELS = {
    'default system': "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}{% for m in messages %}"
                      "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    'dates': "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
             "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{{ messages[0].content|trim if messages[0].role == 'system' }}<|eot_id|>"
             "{% for m in rest %}{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content|trim ~ '<|eot_id|>' }}{% endfor %}"
             "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}",
    'system in the question': "{{ bos_token }}{% set first = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}"
                              "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}{% for m in turns %}"
                              "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
                              "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ (first if loop.first) ~ m.content|trim ~ '<end_of_turn>\n' }}{% endfor %}"
                              "{{ '<start_of_turn>model\n' if add_generation_prompt }}",
    'system in the last question': "{{ bos_token }}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
                                   "{{ messages[0].content ~ '\n\n' if loop.last and messages[0].role == 'system' }}{{ m.content }}[/INST]"
                                   "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    'no thoughts': "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content.split('</think>')[-1].lstrip('\n') ~ '<|im_end|>\n' }}{% endfor %}"
                   "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking }}{% endif %}",
    'vicuna': "{{ bos_token }}{{ messages[0].content if messages[0].role == 'system' else 'A chat.' }}{% for m in messages if m.role != 'system' %}"
              "{{ ' USER: ' ~ m.content ~ ' ASSISTANT:' if m.role == 'user' else ' ' ~ m.content ~ eos_token }}{% endfor %}",
    'odd signs': "{% for m in messages %}{{ '{{' ~ m.role ~ '}} \"\"\"{\xa0\u200b😀 {' ~ m.content ~ '}\"<|end|>\"\"\"\n' }}{% endfor %}{{ '{' if add_generation_prompt }}",
}
SPECIAL = ('bos_token', '<s>'), ('eos_token', '</s>')
TEMPLATES = {n: get_template(n) for n in template_names()} | {n: ChatTemplate(n, source, SPECIAL) for n, source in MODELS.items()}
TEMPLATES['no thoughts, off'] = ChatTemplate('off', MODELS['no thoughts'], SPECIAL, thinking='off')
CHATS = [n for n, t in TEMPLATES.items() if not isinstance(t, TextTemplate)]
TEXTS = ['Hi', 'What is {{ .System }}?', 'say """no"""', '{', 'a\n\nb', 'é 東京 😀', "it's \\n \"q\"", '{{', '}} -}}', '<s>', 'x\u200b']


def talks(seed, n=60):
    "Conversations that end with a question, without neighbours of one role"
    chance = random.Random(seed)
    for _ in range(n):
        roles = ['user', 'assistant']*chance.choice([0, 1, 1, 2, 4]) + ['user']
        if chance.random()<.5: roles = ['system', *roles]
        yield [(role, f'{chance.choice(TEXTS)} {i}') for i, role in enumerate(roles)]


def prompt_of(template, turns): return render_prompt(Record(tuple(Message(*turn) for turn in turns), {}), template).text


def cases(name):
    "The Go template, turns and wanted text of each conversation that the template does not refuse"
    template = TEMPLATES[name]
    source = ollama_template(template, KINDS['gpt2'])
    for turns in talks(name):
        try: yield source, turns, prompt_of(template, turns)
        except InputError: continue


@pytest.mark.parametrize('name', CHATS)
def test_what_a_chat_template_prints_is_what_go_prints(name):
    found = list(cases(name))
    assert len(found)>20 and max(len(turns) for _, turns, _ in found)>7
    for source, turns, wanted in found: assert print_go(source, ollama_data(turns))==wanted, (turns, source)
    assert ('system' in {role for _, turns, _ in found for role, _ in turns}) == (name not in ('gemma', 'mistral'))


@pytest.mark.parametrize('kind', ['qwen', 'legacy', 'phi 3'])
@pytest.mark.parametrize('name', TEMPLATES)
def test_ids_are_those_of_the_training(name, kind):
    "What Ollama encodes is the prompt of the training, or a line says why not"
    template, tokenizer = TEMPLATES[name], KINDS[kind]
    source = ollama_template(template, tokenizer)
    for record in load_records(default_data_file())[:30]:
        if kind!='qwen' and name=='odd signs': continue # its pieces hold no '{'
        check_asked(source, [record], template, tokenizer)
    for turns in talks(1, 12):
        record = Record((*(Message(*turn) for turn in turns), Message('assistant', 'ok')), {})
        try: ids = encode_prompt(record, template, tokenizer)
        except InputError: continue
        got = print_go(source, ollama_data(turns))
        try: check_asked(source, [record], template, tokenizer)
        except InputError as e: assert re.search('reads as a token|other ids at an answer', str(e)), e
        else: assert tokenizer.encode_control(got)==ids


REFUSED = { # what Go cannot say -> what the line names
    'does not print each text once': "{{ messages[-1].content }}",
    'depends on more than the roles': "{% for m in messages %}{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}",
    'prints no conversation': "{{ raise_exception('no') }}"}

@pytest.mark.parametrize('why', REFUSED)
def test_what_go_cannot_say_is_refused_by_name(why):
    with pytest.raises(InputError, match=why): ollama_template(ChatTemplate('odd', REFUSED[why]), KINDS['gpt2'])


def test_records_that_go_cannot_ask_for_are_named():
    tokenizer, tool = KINDS['qwen'], {'type': 'function', 'function': {'name': 'now', 'parameters': {'type': 'object'}}}
    user = Message('user', 'Hi')
    for name, messages, tools, why in (
            ('gemma', [Message('user', ' Hi')], None, 'trim'), ('chatml', [user, user], None, 'Ollama joins'), ('hermes', [user], [tool], 'has tools'),
            ('no thoughts', [user, Message('assistant', '<think>a</think>b'), user], None, 'thoughts'), ('chatml', [Message('user', 'a<|im_end|>')], None, 'reads as a token'),
            ('hermes', [user, Message('assistant', 'b', more={'reasoning': 'a'}), user], None, 'calls or thoughts'), ('smollm2', [Message('user', '')], None, None)):
        template = TEMPLATES[name]
        record = Record((*messages, Message('assistant', 'Hello')), {}, tools=tools, where='my.json record 4')
        source = ollama_template(template, tokenizer)
        if why is None: check_asked(source, [record], template, tokenizer)
        else:
            with pytest.raises(InputError, match=f'^ollama: my.json record 4 .*{why}'): check_asked(source, [record], template, tokenizer)


def test_a_begin_token_of_the_tokenizer_stands_once():
    "Ollama's tokenizer puts it there, so that the template may not, and a template without it is refused"
    from sft_nb.tokenizer import set_start, JsonTokenizer
    from test_whole_text import piece_vocabulary
    tok = piece_vocabulary('legacy')
    set_start(tok, '<s>')
    tokenizer = JsonTokenizer(tok, 'begins', '</s>', config={'bos_token': '<s>'})
    for name in ('alpaca', 'plain', 'llama2', 'mistral', 'system in the question'):
        source = ollama_template(TEMPLATES[name], tokenizer)
        text = print_go(source, ollama_data([('user', 'Name a colour')]))
        assert not text.startswith('<s>') and check_asked(source, load_records(default_data_file())[:20], TEMPLATES[name], tokenizer)==20
    told = _text_settings(ModelConfig('llama', vocab_size=900, n_layers=1, width=32, n_heads=4, n_kv_heads=2, head_dim=8, mlp_width=64, max_length=64), tokenizer, get_template('chatml'), ())
    assert told['tokenizer.ggml.add_bos_token'] is False # its prompts are trained without
    assert check_asked(ollama_template(get_template('chatml'), tokenizer), load_records(default_data_file())[:20], get_template('chatml'), tokenizer)==20
    some = ChatTemplate('some', "{{ bos_token if messages[0].role == 'user' }}" + MODELS['no thoughts'], SPECIAL)
    with pytest.raises(InputError, match="puts '<s>' in front of every text"): ollama_template(some, tokenizer)


def read_modelfile(text):
    "Instructions and values as Ollama's parser finds them: quotes end a value at a line's end only, and what does not print is lost"
    found, lines = [], iter(text.split('\n'))
    for line in lines:
        if not line.strip() or line.startswith('#'): continue
        name, value = line.split(' ', 1)
        if name=='PARAMETER': name, value = value.split(' ', 1)
        def closed(v):
            v = v.strip(' \t')
            for quotes in ('"""', '"'):
                if v.startswith(quotes): return v[len(quotes):-len(quotes)] if len(v)>=2*len(quotes) and v.endswith(quotes) else None
            return v
        while closed(value) is None: value += '\n' + next(lines)
        found.append((name, ''.join(c for c in closed(value) if c in '\n\t' or c.isprintable())))
    return found


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_modelfile_is_read_back_as_it_was_meant(name):
    source = ollama_template(TEMPLATES[name], KINDS['qwen'])
    stops = ['<|im_end|>', 'say "no"', '</s>']
    found = read_modelfile(modelfile('my runs/Mine q8.gguf', source, stops, 512))
    assert [v for k, v in found if k=='TEMPLATE']==[source] and [v for k, v in found if k=='stop']==stops
    assert found[0]==('FROM', './Mine q8.gguf') and dict(found)['num_ctx']=='512' and dict(found)['temperature']=='0'
    assert all(map(is_plain, source))


def test_export_writes_a_modelfile_beside_the_file(tmp_path, capsys):
    folder, _ = toy_folder('llama', tmp_path)
    (tmp_path/'data.json').write_text(json.dumps([dict(instruction=f'Say {n}.', input='', output=f'It is {n}.') for n in range(4)]))
    (tmp_path/'a b').mkdir()
    words = ['export', str(folder), '--to', str(tmp_path/'a b'/'Tiny One.gguf'), '--as', 'q8_0', '--data', str(tmp_path/'data.json'), '--ollama']
    assert main(words)==0
    said = capsys.readouterr().out.splitlines()
    assert said[-2:]==[f"ollama    ollama create tiny-one -f '{tmp_path}/a b/Modelfile'", 'ollama    ollama run tiny-one']
    found = dict(read_modelfile((tmp_path/'a b'/'Modelfile').read_text()))
    assert found['FROM']=='./Tiny One.gguf' and found['stop']=='<e>'
    tokenizer = read_gguf(tmp_path/'a b'/'Tiny One.gguf').tokenizer
    record = load_records(tmp_path/'data.json')[1]
    text = print_go(found['TEMPLATE'], ollama_data([('user', record.instruction)]))
    assert tokenizer.encode_control(text)==encode_prompt(record, 'alpaca', tokenizer)
    before = sorted((tmp_path/'a b').iterdir())
    assert main([*words[:3], str(tmp_path/'a b'/'other.gguf'), *words[4:]])==2 and 'Modelfile: exists' in capsys.readouterr().err
    (tmp_path/'tools.json').write_text(json.dumps([{'messages': [dict(role=r, content='x') for r in ('user', 'user', 'assistant')]}]))
    (tmp_path/'c').mkdir()
    refused = main(['export', str(folder), '--to', str(tmp_path/'c'/'c.gguf'), '--data', str(tmp_path/'tools.json'), '--ollama', '--template', 'zephyr'])
    error = capsys.readouterr().err
    assert refused==2 and error.count('\n')==1 and 'Ollama joins' in error and not list((tmp_path/'c').iterdir())
    assert sorted((tmp_path/'a b').iterdir())==before


GO = r'''
package main

import ("bytes"; "encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template string; Turns [][2]string }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	said := make([]string, len(cases))
	for i, c := range cases {
		var system []string
		var messages []*Message
		for _, t := range c.Turns {
			if t[0] == "system" { system = append(system, t[1]) }
			n := len(messages)
			if n > 0 && messages[n-1].Role == t[0] { messages[n-1].Content += "\n\n" + t[1]
			} else { messages = append(messages, &Message{t[0], t[1]}) }
		}
		var b bytes.Buffer
		made, err := template.New("").Option("missingkey=zero").Parse(c.Template)
		if err == nil {
			err = made.Execute(&b, map[string]any{"System": strings.Join(system, "\n\n"), "Messages": messages, "Response": ""})
		}
		if err != nil { said[i] = "ERROR " + err.Error() } else { said[i] = b.String() }
	}
	json.NewEncoder(os.Stdout).Encode(said)
}
'''

BY_HAND = ['{{- range .Messages }}<|{{ .Role }}|> {{ .Content }}{{ end -}}  \n x', '{{/* no */}}{{ with .System }}[{{ . }}]{{ else }}none{{ end }}',
           '{{ range $i, $_ := .Messages }}{{ if and (le (len (slice $.Messages $i)) 2) $.System }}{{ $i }}{{ else if eq .Role "user" "assistant" }}u{{ end }}{{ end }}',
           '{{ $x := "a" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ $x = .Content }}{{ end }}{{ end }}{{ $x | len }} {{ not $x }} {{ or "" $x }} {{ ne $x "b" }}',
           '{{ (index .Messages 0).Role }} {{ len "é" }} {{ slice "héllo" 1 3 }} {{ "\\u00e9\\x41\\n" }}`{{ `raw\\n` }}', '{{ index .Messages 99 }}', '{{ slice "why" 999 }}',
           '{{ if .Nothing }}a{{ end }}{{ eq 1 2 }}{{ lt 1 2 }}{{ gt 1 2 }}{{ ge 2 2 }}{{ true }}{{ 7 }}']

@pytest.mark.slow
def test_go_itself_says_the_same(tmp_path):
    "The templates of all tests and some by hand, printed by Go's own text/template"
    if not shutil.which('go'): pytest.skip('go is not installed: apt-get install golang-go')
    (tmp_path/'main.go').write_text(GO)
    ours = [(source, turns, wanted) for name in CHATS for source, turns, wanted in cases(name)]
    for name in ('alpaca', 'scratchpad', 'plain', 'verbatim'):
        source = ollama_template(TEMPLATES[name], KINDS['gpt2'])
        ours += [(source, turns, None) for turns in ([('user', TEXTS[1])], [('system', TEXTS[2]), ('user', TEXTS[3])])]
    ours += [(source, turns, None) for source in BY_HAND for turns in itertools.islice(talks(3), 6)]
    mistral = ollama_template(get_template('mistral'), KINDS['gpt2'])
    ours.append((mistral, [('system', 'x'), ('user', 'y')], None))
    asked = json.dumps([{'Template': source, 'Turns': turns} for source, turns, _ in ours])
    done = subprocess.run(['go', 'run', 'main.go'], cwd=tmp_path, input=asked, capture_output=True, text=True, check=True, timeout=300)
    for (source, turns, wanted), theirs in zip(ours, json.loads(done.stdout), strict=True):
        if wanted is not None: assert theirs==wanted, (source, turns)
        try: said = print_go(source, ollama_data(turns))
        except InputError as e: assert theirs.startswith('ERROR') and str(e), (source, theirs)
        else: assert theirs==said, (source, turns)
