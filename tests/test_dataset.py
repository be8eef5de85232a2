"01b_tokenizer, 01c_rows and 02_dataset: what the cells cannot hold: arbitrary text, other libraries as judges, processes, scale."
import json, multiprocessing, os, resource, subprocess, sys, textwrap, time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings, strategies as st

import sft_nb.encoding as ds
from sft_nb.basics import InputError
from sft_nb.data import Message, Record, as_records
from sft_nb.readers import default_data_file, load_records
import sft_nb.rows as rows
from sft_nb.gpt2 import GPT2_FILES
from sft_nb.templates import render_prompt, render_record
from sft_nb.shelf import get_template, save_template, template_names
from sft_nb.tokenizer import (
    JsonTokenizer, as_tokenizer, bpe_tokenizer, get_gpt2_tokenizer, gpt2_as_json, set_start,
    tokenizer_from_file)
from sft_nb.rows import LEARNED, STOP, encode_prompt, encode_record, encode_rows, fit_row, missing_tokens
from sft_nb.encoding import EncodePlan, encode_all
from sft_nb.dataset import InstructionDataset
from sft_nb.audit import wrong_rows

ROOT = Path(__file__).parent.parent
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


# ---------------------------------------------------------------- tokenizers to test with

def byte_level():
    "GPT-2's vocabulary with control tokens of both kinds, and one run of spaces as a plain addition"
    tok = bpe_tokenizer(GPT2_FILES/'encoder.json', GPT2_FILES/'vocab.bpe')
    tok.add_special_tokens(['<|im_start|>', '<|im_end|>', '<|user|>'])
    tok.add_tokens(['<think>', tokenizers.AddedToken('</tool>', normalized=True, rstrip=True), '        '])
    return JsonTokenizer(tok, 'byte-level', '<|im_end|>')


def sentencepiece(kind, corpus):
    "A small tokenizer of the kind of Llama 2 (BPE) or T5 (Unigram)"
    special = ['<unk>', '<s>', '</s>', '<|user|>']
    if kind=='bpe':
        tok = tokenizers.SentencePieceBPETokenizer()
        tok.train_from_iterator(corpus, vocab_size=600, special_tokens=special, show_progress=False)
    else:
        tok = tokenizers.SentencePieceUnigramTokenizer()
        tok.train_from_iterator(corpus, vocab_size=400, special_tokens=special, unk_token='<unk>', show_progress=False)
    return JsonTokenizer(tok._tokenizer, kind, '</s>')


RECORDS = load_records(default_data_file())
CORPUS = [r.output for r in RECORDS[:300]] + ['</s> <s> <|user|>']*20
TIK = get_gpt2_tokenizer()
CHAT = TIK.with_control_tokens(['<|im_start|>', '<|im_end|>', '<|user|>', '<think>', '</tool>'])
TOKENIZERS = [CHAT, byte_level(), sentencepiece('bpe', CORPUS), sentencepiece('unigram', CORPUS)]
CONTROL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<think>', '</tool>', '</s>', '<s>', '<|user|>', '<unk>']
texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(CONTROL), st.sampled_from([' ', '\n', '        ', '<', '|>'])),
                 max_size=8).map(''.join)


def chat_records(n, seed=0):
    "Conversations of one to four exchanges, made of the record set's words"
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        picked = rng.integers(0, len(RECORDS), rng.integers(1, 5))
        turns = [dict(role='system', content='Be brief.')] if rng.random()<.3 else []
        for i in picked: turns += [dict(role='user', content=RECORDS[i].instruction), dict(role='assistant', content=RECORDS[i].output)]
        rows.append({'messages': turns})
    return as_records(rows)


def ready(template, tokenizer=TIK): return tokenizer.with_control_tokens(missing_tokens(template, tokenizer))


# ---------------------------------------------------------------- the vocabulary

def test_gpt2_needs_no_network_and_no_cache(tmp_path):
    code = """
        import requests, tiktoken
        def forbidden(*a, **k): raise RuntimeError('network')
        requests.get = forbidden
        import tiktoken_ext.openai_public as public
        import sft_nb.tokenizer
        print(tiktoken.get_encoding('gpt2').encode('Every effort'))
        assert tiktoken.registry.ENCODING_CONSTRUCTORS['cl100k_base'] is public.cl100k_base
        import sys; assert 'torch' not in sys.modules
    """
    env = os.environ | {'TIKTOKEN_CACHE_DIR': str(tmp_path), 'PYTHONPATH': str(ROOT)}
    out = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode==0, out.stderr
    assert out.stdout.strip()=='[6109, 3626]' and not list(tmp_path.iterdir())


def test_gpt2_equals_the_original_construction():
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    ranks = data_gym_to_mergeable_bpe_ranks(str(GPT2_FILES/'vocab.bpe'), str(GPT2_FILES/'encoder.json'))
    assert ranks==get_gpt2_tokenizer().enc._mergeable_ranks


@quick
@given(texts)
def test_gpt2_equals_transformers(text):
    judge = transformers_gpt2()
    assert TIK.encode(text)==judge.encode(text, split_special_tokens=True, add_special_tokens=False)


_judges = {}
def transformers_gpt2():
    if 'gpt2' not in _judges:
        from transformers import GPT2TokenizerFast
        _judges['gpt2'] = GPT2TokenizerFast(vocab=str(GPT2_FILES/'encoder.json'), merges=str(GPT2_FILES/'vocab.bpe'))
    return _judges['gpt2']


# ---------------------------------------------------------------- content stays content

@quick
@given(texts)
@pytest.mark.parametrize('tok', TOKENIZERS, ids=lambda t: t.name)
def test_content_never_becomes_control(tok, text):
    ids = tok.encode(text)
    forbidden = tok.control_ids - ({tok.token_id('<unk>')} if tok.name in ('bpe', 'unigram') else set())
    assert forbidden.isdisjoint(ids) and forbidden.isdisjoint(tok.inside.encode(text))
    if tok.name in ('gpt2', 'byte-level'): assert tok.decode(ids)==text
    if tok.name=='byte-level' and ' '*8 not in text: assert ids==TIK.encode(text) # not torn where control tokens would be


@quick
@given(st.lists(st.characters(), max_size=30).map(''.join) | st.text(st.characters(categories=['Cs', 'Lu']), max_size=9))
def test_every_python_string_is_accepted(text):
    for tok in TOKENIZERS[:2]: assert tok.decode(tok.encode(text))==text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


def test_a_vocabulary_that_merges_into_control_tokens_is_tamed():
    "A model whose ordinary merges spell a control token, as with Unigram pieces or merges that build '</s>'"
    merges = [('<', '/'), ('</', 's'), ('</s', '>')]
    vocab = {t: i for i,t in enumerate(['<', '/', 's', '>', '</', '</s', '</s>', 'x'])}
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tok.add_special_tokens(['</s>'])
    wrapped = JsonTokenizer(tok, 'spelled')
    assert wrapped.content.encode('x</s>x').ids==[7, 6, 7] # the trap is real
    assert 6 not in wrapped.encode('x</s></s>x') and wrapped.encode_control('x</s>')==[7, 6]


def test_content_tokens_are_a_choice(tmp_path):
    byte_level().save(tmp_path)
    strict, lax = tokenizer_from_file(tmp_path), tokenizer_from_file(tmp_path, content_tokens=('<think>',))
    assert len(strict.encode('<think>'))>1 and lax.encode('<think>')==strict.encode_control('<think>')
    assert len(strict.encode('        x'))==2 # white space is no control token


def test_huge_and_odd_contents_are_quick():
    for text in ['one two '*1_250_000, 'a'*1_000_000, '\0'*100_000, '\n'*300_000, '🦔'*50_000, '<|endoftext|>'*20_000]:
        start = time.time()
        assert TIK.control_ids.isdisjoint(TIK.encode(text))
        assert time.time()-start<20


def test_save_and_load_give_the_same_ids_here_and_in_transformers(tmp_path):
    from transformers import AutoTokenizer
    CHAT.save(tmp_path)
    ours, theirs = tokenizer_from_file(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for r in RECORDS[:50]:
        assert ours.encode(r.output)==CHAT.encode(r.output)==theirs.encode(r.output, add_special_tokens=False)
    text = '<|im_start|>user\nHi<|im_end|>'
    assert ours.encode_control(text)==CHAT.encode_control(text)==theirs.encode(text, add_special_tokens=False)
    assert (theirs.eos_token_id, theirs.pad_token_id)==(ours.eos_id, ours.pad_id)
    assert as_tokenizer(theirs).encode_control(text)==ours.encode_control(text)


def test_named_tokens_survive(tmp_path):
    "A template may print bos_token: whoever loads the tuned model needs it"
    from transformers import AutoTokenizer
    (tmp_path/'a').mkdir(), (tmp_path/'b').mkdir(), (tmp_path/'c').mkdir()
    byte_level().save(tmp_path/'a')
    config = json.loads((tmp_path/'a'/'tokenizer_config.json').read_text()) | {'bos_token': {'content': '<|im_start|>'}}
    (tmp_path/'a'/'tokenizer_config.json').write_text(json.dumps(config))
    tokenizer_from_file(tmp_path/'a').with_control_tokens(['<|new|>']).save(tmp_path/'b')
    theirs = AutoTokenizer.from_pretrained(tmp_path/'b')
    assert (theirs.bos_token, theirs.eos_token)==('<|im_start|>', '<|im_end|>')
    as_tokenizer(theirs).save(tmp_path/'c')
    assert tokenizer_from_file(tmp_path/'c').config['bos_token']=='<|im_start|>'


@pytest.mark.parametrize('content, error', [(b'{', InputError), (b'\xff\xfe', InputError), (b'{"model": 3}', InputError), (None, FileNotFoundError)])
def test_broken_tokenizer_files(tmp_path, content, error):
    if content is not None: (tmp_path/'tokenizer.json').write_bytes(content)
    with pytest.raises(error, match='tokenizer') as e: tokenizer_from_file(tmp_path)
    assert '\n' not in str(e.value)


def test_a_mistyped_file_is_not_replaced_by_its_neighbours(tmp_path):
    for name,file in ('vocab.json', 'encoder.json'), ('merges.txt', 'vocab.bpe'):
        (tmp_path/name).write_bytes((GPT2_FILES/file).read_bytes())
    assert tokenizer_from_file(tmp_path).encode('Hi')==TIK.encode('Hi')
    with pytest.raises(FileNotFoundError, match='tokenizr.json: no tokenizer here'): tokenizer_from_file(tmp_path/'tokenizr.json')
    with pytest.raises(FileNotFoundError, match='no tokenizer here'): tokenizer_from_file('x'*300)


def test_a_stop_that_swallows_space_does_so_between_turns():
    "As in Phi-3's vocabulary; the oracle is the whole text, encoded at once"
    tok = get_gpt2_tokenizer()
    hf = tokenizers.Tokenizer.from_str(gpt2_as_json(tok.control_tokens).tok.to_str())
    hf.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False, rstrip=True) for t in ('<|user|>', '<|end|>', '<|assistant|>')])
    talk = [dict(role=r, content=c) for r,c in (('user', 'Hi'), ('assistant', 'Hello.'), ('user', 'And now?'), ('assistant', 'Bye.'))]
    [record] = as_records([dict(messages=talk)])
    ours = encode_record(record, 'phi3', as_tokenizer(hf))
    text = ''.join(s.text for s in render_record(record, get_template('phi3')).segments)
    assert text.count('<|end|>\n<|user|>')==1 and ours.ids.tolist()==hf.encode(text).ids


def test_a_folder_whose_padding_token_is_unknown_pads_with_its_end(tmp_path):
    TIK.save(tmp_path)
    (tmp_path/'tokenizer_config.json').write_text('{"eos_token": "<|endoftext|>", "pad_token": "[PAD]"}')
    tok = tokenizer_from_file(tmp_path)
    assert tok.pad_id==tok.eos_id==50256
    with pytest.raises(InputError, match='no padding token'): tokenizer_from_file(tmp_path, pad='[PAD]')


def test_ids_that_a_file_would_change_are_not_saved(tmp_path):
    extended = lambda more: as_tokenizer(tiktoken.Encoding('gpt2', pat_str=TIK.enc._pat_str, special_tokens=TIK.control_tokens | more,
                                                           mergeable_ranks=TIK.enc._mergeable_ranks))
    with pytest.raises(InputError, match='control tokens with gaps'): extended({'<a>': 50300}).save(tmp_path)
    assert list(tmp_path.iterdir())==[]
    extended({'<b>': 50258, '<a>': 50257}).save(tmp_path)
    assert tokenizer_from_file(tmp_path).encode_control('<a><b>')==[50257, 50258]


# ---------------------------------------------------------------- masks

@pytest.mark.parametrize('template', template_names())
def test_prompt_is_the_beginning_and_answer_is_learned(template):
    tok = ready(template)
    for record in RECORDS[:60]:
        try: example = encode_record(record, template, tok)
        except InputError as e: pytest.skip(str(e))
        prompt = encode_prompt(record, template, tok)
        assert example.ids[:len(prompt)].tolist()==prompt
        assert not example.learn[:len(prompt)].any()
        stop = get_template(template).stop or '<|endoftext|>'
        said = tok.decode(example.ids[example.learn>0])
        assert said.strip().removesuffix(stop).strip()==record.output.strip() and said.endswith(stop)
        assert said.count(stop)==1


@pytest.mark.parametrize('template', ['scratchpad', 'alpaca', 'chatml', 'smollm2'])
def test_round_trip_of_the_whole_record_set(template):
    data = InstructionDataset(RECORDS, ready(template), template)
    assert len(data)==1100 and data.receipt.check().rows==1100 and wrong_rows(data)==[]
    end = get_template(template).stop or '<|endoftext|>'
    for r,e in zip(RECORDS, data): assert data.tokenizer.decode(e.ids[e.learn>0])==r.output+end


@quick
@given(texts, texts, texts)
def test_arbitrary_conversations(question, answer, second):
    turns = [dict(role='user', content=question), dict(role='assistant', content=answer),
             dict(role='user', content=second), dict(role='assistant', content=answer+second)]
    if any(said.lstrip().startswith('<think>') and '</think>' not in said for said in (answer, answer+second)):
        with pytest.raises(InputError, match='the think block never closes'): as_records([{'messages': turns}])
        return
    record = as_records([{'messages': turns}])[0]
    for tok in TOKENIZERS[:2]:
        row = encode_rows([record], 'chatml', tok)[0]
        example = encode_record(record, 'chatml', tok)
        stop = tok.token_id('<|im_end|>')
        assert (example.ids[example.learn>0]==stop).sum()==2==row.n_stops
        assert tok.decode(example.ids[example.learn>0])==f'{answer}<|im_end|>{answer+second}<|im_end|>'
        assert (example.ids==stop).sum()==4 and (example.ids==tok.token_id('<|im_start|>')).sum()==4


def test_masks_equal_transformers_assistant_masks():
    "transformers renders, tokenizes jointly and marks what stands between generation tags"
    from transformers import PreTrainedTokenizerFast
    tok = ready('chatml', gpt2_as_json())
    judge = PreTrainedTokenizerFast(tokenizer_object=tok.tok, eos_token='<|im_end|>')
    judge.chat_template = ("{% for m in messages %}{% if m.role=='assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
                           "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
                           "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}")
    same = 0
    records = chat_records(300) + RECORDS[:300]
    for r in records:
        turns = [dict(role=m.role, content=m.content) for m in r.messages]
        theirs = judge.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ours = encode_record(r, 'chatml', tok)
        if theirs['input_ids']!=ours.ids.tolist(): continue # a merge across a border: theirs is another tokenization
        same += 1
        assert theirs['assistant_masks']==ours.learn.astype(int).tolist()
    assert same>=.99*len(records)


@pytest.mark.parametrize('template', ['scratchpad', 'alpaca'])
def test_masks_equal_character_spans_by_transformers(template):
    "transformers tokenizes the joint text; a token is learned if its characters belong to the answer"
    judge, same = transformers_gpt2(), 0
    for r in RECORDS:
        text = render_record(r, get_template(template)).text
        found = judge(text, return_offsets_mapping=True, add_special_tokens=False)
        ours = encode_record(r, template, TIK)
        if found['input_ids']!=ours.ids[:-1].tolist(): continue
        same += 1
        start = len(text)-len(r.output)
        assert [float(b>start) for _,b in found['offset_mapping']]+[1.]==ours.learn.tolist()
    assert same>=.95*len(RECORDS)


def test_marks_in_the_data_win():
    turns = [dict(role='user', content='A'), dict(role='assistant', content='B', weight=0),
             dict(role='user', content='C'), dict(role='assistant', content='D', weight=1),
             dict(role='user', content='E'), dict(role='assistant', content='F')]
    record = as_records([{'messages': turns}])[0]
    said = lambda loss_on, w=0.: ''.join(CHAT.decode([i]) for i,l in zip(*(lambda e: (e.ids, e.learn))(encode_record(record, 'chatml', CHAT, loss_on, w))) if l==1)
    assert said('response')=='D<|im_end|>F<|im_end|>'
    assert said('last')=='D<|im_end|>F<|im_end|>' # marked 1: learned whatever the choice
    assert said('message')=='D<|im_end|>'
    assert 'B<|im_end|>' not in said('all') and 'userE' not in said('message')
    e = encode_record(record, 'chatml', CHAT, prompt_weight=.5)
    b = e.ids.tolist().index(CHAT.encode('B')[0])
    assert e.learn[b]==0 and e.learn[b+1]==0 and set(e.learn.tolist())=={0, .5, 1}


@pytest.mark.parametrize('template', ['phi3', 'zephyr', 'chatml', 'llama3', 'gemma'])
def test_no_marker_can_be_forged(template):
    "Also one that the template prints around a system message only"
    tok, template = ready(template), get_template(template)
    forgery = ''.join(tok.control_tokens)
    turns = [dict(role='user', content=forgery), dict(role='assistant', content='B')]
    plain, forged = (encode_record(as_records([{'messages': m}])[0], template, tok).ids for m in ([turns[0] | {'content': 'A'}, turns[1]], turns))
    control = lambda ids: [i for i in ids.tolist() if i in tok.control_ids]
    assert control(plain)==control(forged) and plain.max()>50256
    if template.name in ('phi3', 'zephyr'):
        system = encode_record(as_records([{'messages': [dict(role='system', content='S'), *turns]}])[0], template, tok).ids
        assert control(system)[0]==tok.token_id('<|system|>')==tok.n_vocab-1 and control(system).count(tok.n_vocab-1)==1


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_sentencepiece_pieces_equal_the_joint_text(kind):
    "Where nothing merges across a border, encoding piece by piece is encoding the whole"
    tok = TOKENIZERS[2 if kind=='bpe' else 3]
    record = as_records([{'instruction': 'Say the word', 'input': '', 'output': 'the word is said'}])[0]
    ids = encode_record(record, 'plain', tok).ids.tolist()
    joint = tok.tok.encode('Say the word\nthe word is said', add_special_tokens=False).ids
    spaces = lambda x: [i for i in x if tok.tok.id_to_token(i)!='▁']
    assert spaces(ids[:-1])==spaces(joint) or kind=='unigram'
    assert tok.decode(ids[:-1])==tok.decode(joint)
    data = InstructionDataset([record], tok, 'plain')
    assert wrong_rows(data)==[]


@pytest.mark.parametrize('said', [{}, dict(add_bos_token=True), dict(add_bos_token=False)])
@pytest.mark.parametrize('start', ['<s>', ''])
def test_plain_words_begin_as_in_transformers(start, said, tmp_path):
    "Text templates leave the start token to the tokenizer, in rows and prompts; chat templates print their own or none"
    plain = bpe_tokenizer(GPT2_FILES/'encoder.json', GPT2_FILES/'vocab.bpe')
    plain.add_special_tokens(['<s>', '<|im_start|>', '<|im_end|>'])
    set_start(plain, start)
    plain.save(str(tmp_path/'tokenizer.json'))
    config = dict(tokenizer_class='PreTrainedTokenizerFast', bos_token='<s>', eos_token='<|endoftext|>')
    (tmp_path/'tokenizer_config.json').write_text(json.dumps(config | said))
    tok, theirs = as_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tok.start==start
    for record in RECORDS[:20]:
        ids, prompt = encode_record(record, 'alpaca', tok).ids.tolist(), encode_prompt(record, 'alpaca', tok)
        assert prompt==theirs(render_prompt(record, get_template('alpaca')).text).input_ids==ids[:len(prompt)]
        assert encode_record(record, 'chatml', tok).ids[0]==tok.token_id('<|im_start|>')
        every = encode_record(record, 'alpaca', tok, 'all').learn
        assert every[0]==0 and every[1:].all()
        row = encode_rows([record], 'plain', tok)[0]
        cut, _ = fit_row(row, len(row)-2, 'cut_prompt')
        assert not start or cut.ids[0]==[tok.token_id('<s>')]
    tok.save(tmp_path/'again')
    assert as_tokenizer(tmp_path/'again').start==start and transformers.AutoTokenizer.from_pretrained(tmp_path/'again')('Hi').input_ids==theirs('Hi').input_ids
    save_template(tmp_path/'again', 'alpaca', tok.start)
    asked = [dict(role='user', content=RECORDS[0].instruction, input=RECORDS[0].input)]
    served = transformers.AutoTokenizer.from_pretrained(tmp_path/'again').apply_chat_template(asked, return_dict=False)
    assert served==encode_prompt(RECORDS[0], 'alpaca', tok)


# ---------------------------------------------------------------- over-long rows and the receipt

CHATS = chat_records(40, seed=3)
CHAT_ROWS = encode_rows(CHATS, 'chatml', CHAT)


@quick
@given(st.sampled_from(CHAT_ROWS), st.integers(2, 300), st.sampled_from(['cut_prompt', 'cut_answer', 'drop']))
def test_policies(row, limit, policy):
    fitted, reason = fit_row(row, limit, policy)
    if len(row)<=limit:
        assert fitted is row and reason=='' # labels of rows that fit do not depend on the limit
        return
    assert (fitted is None)==(reason!='cut')
    if fitted is None: return
    ids = lambda r: [i for piece in r.ids for i in piece]
    assert len(fitted)==limit
    if policy=='cut_answer': assert ids(fitted)==ids(row)[:limit]
    else:
        assert fitted.n_stops>=1
        at = max(i for i,k in enumerate(row.kinds) if k==STOP)
        assert fitted.ids[at-1:]==row.ids[at-1:] and fitted.kinds[at-1:]==row.kinds[at-1:]
        frame = [s.control for s in row.segments]
        assert [p for p,c in zip(fitted.ids, frame) if c]==[p for p,c in zip(row.ids, frame) if c]
        for i,s in enumerate(row.segments): # an answer that lost words is not learned
            if fitted.ids[i]!=row.ids[i]: assert fitted.kinds[i] not in (LEARNED, STOP)


@quick
@given(st.integers(2, 20), st.integers(1, 400), st.integers(1, 390), st.sampled_from(['alpaca', 'scratchpad', 'plain', 'chatml', 'smollm2']))
def test_an_input_is_cut_before_its_instruction(n_asked, n_given, n_lost, template):
    "And both lose their end, so that the row says what to do"
    record = as_records([{'instruction': ' a'*n_asked, 'input': ' b'*n_given, 'output': 'c'}])[0]
    row = encode_rows([record], template, CHAT)[0]
    fitted, reason = fit_row(row, len(row)-n_lost, 'cut_prompt')
    own = lambda r: [i for s,ids in zip(r.segments, r.ids) if s.role=='user' for i in ids]
    if fitted is None: assert n_lost>=len(own(row)) and reason=='no room for the prompt'
    else: assert own(fitted)==own(row)[:-n_lost] and CHAT.decode(own(fitted)).startswith(' a')
    view = rows.view_record(record, template, CHAT, max_length=len(row)-n_lost, over_long='cut_prompt')
    if fitted: assert [i for i,_,kind in view.tokens if kind!='cut']==[i for ids in fitted.ids for i in ids]


@pytest.mark.parametrize('template', ['alpaca', 'chatml'])
def test_a_long_input_keeps_its_instruction(template):
    record = as_records([{'instruction': 'Summarize in one line.', 'input': 'word '*2000, 'output': 'Words.'}])[0]
    data = InstructionDataset([record], CHAT, template, max_length=256, over_long='cut_prompt')
    assert 'Summarize in one line.' in CHAT.decode(data[0].ids) and len(data[0])==256 and data.receipt.cut['rows']==1


@quick
@given(st.integers(2, 200), st.sampled_from(['cut_prompt', 'cut_answer', 'drop']), st.sampled_from(rows.LOSS_ON), st.integers(1, 60))
def test_receipt_balances(limit, policy, loss_on, piece):
    plan = EncodePlan(get_template('chatml'), CHAT, loss_on, limit, policy, 'drop')
    writer = ds.RowWriter(CHAT.n_vocab)
    try: receipt = encode_all(iter(CHATS), plan, writer, piece)
    except InputError as e:
        assert 'no row is left' in str(e)
        return
    arrays = writer.finish()
    assert receipt.rows==len(arrays['rows']) and receipt.tokens==len(arrays['ids'])==arrays['starts'][-1]
    rows = ds.FlatRows(arrays)
    assert receipt.targets==sum(int((e.learn>0).sum()) for e in rows)
    assert all(e.learn[1:].any() and len(e)<=limit and not e.learn[0] for e in rows)


@pytest.mark.parametrize('number', ['rows', 'tokens', 'rows_in', 'tokens_in', 'stops_in'])
def test_unbalanced_receipts_raise(number):
    receipt = InstructionDataset(RECORDS[:5], TIK, 'alpaca').receipt
    setattr(receipt, number, getattr(receipt, number)+1)
    with pytest.raises(ValueError, match='do not balance'): receipt.check()


def test_refused_rows_are_named(tmp_path):
    with pytest.raises(InputError, match=r'rows are longer than max_length=60: .*record \d+ \(\d+ ids\).*over_long') as e:
        InstructionDataset(RECORDS, TIK, 'alpaca', max_length=60, cache=tmp_path)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir()) # nothing half-written
    muted = as_records([{'messages': [dict(role='user', content='A'), dict(role='assistant', content='B', weight=0)]}])
    with pytest.raises(InputError, match='1 of 1 rows have nothing to learn'): InstructionDataset(muted, CHAT, 'chatml')
    kept = InstructionDataset(muted + RECORDS[:3], CHAT, 'chatml', no_target='drop')
    assert len(kept)==3 and kept.receipt.dropped['no target']['rows']==1 and kept[0].where==RECORDS[0].where


def test_receipt_is_saved_as_json(tmp_path):
    receipt = InstructionDataset(RECORDS, TIK, 'alpaca', max_length=80, over_long='cut_answer').receipt
    receipt.save(tmp_path/'receipt.json')
    assert ds.Receipt(**json.loads((tmp_path/'receipt.json').read_text()))==receipt and receipt.cut['stops']>0


def test_the_scratchpads_lists_for_every_row():
    data = json.loads(default_data_file().read_text(encoding='utf-8'))
    enc = tiktoken.get_encoding('gpt2')
    for entry,ids in zip(data, InstructionDataset(data, enc)):
        text = ("Below is an instruction that describes a task.Write a response that appropriately completes the task."
                f"\n\n### Instruction\n{entry['instruction']}")
        text += (f"\n\n### Input\n{entry['input']}" if entry['input'] else '') + f"\n\n### Response:\n{entry['output']}"
        assert ids==enc.encode(text)


@quick
@given(texts)
def test_views_hold_no_raw_control_characters(text):
    record = as_records([{'instruction': text, 'input': '', 'output': '\x1b]0;x\x07<b>'+text}])[0]
    view = rows.view_record(record, 'alpaca', CHAT)
    import re
    bare = re.sub(r'\x1b\[[0-9;]*m', '', str(view))
    assert all(c.isprintable() or c=='\n' for c in bare)
    assert '<b>' not in view._repr_html_()
    assert ''.join(t for _,t,_ in view.tokens)==render_record(record, get_template('alpaca')).text + '<|endoftext|>'


# ---------------------------------------------------------------- cache, processes, scale

def _second_start(cache, ready_line):
    "In another process: the same rows without the tokenizer's work"
    from sft_nb.tokenizer import TiktokenTokenizer
    def never(*_): raise AssertionError('tokenized again')
    TiktokenTokenizer.encode_batch = TiktokenTokenizer.encode_control = never
    data = InstructionDataset(load_records(default_data_file()), 'gpt2', 'alpaca', cache=cache)
    ready_line.put((len(data), data[7].ids.tolist(), data.receipt.targets))


def test_second_start_in_another_process(tmp_path):
    first = InstructionDataset(RECORDS, 'gpt2', 'alpaca', cache=tmp_path)
    spawn = multiprocessing.get_context('spawn')
    line = spawn.Queue()
    p = spawn.Process(target=_second_start, args=(tmp_path, line))
    p.start()
    found = line.get(timeout=60)
    p.join()
    assert found==(len(first), first[7].ids.tolist(), first.receipt.targets)


def test_cache_is_whole_or_absent(tmp_path, monkeypatch):
    calls, real = [0], rows.encode_segments
    def dies(*a):
        calls[0] += 1
        if calls[0]==2: raise KeyboardInterrupt
        return real(*a)
    with monkeypatch.context() as m:
        m.setattr(rows, 'encode_segments', dies)
        with pytest.raises(KeyboardInterrupt): InstructionDataset(RECORDS*2, TIK, 'alpaca', cache=tmp_path)
    assert not list(tmp_path.iterdir())
    whole = InstructionDataset(RECORDS*2, TIK, 'alpaca', cache=tmp_path)
    assert len(list(tmp_path.iterdir()))==1 and len(whole)==2200
    InstructionDataset(RECORDS*2, TIK, 'alpaca', prompt_weight=.1, cache=tmp_path) # weights are applied when read
    assert len(list(tmp_path.iterdir()))==1
    InstructionDataset(RECORDS*2, TIK, 'scratchpad', cache=tmp_path)
    assert len(list(tmp_path.iterdir()))==2


def test_any_change_of_the_contents_is_another_entry(tmp_path):
    turns = [dict(role='user', content='A'), dict(role='assistant', content='B')]
    sets = [turns, [turns[0], turns[1] | {'content': 'B '}], [turns[0] | {'content': 'C'}, turns[1]], [turns[0], turns[1] | {'weight': 1}],
            [dict(role='system', content=''), *turns]]
    for i,s in enumerate(sets):
        assert len(InstructionDataset(as_records([{'messages': s}]), CHAT, 'chatml', cache=tmp_path))==1
        assert len(list(tmp_path.iterdir()))==i+1
    for entry in ({'instruction': 'A', 'input': 'B', 'output': 'C'}, {'instruction': 'A\n\nB', 'input': '', 'output': 'C'}):
        InstructionDataset([entry], CHAT, 'alpaca', cache=tmp_path) # the same messages, another prompt
    assert len(list(tmp_path.iterdir()))==len(sets)+2


def test_another_end_token_is_another_entry(tmp_path):
    "The same tokenizer.json, whose configuration names another end token"
    stop, end = (JsonTokenizer(gpt2_as_json(['<stop>']).tok, 'gpt2', eos) for eos in ('<stop>', '<|endoftext|>'))
    found = [InstructionDataset(RECORDS[:3], tok, 'alpaca', cache=tmp_path)[0].ids[-1] for tok in (stop, end)]
    assert found==[stop.eos_id, end.eos_id]==[50257, 50256]


def test_the_receipt_names_the_file_it_was_made_for(tmp_path):
    for name in ('a.json', 'b.json'):
        (tmp_path/name).write_text(json.dumps([r.raw for r in RECORDS[:50]]))
        data = InstructionDataset(tmp_path/name, TIK, 'alpaca', max_length=60, over_long='drop', cache=tmp_path/'cache')
        assert all(name in where for where in data.receipt.dropped['over-long']['where'])


def test_two_builders_at_once(tmp_path, monkeypatch):
    "The slower one finds the entry in place and uses it"
    real = ds.encode_all
    def slow(records, plan, writer):
        with monkeypatch.context() as m:
            m.setattr(ds, 'encode_all', real)
            InstructionDataset(RECORDS[:9], TIK, 'alpaca', cache=tmp_path)
        return real(records, plan, writer)
    monkeypatch.setattr(ds, 'encode_all', slow)
    assert len(InstructionDataset(RECORDS[:9], TIK, 'alpaca', cache=tmp_path))==9
    assert len(list(tmp_path.iterdir()))==1


def test_iterators(tmp_path):
    assert len(InstructionDataset(iter(RECORDS[:9]), TIK, 'alpaca'))==9
    with pytest.raises(InputError, match='one-time iterator'): InstructionDataset(iter(RECORDS[:9]), TIK, 'alpaca', cache=tmp_path)
    with pytest.raises(InputError, match='no row is left of 0'): InstructionDataset([], TIK, 'alpaca')
    with pytest.raises(InputError, match='read again, got 0 of 9; make it from a list'):
        wrong_rows(InstructionDataset(iter(RECORDS[:9]), TIK, 'alpaca')) # nothing was compared, so nothing is all right


@pytest.mark.parametrize('loss_on', ['response', 'last', 'message'])
def test_a_mask_that_learns_the_question_is_found(loss_on, monkeypatch):
    "Also when the check and the dataset share the fault"
    turns = [dict(role='user', content='A'), dict(role='assistant', content='B', weight=1)]
    marked = [turns[0] | {'weight': 1}, turns[1]]
    assert wrong_rows(InstructionDataset([{'messages': turns}, {'messages': marked}], CHAT, 'chatml', loss_on))==[]
    monkeypatch.setattr(rows, 'segment_kinds', lambda segments, *_: [LEARNED if s.role!='frame' else rows.READ for s in segments])
    data = InstructionDataset([{'messages': turns}, {'messages': marked}], CHAT, 'chatml', loss_on)
    assert wrong_rows(data)==[('record 0', 'B<|im_end|>', 'AB<|im_end|>')] # the other record asks for it


def test_without_a_template_records_are_checked_and_options_refused():
    assert InstructionDataset([{'instruction': 'a', 'output': 'b'}], TIK)[0]==InstructionDataset([{'instruction': 'a', 'input': '', 'output': 'b'}], TIK)[0]
    with pytest.raises(InputError, match="record 0: field 'output' is missing"): InstructionDataset([{'instruction': 'a'}], TIK)
    for option in (dict(loss_on='nonsense'), dict(prompt_weight=.5), dict(max_length=9), dict(over_long='drop'), dict(cache='x'), dict(no_target='drop')):
        with pytest.raises(InputError, match=f'leaving {next(iter(option))}=.* without effect'): InstructionDataset(RECORDS[:2], TIK, **option)


def test_pickled_rows_map_the_same_files(tmp_path):
    import pickle
    data = InstructionDataset(RECORDS[:50], gpt2_as_json(), 'alpaca', cache=tmp_path)
    size = len(pickle.dumps(data.encoded_texts.arrays['ids'])), len(pickle.dumps(data.encoded_texts.__getstate__()['arrays']))
    assert size[1]<size[0]
    copy = pickle.loads(pickle.dumps(data))
    assert isinstance(copy.encoded_texts.arrays['ids'], np.memmap) and copy[3].ids.tolist()==data[3].ids.tolist()
    assert copy.tokenizer.encode('<|endoftext|>')==data.tokenizer.encode('<|endoftext|>')


SCALE = """
    import itertools, resource, sys, time
    from sft_nb.data import Message, Record
    from sft_nb.readers import default_data_file, load_records
    from sft_nb.dataset import InstructionDataset
    base = load_records(default_data_file())
    words = ' '.join(r.output for r in base)
    class Many:
        "n records of about 200 tokens, made when they are asked for"
        def __init__(self, n): self.n = n
        def __iter__(self):
            for i in range(self.n):
                r, a = base[i % len(base)], (i*37) % (len(words)-700)
                raw = {'instruction': f'{i} {r.instruction}', 'input': '', 'output': words[a:a+620]}
                yield Record((Message('user', raw['instruction']), Message('assistant', raw['output'])), raw, 'alpaca', f'row {i}')
    start = time.time()
    data = InstructionDataset(Many(int(sys.argv[1])), 'gpt2', 'scratchpad', max_length=1024, cache=sys.argv[2])
    built = time.time()-start
    start = time.time()
    again = InstructionDataset(Many(int(sys.argv[1])), 'gpt2', 'scratchpad', max_length=1024, cache=sys.argv[2])
    print(len(data), data.receipt.tokens, round(built, 1), round(time.time()-start, 1),
          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024, sum(len(e) for e in itertools.islice(data, 1000)))
"""


def run_scale(n, folder):
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    out = subprocess.run([sys.executable, '-c', textwrap.dedent(SCALE), str(n), str(folder)], env=env, capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    rows, tokens, secs, again, rss, _ = map(float, out.stdout.split())
    return dict(rows=rows, tokens=tokens, secs=secs, again=again, rss=rss)


def test_memory_does_not_grow_with_the_rows(tmp_path):
    small, large = run_scale(2_000, tmp_path), run_scale(12_000, tmp_path)
    assert large['rows']==12_000 and large['tokens']/large['rows']>150
    assert large['rss']-small['rss']<40 # MiB, for two and a half million tokens more


@pytest.mark.slow
def test_a_hundred_thousand_rows(tmp_path):
    found = run_scale(100_000, tmp_path)
    print(found)
    assert found['rss']<500 and found['again']<found['secs']/3


@pytest.mark.slow
@pytest.mark.parametrize('template', ['alpaca', 'chatml'])
def test_fifty_two_thousand_rows(template):
    "Balanced, and every row learns its answer and stop, id for id"
    rng, tok = np.random.default_rng(5), ready(template)
    picks = rng.integers(0, len(RECORDS), (52_000, 3))
    data = [{'instruction': f'{RECORDS[a].instruction} ({i})', 'input': RECORDS[b].input, 'output': f'{RECORDS[c].output} {i}'}
            for i,(a,b,c) in enumerate(picks)]
    dataset = InstructionDataset(data, tok, template, max_length=1024)
    assert dataset.receipt.rows==52_000 and dataset.receipt.kinds['assistant']['stop']==52_000
    assert wrong_rows(dataset)==[]


@pytest.mark.slow
def test_the_default_model_reads_what_transformers_reads():
    "SmolLM2's own tokenizer and template: ids of the joint text by transformers, masks by its generation marks"
    from sft_nb.loading import load_model
    from transformers import PreTrainedTokenizerFast
    cache = Path(os.environ.get('SFT_NB_CACHE') or Path.home()/'.cache'/'sft_nb')
    if not list(cache.glob('*.gguf')): pytest.skip('the default model is not in the cache')
    loaded = load_model()
    tok, template = loaded.tokenizer, loaded.template
    judge = PreTrainedTokenizerFast(tokenizer_object=tok.tok, eos_token='<|im_end|>', bos_token='<|im_start|>')
    judge.chat_template = template.jinja
    records = RECORDS + chat_records(200, seed=9)
    data = InstructionDataset(records, tok, template)
    for r,e in zip(records, data):
        turns = [dict(role=m.role, content=m.content) for m in r.messages]
        assert judge.apply_chat_template(turns, tokenize=True, return_dict=False)==e.ids.tolist()
    assert wrong_rows(data)==[] and data.receipt.kinds['assistant']['stop']==sum(m.role=='assistant' for r in records for m in r.messages)


def test_a_cache_tells_records_apart_that_differ_in_their_calls_and_tools_only(tmp_path):
    def chat(name, **more):
        call = dict(type='function', function=dict(name=name, arguments={}))
        return [dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='', tool_calls=[call])], **more)]

    tools = [dict(type='function', function=dict(name='one', description='d', parameters={}))]
    tok = get_gpt2_tokenizer().with_control_tokens(['<|im_start|>', '<|im_end|>'])
    sets = [as_records(rows) for rows in (chat('one'), chat('two'), chat('one', tools=tools))]
    kept = [InstructionDataset(records, tok, 'hermes', cache=tmp_path)[0].ids.tolist() for records in sets]
    assert kept == [InstructionDataset(records, tok, 'hermes')[0].ids.tolist() for records in sets]
    assert len({tuple(ids) for ids in kept}) == 3
