"Streams: training begins before all is encoded, learns the same to the last bit, goes on after a stop, and ends where a record is at fault."
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import home # noqa: F401
from test_training import bits, quiet, stop_after

from sft_nb import streaming
from sft_nb.basics import InputError
from sft_nb.choices import LoraConfig, TrainConfig
from sft_nb.cli import main
from sft_nb.data import split_in_order
from sft_nb.dataset import InstructionDataset
from sft_nb.decoder import Decoder
from sft_nb.encoding import EncodePlan
from sft_nb.loaders import epoch_order
from sft_nb.lora import add_lora
from sft_nb.model import ModelConfig
from sft_nb.readers import load_records, save_records
from sft_nb.run import train
from sft_nb.shelf import get_template
from sft_nb.streaming import StreamedRows, finish_rows, split_spooled, spool_records
from sft_nb.tokenizer import JsonTokenizer

RECORDS = [dict(instruction=f'Add {i} and {i+1}.', input='' if i%3 else 'Now.', output=' '.join(str(k) for k in range(i%9+1))) for i in range(90)]
CFG = TrainConfig(lr=3e-3, epochs=2, batch_size=4, dtype='float32', eval_every=7)


@pytest.fixture(scope='module')
def words():
    "A small vocabulary, so that a toy model reads it"
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    made = Tokenizer(models.BPE(unk_token='<unk>'))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator([json.dumps(r) for r in RECORDS], trainers.BpeTrainer(vocab_size=280, special_tokens=['<unk>', '<|im_start|>', '<|im_end|>']))
    return made


@pytest.fixture(scope='module')
def plan(words): return EncodePlan(get_template('chatml'), JsonTokenizer(words, 'words'), max_length=400)


def model_for(plan):
    shape = ModelConfig(family='llama', vocab_size=plan.tokenizer.n_vocab, n_layers=1, width=32, n_heads=4, n_kv_heads=2, head_dim=8, mlp_width=48, max_length=400)
    torch.manual_seed(1)
    return Decoder(shape)


def stream(plan, file, seed=123, **kw):
    split = split_spooled(spool_records(file).records)
    return StreamedRows(split.train, plan, order=epoch_order(len(split.train), seed, 0), **kw), StreamedRows(split.val, plan, **kw)


def plain(plan, file):
    split = split_in_order(load_records(file))
    return [InstructionDataset(part, plan.tokenizer, plan.template, max_length=plan.max_length) for part in (split.train, split.val)]


@pytest.fixture
def file(tmp_path):
    save_records(tmp_path/'set.jsonl', RECORDS)
    return tmp_path/'set.jsonl'


@pytest.fixture(params=[False, True], ids=['all_weights', 'lora_with_dropout'])
def prepare(request, plan):
    def made():
        model = model_for(plan)
        if request.param: add_lora(model, LoraConfig(2, dropout=.2))
        return model
    return made


def told(log): return [(s.step, s.loss, s.n_tokens) for s in log.steps], [(v.step, v.loss) for v in log.vals]


def test_the_weights_are_those_without_to_the_last_bit_also_after_a_stop(file, plan, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, '_PIECE', 3) # many pieces, so that steps and encoding mix
    model = prepare()
    log = train(model, *plain(plan, file), CFG, say=quiet)
    wanted = bits(model), told(log)
    model = prepare()
    log = train(model, *stream(plan, file), CFG, say=quiet)
    assert (bits(model), told(log)) == wanted
    for n in (5, 27): # 19 steps an epoch: in the middle of the first and of the second
        train(prepare(), *stream(plan, file), CFG, tmp_path/str(n), hooks=[stop_after(n)], say=quiet)
        model = prepare()
        log = train(model, *stream(plan, file), CFG, tmp_path/str(n), resume=True, say=quiet)
        assert (bits(model), told(log)) == wanted


def test_a_stream_of_other_records_is_another_run(file, plan, tmp_path):
    train(model_for(plan), *stream(plan, file), CFG, tmp_path/'run', hooks=[stop_after(1)], say=quiet)
    save_records(file, [*RECORDS[:-1], RECORDS[-1] | {'output': 'something else'}])
    with pytest.raises(InputError, match='another run than the one to resume .*validation_rows: "stream'):
        train(model_for(plan), *stream(plan, file), CFG, tmp_path/'run', resume=True, say=quiet)


class Gate:
    "Records, of which so many are handed out, and then none until the gate is open"
    def __init__(self, inner, n):
        self.inner = inner
        self.digest = inner.digest
        self.numbers = inner.numbers
        self.left = n
        self.open = threading.Event()

    def __len__(self): return len(self.inner)

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0: assert self.open.wait(60)
        return self.inner[i]


def test_training_begins_before_all_is_encoded(file, plan, monkeypatch):
    monkeypatch.setattr(streaming, '_PIECE', 8)
    gate = Gate(split_spooled(spool_records(file).records).train, 20)
    rows = StreamedRows(gate, plan, order=epoch_order(76, CFG.seed, 0))
    seen = []

    def look(entry, model):
        seen.append((entry.step, rows.receipt is None, int((rows.place>=0).sum())))
        gate.open.set()

    log = train(model_for(plan), rows, (), CFG, hooks=[look], say=quiet)
    assert seen[0][:2] == (1, True) and 4 <= seen[0][2] < 76 and len(log.steps) == 38
    assert finish_rows(rows).rows == 76 and seen[-1][1] is False


def test_rows_can_be_asked_for_in_any_order(file, plan, monkeypatch):
    monkeypatch.setattr(streaming, '_PIECE', 2)
    want = plain(plan, file)[0]
    for seed in range(3):
        rows = stream(plan, file)[0]
        for i in np.random.default_rng(seed).permutation(76): assert rows[i].ids.tolist() == want[i].ids.tolist() and rows[i].where == want[i].where
        assert finish_rows(rows).kinds == want.receipt.kinds


@pytest.mark.parametrize('over_long', ['raise', 'cut_prompt', 'cut_answer'])
def test_a_row_that_cannot_be_kept_ends_the_run_with_its_address(file, plan, over_long):
    "Also when it is the very last"
    for i in (0, 40, epoch_order(76, 123, 0)[-1]):
        bad = dict(RECORDS[i], instruction='long '*400)
        save_records(file, [*RECORDS[:i], bad, *RECORDS[i+1:]])
        rows, _ = stream(replace(plan, over_long=over_long), file)
        want = f'set.jsonl line {i+1}: (over-long|no room for the prompt|no target left), got .* no row is left out of a stream'
        if over_long == 'cut_prompt':
            assert finish_rows(rows).cut['rows'] == 1
            continue
        if over_long == 'raise' and i not in (0, 40): want = f'1 of 76 rows are longer than max_length=400: .*line {i+1} '
        with pytest.raises(InputError, match=want): finish_rows(rows)
        with pytest.raises(InputError, match=want): train(model_for(plan), rows, (), CFG, say=quiet)


def test_a_record_that_the_template_refuses_ends_the_run(file, plan):
    chats = [dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='b')]) for _ in range(90)]
    chats[50]['messages'] = [dict(role='user', content='a'), dict(role='assistant', content='b')]*2
    save_records(file, chats)
    rows, _ = stream(replace(plan, template=get_template('alpaca')), file)
    with pytest.raises(InputError, match='set.jsonl line 51'): finish_rows(rows)


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_a_set_of_the_hub_is_streamed(tmp_path, monkeypatch, kind):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path/'cache'))
    monkeypatch.chdir(tmp_path)
    Path('mine').mkdir()
    if kind == 'jsonl': save_records('mine/train.jsonl', RECORDS)
    else: datasets.Dataset.from_list(RECORDS).to_parquet('mine/train.parquet')
    how, real = [], datasets.load_dataset
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **kw: how.append(kw['streaming']) or real(*a, **kw))
    records = spool_records('hub:mine').records
    assert how == [True] and [r.raw for r in records] == RECORDS and records[7].where == 'hub:mine row 7'
    assert list(records) == load_records('hub:mine') and how == [True, False]
    with pytest.raises(InputError, match='hub:nobody/nothing: cannot be loaded, got'): spool_records('hub:nobody/nothing')


@pytest.mark.parametrize('words,said', [
    (['--over-long', 'drop'], '--stream and --over-long: a row that is left out'), (['--no-target', 'drop'], '--stream and --no-target'),
    (['--drop-broken'], '--stream and --drop-broken'), (['--split-seed', '1'], '--stream and --split-seed'),
    (['--length-window', '4'], '--stream and --length-window: the length of all rows')])
def test_what_a_stream_cannot_do_is_refused_by_name(home, monkeypatch, capsys, words, said): # noqa: F811
    monkeypatch.chdir(home)
    assert main(['train', '--data', 'toy.json', '--model', 'tiny', '--stream', '--name', 'refused', *words]) == 2
    assert said in capsys.readouterr().err and not (home/'runs/refused').exists()


def test_a_dry_run_of_a_stream_writes_nothing(home, monkeypatch, capsys): # noqa: F811
    monkeypatch.chdir(home)
    usual = ['--data', 'toy.json', '--model', 'tiny', '--dtype', 'float32', '--epochs', '2', '--micro-batch-tokens', '200']
    assert main(['run', *usual, '--stream', '--name', 'run']) == 2 and 'run: answers and scores a part of the set' in capsys.readouterr().err
    assert main(['train', *usual, '--stream', '--dry-run', '--name', 'dry']) == 0
    out = capsys.readouterr().out
    assert 'looks at the first 34 rows' in out and 'x 2 epochs = 10 steps' in out and 'tokens    not counted yet' in out and 'nothing was written' in out and not (home/'runs/dry').exists()


def test_tools_anywhere_in_the_set_choose_the_template(tmp_path):
    "As without a stream: `open_model` is told of the one record that needs more"
    rich = dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='', tool_calls=[dict(type='function', function=dict(name='f', arguments={}))])])
    plain_chat = dict(messages=[dict(role='user', content='a'), dict(role='assistant', content='b')])
    save_records(tmp_path/'a.jsonl', [*[plain_chat]*30, rich, plain_chat])
    records = spool_records(tmp_path/'a.jsonl').records
    assert records.rich == (records[30],) and records[3:].rich == records.rich
    save_records(tmp_path/'a.jsonl', [plain_chat]*9)
    assert spool_records(tmp_path/'a.jsonl').records.rich == ()
