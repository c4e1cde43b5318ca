"""The tokenizer built from a GGUF file: against transformers' converter and against llama.cpp itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from lorafit.errors import ModelError
from lorafit.model import gguf_header, gguf_tokenizer, spec
from lorafit.model.load import load

TEXTS = [
    "", " ", "hello world", "Hello, world! It's 2024; don't we'll I'M", "  leading", "trailing  ", "a   b\t\tc",
    "line\nline\r\n\n\n  indented\n", "def f(x):\n    return x + 1  # done\n", "1 22 333 4444 3.14159 1e10",
    "naïve café Ünïcödé", "日本語のテキスト", "Привет мир", "مرحبا بالعالم",
    "😀 👩‍👩‍👧 🏳️‍🌈", "e\u0301 \u200b \xa0 \ufeff",
    "<|im_start|>user\nhi<|im_end|>\n", "x<|im_end|>y <think> z</think>", "<|im_end", "https://example.org/a?b=c&d=%20",
    "\u2581hello\u2581", "¡¿«»…—", "½²Ⅷ٣", "\x00\x01\x7f",
]  # fmt: skip
DIGITS_AFTER_SPACES = ["x   12", "\n\n 7", "a  1  2", "  ²"]
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the world"}]

PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE_A := "\u2581"]
WORDS = [*"abcdehlortw.,!", "he", "ll", "lo", "hel", "hell", "hello", "\u2581h", "\u2581he", "\u2581hello", "or", "wor"]
SPM = [*PIECES, *WORDS, "<tool>"]
SPM_TYPES = [2, 3, 3] + [6] * 256 + [1] * (1 + len(WORDS)) + [4]
SPM_SCORES = [0.0] * 259 + [-float(i) for i in range(1 + len(WORDS))] + [-1000.0]


def ours(path: Path):
    tokenizer = gguf_tokenizer.build(gguf_header.read_header(path))
    assert tokenizer is not None
    return tokenizer


def theirs(path: Path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def of_llama_cpp(path: Path):
    """Text -> ids by llama.cpp, special tokens in the text recognised and none added."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return lambda text: model.tokenize(text.encode(), add_bos=False, special=True)


@pytest.fixture(scope="module")
def smollm():
    return ours(spec.resolve("smollm2-135m"))


def test_smollm2_ids_equal_llama_cpps(smollm) -> None:
    reference = of_llama_cpp(spec.resolve("smollm2-135m"))
    for text in TEXTS + DIGITS_AFTER_SPACES:
        if "\x00" not in text:  # ends a C string
            assert reference(text) == smollm.encode(text), text


def test_smollm2_text_comes_back(smollm) -> None:
    for text in TEXTS + DIGITS_AFTER_SPACES:
        assert text == smollm.decode(smollm.encode(text)), text


def test_smollm2_settings_are_the_files(smollm) -> None:
    assert (smollm.bos_token, smollm.bos_token_id) == ("<|im_start|>", 1)
    assert (smollm.eos_token, smollm.eos_token_id) == ("<|im_end|>", 2)
    assert (smollm.pad_token_id, smollm.unk_token_id) == (2, 0)
    assert smollm.model_max_length == 8192
    assert len(smollm) == smollm.vocab_size == 49152
    assert smollm("hi")["input_ids"] == smollm("hi", add_special_tokens=False)["input_ids"]  # no bos is added
    assert list(smollm("hi")) == ["input_ids", "attention_mask"]


def test_smollm2_chat_template_makes_the_special_tokens(smollm) -> None:
    ids = smollm.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert smollm.decode(ids).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert ids.count(2) == 3


def test_special_tokens_are_skipped_in_decoding_only_if_asked(smollm) -> None:
    ids = smollm.encode("<|im_start|>hello<|im_end|>")
    assert smollm.decode(ids, skip_special_tokens=True) == "hello"


@pytest.mark.parametrize("pre", sorted(gguf_tokenizer.SPLITS))
def test_every_byte_level_kind_equals_llama_cpp(pre, gguf_of) -> None:
    path = gguf_of(pre=pre)
    reference, tokenizer = of_llama_cpp(path), ours(path)
    for text in TEXTS + DIGITS_AFTER_SPACES:
        if "\x00" not in text:
            assert reference(text) == tokenizer.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_byte_level_kinds_equal_transformers(pre, gguf_of) -> None:
    path = gguf_of(pre=pre, add_bos=True)
    converted, tokenizer = theirs(path), ours(path)
    for text in TEXTS + DIGITS_AFTER_SPACES:
        assert converted.encode(text) == tokenizer.encode(text), text
        assert tokenizer.encode(text)[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_equals_llama_cpp(prefix, gguf_of) -> None:
    path = gguf_of(**spm(space_prefix=prefix))
    reference, tokenizer = of_llama_cpp(path), ours(path)
    for text in [*TEXTS, "hello hello", "  hello", "</s>hello<tool>world", "hellohello."]:
        if text and "\x00" not in text:
            assert reference(text) == tokenizer.encode(text, add_special_tokens=False), text


def test_sentencepiece_equals_transformers_without_leading_space(gguf_of) -> None:
    path = gguf_of(**spm(space_prefix=True))
    converted, tokenizer = theirs(path), ours(path)
    for text in TEXTS:
        if not text.startswith((" ", SPACE_A)) and "<" not in text:
            assert converted.encode(text) == tokenizer.encode(text), text


def test_gemma_tokenizer_equals_transformers(gguf_of) -> None:
    spaces = {"tokens": [*SPM, "  ", "   "], "types": [*SPM_TYPES, 4, 4], "scores": [*SPM_SCORES, -1e3, -1e3]}
    path = gguf_of("gemma3", **spm(**spaces, space_prefix=False))
    converted, tokenizer = theirs(path), ours(path)
    for text in TEXTS:
        assert converted.encode(text) == tokenizer.encode(text), text


def spm(**more):
    return {
        "tokenizer_model": "llama",
        "pre": "default",
        "tokens": SPM,
        "types": SPM_TYPES,
        "scores": SPM_SCORES,
    } | more


@pytest.mark.parametrize("kind", ["smollm", "llama-bpe", "sentencepiece"])
def test_saved_tokenizer_is_reloaded_with_the_same_ids(kind, gguf_of, tmp_path) -> None:
    tokenizer = ours(gguf_of(**(spm() if kind == "sentencepiece" else {"pre": kind})))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.model_max_length == again.model_max_length == 256
    assert tokenizer.special_tokens_map == again.special_tokens_map
    assert tokenizer.chat_template == again.chat_template
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == again.encode(text), text
        assert tokenizer.decode(ids) == again.decode(ids)


@pytest.mark.parametrize(("stated", "expected"), [(None, [1]), (True, [1]), (False, [])])
def test_bos_follows_the_file_and_else_llama_cpps_default(stated, expected, gguf_of) -> None:
    more = {} if stated is None else {"add_bos": stated}
    assert expected == ours(gguf_of(pre="llama-bpe", **more)).encode("")
    assert expected == ours(gguf_of(**spm(), **more)).encode("")
    assert ([1] if stated else []) == ours(gguf_of(pre="qwen2", **more)).encode("")


def test_unknown_kind_is_left_to_transformers_with_a_note(gguf_of, caplog) -> None:
    loaded = load(spec.read(str(gguf_of(pre="bloom"))), torch.float32)
    assert "the tokenizer is read by transformers' own GGUF converter" in caplog.text
    assert (loaded.tokenizer.model_max_length, loaded.tokenizer.eos_token_id) == (256, 2)


def test_merge_of_unknown_tokens_is_refused(gguf_of) -> None:
    with pytest.raises(ModelError, match="holds a tokenizer that contradicts itself"):
        ours(gguf_of(merges=["no such"]))


def test_tokens_that_stand_twice_are_refused(gguf_of) -> None:
    with pytest.raises(ModelError, match="contradicts itself: 3 tokens, of which 2 differ"):
        ours(gguf_of(tokens=["a", "a", "b"], types=[1, 1, 1], merges=["a b"]))
