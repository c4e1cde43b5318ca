"""Tokens that the user adds to a tokenizer."""

from __future__ import annotations

import pytest

from lorafit.data.added import add_tokens, told
from lorafit.errors import ConfigError
from tests import tiny


def test_a_new_token_is_one_token_wherever_it_stands_and_stays_in_decoded_text() -> None:
    tokenizer = tiny.tokenizer()
    added = add_tokens(tokenizer, ["<call>", "two words", "a"])
    assert [token.id for token in added] == [258, 259, tokenizer.get_vocab()["a"]]
    assert [token.is_new for token in added] == [True, True, False]
    assert len(added[0].pieces) == 6 and added[2].pieces == ()
    ids = tokenizer("x<call>y <call>two words").input_ids
    assert ids.count(258) == 2 and ids.count(259) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x<call>y <call>two words"


def test_a_text_that_is_the_name_of_another_token_is_refused() -> None:
    assert "ü" in tiny.tokenizer().get_vocab()  # the byte 0xFC
    with pytest.raises(ConfigError, match="is this tokenizer's name of another token"):
        add_tokens(tiny.tokenizer(), ["ü"])


def test_a_text_that_would_be_decoded_otherwise_is_refused() -> None:
    with pytest.raises(ConfigError, match="would write 'é!' as"):
        add_tokens(tiny.tokenizer(), ["é!"])


def test_what_was_added_is_told_with_what_was_known() -> None:
    line = told(add_tokens(tiny.tokenizer(), ["<call>", "a"]), new_rows=1)
    assert line.startswith("1 tokens added, a known already: <call> (258), a (")
    assert line.endswith("; the embeddings grew by 1 rows")


@pytest.mark.parametrize("texts", [["a", "a"], [" "], ["x", ""]])
def test_empty_and_doubled_tokens_are_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="names an empty token, or one twice"):
        add_tokens(tiny.tokenizer(), texts)
