"""llama.cpp's own converter, run on our saved folders, against our export. Slow, and skipped without its source: `LLAMA_CPP=FOLDER pytest --slow tests/test_converter.py`,
where FOLDER holds convert_hf_to_gguf.py (the source package of llama-cpp-python has it under vendor/llama.cpp); families with pieces need `pip install sentencepiece`, too"""
import io, os, subprocess, sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from test_export import toy_folder, toy_tokenizer

from sft_nb.export import gguf_settings, write_gguf
from sft_nb.gguf_file import open_gguf
from sft_nb.loading import load_model
from sft_nb.readers import default_data_file, load_records
from sft_nb.saving import save_model
from sft_nb.vocabulary import gguf_tokenizer

SOURCE = Path(os.environ.get('LLAMA_CPP', 'nowhere'))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (SOURCE/'convert_hf_to_gguf.py').is_file(),
                                                   reason='the environment variable LLAMA_CPP names no folder with convert_hf_to_gguf.py')]
N_IDS = 512
IN_PIECES = 'phi3', 'gemma', 'gemma2'                      # whose tokenizer the converter takes from SentencePiece's file alone

RUN = '''
import runpy, sys
source, split, *sys.argv[1:] = sys.argv[1:]
sys.path[:0] = [source, source + '/gguf-py']
if split:                                                  # it knows the tokenizers of published models only, and a toy's by no name
    from conversion import base
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: split
runpy.run_path(source + '/convert_hf_to_gguf.py', run_name='__main__')
'''

def convert(folder, to, kind, split=''):
    done = subprocess.run([sys.executable, '-c', RUN, SOURCE, split, folder, '--outfile', to, '--outtype', kind], capture_output=True, text=True, timeout=600)
    assert done.returncode==0, done.stderr[-2000:]


def with_pieces(family):
    "A tokenizer that SentencePiece learned, with its file"
    spm = pytest.importorskip('sentencepiece', reason='sentencepiece is not installed: pip install sentencepiece')
    gemma = family!='phi3'
    ids = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3) if gemma else dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    file = io.BytesIO()
    texts = iter([r.output for r in load_records(default_data_file())[:400]])
    spm.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=file, vocab_size=N_IDS, model_type='bpe', byte_fallback=True, normalization_rule_name='identity',
                                   add_dummy_prefix=not gemma, remove_extra_whitespaces=False, control_symbols=['<turn>'], minloglevel=2, **ids)
    sp = spm.SentencePieceProcessor(model_proto=file.getvalue())
    kind = lambda i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
    own = dict(model='llama', tokens=[sp.id_to_piece(i) for i in range(N_IDS)], scores=[sp.get_score(i) for i in range(N_IDS)], token_type=[kind(i) for i in range(N_IDS)],
               bos_token_id=sp.bos_id(), eos_token_id=sp.eos_id(), unknown_token_id=sp.unk_id(), add_space_prefix=not gemma) | ({'padding_token_id': 0} if gemma else {})
    tokenizer = gguf_tokenizer(({'general.architecture': family} | {f'tokenizer.ggml.{k}': v for k, v in own.items()}).get, 'toy')
    for text in ('Hello  there,\n\n 7 東京', 'It is 4.'): assert tokenizer.encode(text)==sp.encode(text)
    tokenizer.pieces = file.getvalue()
    return tokenizer


def rope(**words): return dict(rope_parameters=dict(rope_theta=1e4) | words)

CASES = {                                                  # a family and what is changed of its toy
    'gpt2': ('gpt2', {}), 'llama': ('llama', {}), 'mistral': ('mistral', {}), 'qwen2': ('qwen2', {}), 'qwen3': ('qwen3', {}), 'phi3': ('phi3', dict(sliding_window=None)),
    'gemma': ('gemma', {}), 'gemma2': ('gemma2', dict(attn_logit_softcapping=50., final_logit_softcapping=30.)), 'gemma3': ('gemma3_text', {}),
    'biases and a head': ('llama', dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)), 'a window': ('mistral', dict(sliding_window=8)),
    'linear': ('llama', rope(rope_type='linear', factor=2.5)), 'yarn': ('qwen2', rope(rope_type='yarn', factor=4., original_max_position_embeddings=16)),
    'llama3': ('llama', rope(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32)),
    'longrope': ('phi3', dict(original_max_position_embeddings=16) | rope(rope_type='longrope', long_factor=[4.]*8, short_factor=[1.5]*8, original_max_position_embeddings=16, partial_rotary_factor=1.))}

OURS_ALONE = {                                             # what we say, and what the converter leaves to those who read its file (a Mistral's window has no reader there)
    'attention.key_length', 'attention.value_length', 'rope.dimension_count', 'rope.freq_base', 'vocab_size', 'attention.sliding_window_pattern', 'attention.sliding_window',
    'rope.scaling.original_context_length', 'tokenizer.ggml.add_bos_token', 'tokenizer.ggml.add_space_prefix', 'tokenizer.ggml.unknown_token_id'}
THEIRS_ALONE = {                                           # False by default; the first context of a Phi-3 that is not stretched; a token that only CodeGemma has
    'tokenizer.ggml.add_sep_token', 'rope.scaling.original_context_length', 'tokenizer.ggml.eot_token_id'}
DIFFERENT = {'general.name', 'tokenizer.ggml.scores'}      # a name with capitals; the place of a merge instead of SentencePiece's score, in the same order

def settings(path):
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith('GGUF.')}


def order_of(scores, types): return sorted((i for i, kind in enumerate(types) if kind==1), key=lambda i: -scores[i])


@pytest.mark.parametrize('kind', ['f32', 'f16', 'bf16', 'q8_0'])
@pytest.mark.parametrize('case', CASES)
def test_the_converter_makes_the_same_file(case, kind, tmp_path):
    "Tensors to the last bit, settings but for those that are named above"
    family, change = CASES[case]
    in_pieces = family in IN_PIECES
    folder, _ = toy_folder(family, tmp_path, with_pieces(family) if in_pieces else toy_tokenizer(259, '<|endoftext|>'), **change)
    got = load_model(folder)
    write_gguf(tmp_path/'ours.gguf', got.model, gguf_settings(got.cfg, kind, got.tokenizer, got.template, about=dict(name='model')), kind)
    convert(folder, tmp_path/'theirs.gguf', kind, '' if in_pieces else 'gpt-2')
    (_, ours), (_, theirs) = open_gguf(tmp_path/'ours.gguf'), open_gguf(tmp_path/'theirs.gguf')
    assert sorted(ours)==sorted(theirs)
    for name, t in ours.items():
        assert (t.tensor_type, list(t.shape))==(theirs[name].tensor_type, list(theirs[name].shape)), name
        if name=='rope_freqs.weight': np.testing.assert_allclose(t.data, theirs[name].data, rtol=3e-7) # a quotient, taken another way
        else: assert t.data.tobytes()==theirs[name].data.tobytes(), name
    a, b = settings(tmp_path/'ours.gguf'), settings(tmp_path/'theirs.gguf')
    own = f"{a['general.architecture']}."
    assert {k.removeprefix(own) for k in a.keys() - b.keys()}<=OURS_ALONE
    assert {k.removeprefix(own) for k in b.keys() - a.keys()}<=THEIRS_ALONE
    assert {k for k in a.keys() & b.keys() if a[k]!=b[k]}<=DIFFERENT
    if in_pieces: assert order_of(*(a[f'tokenizer.ggml.{k}'] for k in ('scores', 'token_type')))==order_of(*(b[f'tokenizer.ggml.{k}'] for k in ('scores', 'token_type')))


def test_the_default_model(tmp_path):
    "With the name that the converter itself finds for its way to split text"
    got = load_model()
    folder = save_model(tmp_path/'model', got.model, got.tokenizer, got.template)
    got = load_model(folder)
    write_gguf(tmp_path/'ours.gguf', got.model, gguf_settings(got.cfg, 'f16', got.tokenizer, got.template, about=dict(name='model')), 'f16')
    convert(folder, tmp_path/'theirs.gguf', 'f16')
    a, b = settings(tmp_path/'ours.gguf'), settings(tmp_path/'theirs.gguf')
    differ = {k for k in a.keys() | b.keys() if a.get(k)!=b.get(k)}
    assert {k.removeprefix('llama.') for k in differ}<=OURS_ALONE | DIFFERENT, {k: (str(a.get(k))[:80], str(b.get(k))[:80]) for k in differ}
    (_, ours), (_, theirs) = open_gguf(tmp_path/'ours.gguf'), open_gguf(tmp_path/'theirs.gguf')
    assert sorted(ours)==sorted(theirs)
    for name, t in ours.items(): assert t.tensor_type==theirs[name].tensor_type and t.data.tobytes()==theirs[name].data.tobytes(), name
