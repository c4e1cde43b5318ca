"""Texts too long for one piece: the same tokens as in one piece, and conversations that are cut in any case."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorafit.data import long, turns
from lorafit.data.example import Chat, Completion, Message, Plain
from lorafit.data.mask import encode
from lorafit.data.tokenise import Tokeniser
from lorafit.errors import DataError

WORDS = ["The", "capital", "Paris.\n\nWhere", "is", "my", "card?", "", "Äö", "12345", "<|im_end|>", "\t", "x\n"]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "WINDOW_CHARS", 200)
    monkeypatch.setattr(long, "OVERLAP_CHARS", 60)
    monkeypatch.setattr(long, "LEAST_CHARS", 300)
    monkeypatch.setattr(long, "CHARS_PER_TOKEN", 8)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=400))
def test_windows_give_the_tokens_of_the_whole_text(words: list[str], bare: PreTrainedTokenizerFast) -> None:
    text, tokeniser = " ".join(words), Tokeniser(bare)
    assert long.ids_of(text, tokeniser).tolist() == tokeniser.ids([text])[0]


def test_windows_of_a_tokenizer_that_marks_the_beginning_of_a_text_are_joined_without_the_marks() -> None:
    vocab = {"<unk>": 0, "▁": 1, **{letter: n for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz.\n", start=2)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    tokeniser = Tokeniser(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>"))
    text = "where is my card? it is on the way.\n" * 60
    assert long.ids_of(text, tokeniser).tolist() == tokeniser.ids([text])[0]


def test_a_text_without_any_place_to_cut_is_cut_all_the_same() -> None:
    backend = Tokenizer(models.WordLevel({"x" * 10_000: 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokeniser = Tokeniser(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>"))
    assert 1 <= len(long.ids_of("y" * 1000, tokeniser)) <= 10


@given(st.text(alphabet="ab \n", max_size=1000))
@settings(max_examples=30, deadline=None)
def test_the_count_is_right_up_to_one_for_each_window(bare: PreTrainedTokenizerFast, text: str) -> None:
    tokeniser = Tokeniser(bare)
    assert abs(long.count_tokens(text, tokeniser) - len(tokeniser.ids([text])[0])) <= len(text) // 200


def test_running_text_is_split_at_seq_len_as_if_it_were_short(bare: PreTrainedTokenizerFast) -> None:
    text = "Where is my card? " * 200
    rows = encode(Plain(text, "f:1"), bare, 50)
    assert {len(row.input_ids) for row in rows[:-1]} == {50}
    joined = np.concatenate([rows[0].input_ids, *(row.input_ids[1:] for row in rows[1:])])
    assert joined.tolist() == [bare.bos_token_id, *Tokeniser(bare).ids([text])[0], bare.eos_token_id]


def chat(*turns: str) -> Chat:
    roles = ("user", "assistant")
    messages: list[Message] = [{"role": roles[k % 2], "content": turn} for k, turn in enumerate(turns)]
    return Chat(tuple(messages), "f:1")


def test_a_long_reply_is_cut_and_all_that_is_lost_is_counted(chatml: PreTrainedTokenizerFast) -> None:
    reply = "Where is my card? " * 500
    example = chat("a", reply)
    (row,) = encode(example, chatml, 40)
    (whole,) = encode(example, chatml, 1 << 20)
    assert row.input_ids.tolist() == whole.input_ids[:40].tolist()
    assert row.supervised.tolist() == whole.supervised[:40].tolist()
    windows = -(-len(reply) // long.WINDOW_CHARS)
    assert row.cut_tokens == pytest.approx(len(whole.input_ids) - 40, abs=windows + 1)  # one of each, one at the cut


def test_of_a_conversation_with_many_turns_those_that_are_cut_off_are_not_gone_through(
    chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = chat(*("yes", "no") * 400)
    rendered = 0
    render: Callable[..., str] = turns.render

    def counted(*args: object, **named: object) -> str:
        nonlocal rendered
        rendered += 1
        return render(*args, **named)

    monkeypatch.setattr(turns, "render", counted)
    (row,) = encode(example, chatml, 40)
    assert rendered < 40
    assert row.supervised.sum() > 4


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_a_prompt_that_leaves_no_room_for_a_reply_is_refused(
    kind: str, chatml: PreTrainedTokenizerFast, bare: PreTrainedTokenizerFast
) -> None:
    prompt = "Where is my card? " * 200
    example = chat(prompt, "b") if kind == "chat" else Completion(prompt, "b", "f:1")
    with pytest.raises(DataError, match=r"f:1: 3,6\d\d characters stand before the reply.*Raise --seq-len"):
        encode(example, chatml if kind == "chat" else bare, 40)


def test_a_text_of_which_many_characters_are_few_tokens_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(DataError, match=r"its first 320 characters are only \d+ tokens"):
        encode(Completion("a", " b" + " " * 1000 + "c", "f:1"), tokenizer, 40)
