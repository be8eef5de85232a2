"""The notes this project grew out of, run as they are: what they print comes out exactly, and their own functions are the oracle.

`PRINTED_*` is what the notes show; the functions `notes_*` are the notes' code, unchanged but for the name."""
import json
import random
from functools import partial
from pathlib import Path

import pytest
import tiktoken
import torch
from torch.utils.data import DataLoader

from sft_nb.readers import load_records
from sft_nb.split import split_records
from sft_nb.templates import format_input
from sft_nb.dataset import InstructionDataset
from sft_nb.collate import custom_collate_fn, get_default_device
from sft_nb.loaders import make_loaders

ROOT = Path(__file__).resolve().parent.parent
DATA = json.loads((ROOT/'data/sft/train/instruction-data.json').read_text(encoding='utf-8'))

PRINTED_PROMPT = '''Below is an instruction that describes a task.Write a response that appropriately completes the task.

### Instruction
Evaluate the following phrase by transforming it into the spelling given.

### Input
freind --> friend

### Response:
The spelling of the given phrase "freind" is incorrect, the correct spelling is "friend".'''

PRINTED_IDS = [21106, 318, 281, 12064, 326, 8477, 257, 4876, 13, 16594, 257, 2882, 326, 20431, 32543, 262, 4876, 13, 198, 198, 21017,
               46486, 198, 36, 2100, 4985, 262, 1708, 9546, 416, 25449, 340, 656, 262, 24993, 1813, 13, 198, 198, 21017, 23412, 198,
               19503, 521, 14610, 1545, 198, 198, 21017, 18261, 25, 198, 464, 24993, 286, 262, 1813, 9546, 366, 19503, 521, 1, 318,
               11491, 11, 262, 3376, 24993, 318, 366, 6726, 1911]


def notes_format_input(entry):
    instruction_text = (
        f"Below is an instruction that describes a task."
        f"Write a response that appropriately completes the task."
        f"\n\n### Instruction\n{entry['instruction']}"
    )
    input_text = f"\n\n### Input\n{entry['input']}" if entry["input"] else ""
    return instruction_text + input_text


def notes_collate(batch, pad_token_id=50256, ignore_token_index=-100, allowed_max_length=None, device='cpu'):
    batch_max_length = max(len(item) + 1 for item in batch)
    inputs_batch_list, targets_batch_list = [], []
    for item in batch:
        new_item = item.copy() + [pad_token_id]
        padded = new_item + [pad_token_id] * (batch_max_length - len(new_item))
        inputs = torch.tensor(padded[:-1])
        targets = torch.tensor(padded[1:])
        mask = targets == pad_token_id
        indices = torch.nonzero(mask).squeeze()
        if indices.numel() > 1:
            targets[indices[1:]] = ignore_token_index
        if allowed_max_length is not None:
            inputs = inputs[:allowed_max_length]
            targets = targets[:allowed_max_length]
        inputs_batch_list.append(inputs)
        targets_batch_list.append(targets)
    return torch.stack(inputs_batch_list).to(device), torch.stack(targets_batch_list).to(device)


@pytest.fixture(scope='module')
def tokenizer(): return tiktoken.get_encoding('gpt2')


def same(got, wanted):
    for a, b in zip(got, wanted):
        assert a.dtype == b.dtype and a.device.type == b.device.type
        assert a.tolist() == b.tolist()


def test_first_record_and_prompt():
    assert len(DATA) == 1100
    assert json.dumps(DATA[0], indent=4) == '''{
    "instruction": "Evaluate the following phrase by transforming it into the spelling given.",
    "input": "freind --> friend",
    "output": "The spelling of the given phrase \\"freind\\" is incorrect, the correct spelling is \\"friend\\"."
}'''
    assert format_input(DATA[0]) + f"\n\n### Response:\n{DATA[0]['output']}" == PRINTED_PROMPT
    for entry in DATA: assert format_input(entry) == notes_format_input(entry)


def test_split_sizes():
    split = split_records(load_records(ROOT/'data/sft/train/instruction-data.json'))
    assert (len(split.train), len(split.test), len(split.val)) == (935, 110, 55)
    assert [r.raw for r in split.train] == DATA[:935] and [r.raw for r in split.test] == DATA[935:1045]


def test_dataset_ids(tokenizer):
    dataset = InstructionDataset(DATA[:935], tokenizer)
    assert len(dataset) == 935 and dataset[0] == PRINTED_IDS
    assert tokenizer.decode(dataset[0]) == PRINTED_PROMPT
    for entry, ids in zip(DATA, dataset):
        assert ids == tokenizer.encode(notes_format_input(entry) + f"\n\n### Response:\n{entry['output']}")


def test_toy_batch():
    inputs, targets = custom_collate_fn(([0, 1, 2, 3, 4], [5, 6], [7, 8, 9]), allowed_max_length=4, device='cpu')
    assert inputs.tolist() == [[0, 1, 2, 3], [5, 6, 50256, 50256], [7, 8, 9, 50256]]
    assert targets.tolist() == [[1, 2, 3, 4], [6, 50256, -100, -100], [8, 9, 50256, -100]]
    assert inputs.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize('seed', range(30))
def test_collate_equals_the_notes(seed):
    rng = random.Random(seed)
    end = rng.choice([50256, 7])
    rows = [[rng.choice([end, *range(20)]) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 5))]
    keep = rows and [list(r) for r in rows]
    options = dict(pad_token_id=end, ignore_token_index=rng.choice([-100, -3]), allowed_max_length=rng.choice([None, 1, 4, 50]), device='cpu')
    same(custom_collate_fn(rows, **options), notes_collate(rows, **options))
    assert rows == keep


@pytest.mark.parametrize('rows', [[[]], [[], []], [[], [5, 6]], [[5], [], [7, 8, 9]], [[50256], []]])
@pytest.mark.parametrize('longest', [None, 0, 1, 4])
def test_empty_rows_have_the_notes_shapes(rows, longest):
    ours, theirs = (f(rows, allowed_max_length=longest, device='cpu') for f in (custom_collate_fn, notes_collate))
    for a, b in zip(ours, theirs): assert a.shape == b.shape and a.tolist() == b.tolist() and a.dtype == torch.int64


def test_no_rows_at_all_are_refused():
    for f in (custom_collate_fn, notes_collate):
        with pytest.raises(ValueError): f([], device='cpu')


def test_dataset_is_one_of_torch(tokenizer):
    dataset = InstructionDataset(DATA[:20], tokenizer)
    assert isinstance(dataset, torch.utils.data.Dataset)
    first, second = torch.utils.data.random_split(dataset, [15, 5], torch.Generator().manual_seed(1))
    assert sorted(map(tuple, [*first, *second])) == sorted(map(tuple, dataset))
    both = dataset + InstructionDataset(DATA[20:23], tokenizer, 'alpaca')
    assert len(both) == 23 and both[2] == dataset[2] and hasattr(both[22], 'learn')


def test_loaders_equal_the_notes(tokenizer):
    train, test, val = DATA[:935], DATA[935:1045], DATA[1045:]
    collate = partial(custom_collate_fn, device='cpu', allowed_max_length=1024)
    loader = DataLoader(InstructionDataset(train, tokenizer), batch_size=8, collate_fn=collate, shuffle=True, drop_last=True, num_workers=0)
    oracle = DataLoader([tokenizer.encode(notes_format_input(e) + f"\n\n### Response:\n{e['output']}") for e in train], batch_size=8,
                        collate_fn=partial(notes_collate, allowed_max_length=1024), shuffle=True, drop_last=True, num_workers=0)
    assert len(loader) == len(oracle) == 116
    torch.manual_seed(123)
    batches = list(loader)
    torch.manual_seed(123)
    for got, wanted in zip(batches, oracle): same(got, wanted)
    ours = make_loaders(split_records(load_records(ROOT/'data/sft/train/instruction-data.json')), tokenizer, device='cpu')
    assert [len(l) for l in ours] == [116, 14, 7]
    for got, wanted in zip(ours.train, batches): same(got, wanted)


def test_default_device_is_a_device():
    from sft_nb.machine import choose_device
    assert get_default_device is choose_device
    assert get_default_device() == choose_device('auto') and get_default_device().type in ('cpu', 'cuda', 'mps')


ANSWERED = ROOT/'data/sft/test/instruction-data-with-response.json'


def test_the_answered_test_set_is_the_test_part():
    rows = json.loads(ANSWERED.read_text(encoding='utf-8'))
    assert [{k: v for k, v in row.items() if k != 'model_response'} for row in rows] == DATA[935:1045]
    assert all(list(row) == ['instruction', 'input', 'output', 'model_response'] and row['model_response'].strip() for row in rows)
    assert len({row['model_response'] for row in rows}) > 90


def test_the_evaluation_page_writes_the_answered_test_set(tmp_path, monkeypatch):
    "The page's own cells, run where a run has answered, write the committed file byte for byte"
    from sft_nb.basics import save_json
    from sft_nb.evaluation import plain_responses
    from sft_nb.responses import save_responses
    cells = [''.join(c['source']) for c in json.loads((ROOT/'nbs/06_evaluation.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    places = next(c for c in cells if c.startswith('FOLDER ='))
    write = next(c for c in cells if 'save_json(TEST_FILE' in c)
    (tmp_path/'nbs').mkdir()
    (tmp_path/'data/sft/train').mkdir(parents=True)
    (tmp_path/'data/sft/train/instruction-data.json').write_bytes((ROOT/'data/sft/train/instruction-data.json').read_bytes())
    answers = [row['model_response'] for row in json.loads(ANSWERED.read_text(encoding='utf-8'))]
    save_responses(tmp_path/'runs/default/responses.json', DATA[935:1045], answers)
    monkeypatch.chdir(tmp_path/'nbs')
    names = dict(json=json, Path=Path, save_json=save_json, plain_responses=plain_responses)
    exec(places, names)
    exec(write, names)
    assert (tmp_path/ANSWERED.relative_to(ROOT)).read_bytes() == ANSWERED.read_bytes()
