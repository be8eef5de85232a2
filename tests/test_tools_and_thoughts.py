"What a model of 2026 says: its thought, its calls and its answer are kept apart, shown and scored"
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from sft_nb.sampling import TextPieces, answer_text
from sft_nb.tokenizer import JsonTokenizer

MARKS = ['<think>', '</think>', '<tool_call>', '</tool_call>']


def marked_tokenizer():
    "Byte-level, with control tokens that are special and marks that are not, as Qwen has them"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ['Name a colour. The answer is Red.', '{"name": "weather", "arguments": {"town": "Ulm"}}']*9
    tok.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ('<|endoftext|>', '<|im_start|>', '<|im_end|>')])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKS])
    return JsonTokenizer(tok, 'marked', '<|im_end|>')


def test_answers_and_streams_keep_marks_as_transformers_does():
    transformers = pytest.importorskip('transformers')
    tokenizer = marked_tokenizer()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.tok, eos_token='<|im_end|>')
    chance, n = random.Random(3), tokenizer.n_vocab
    for _ in range(200):
        ids = chance.choices(range(n), k=9) + chance.choices(range(n-7, n), k=4)
        chance.shuffle(ids)
        wanted = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answer_text(tokenizer, ids)[0] == wanted
        pieces = TextPieces(tokenizer)
        assert ''.join(pieces.add(ids[:k], done=k == len(ids)) for k in range(1, len(ids)+1)) == wanted
