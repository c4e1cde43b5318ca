"""Tokens that the user adds: what the tokenizer makes of them from now on, and what it made of them before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.errors import ConfigError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One token of the user's. pieces: the tokens that its text was before; none where it was a token already."""

    text: str
    id: int
    pieces: tuple[int, ...]

    @property
    def is_new(self) -> bool:
        """Whether the tokenizer did not know it."""
        return bool(self.pieces)


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[AddedToken]:
    """Let each text be one token, wherever it stands. Those that are one already stay what they are.

    They are no special tokens: they stay in decoded text. Raises ConfigError for a text that cannot be a token.
    """
    from tokenizers import AddedToken as Added

    wrong = [text for text in texts if not text.strip()]
    if wrong or len(set(texts)) < len(texts):
        raise ConfigError(
            f"--add-tokens {','.join(texts)!r} names an empty token, or one twice", "Give each text once: '<a>,<b>'"
        )
    pieces = {text: tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts}
    known = {text for text in texts if len(pieces[text]) == 1 and tokenizer.decode(list(pieces[text])) == text}
    new = [text for text in texts if text not in known]
    for text in new:
        if text in tokenizer.get_vocab():  # a byte-level tokenizer calls its byte 0xFC "\u00fc"
            raise ConfigError(
                f"--add-tokens: {text!r} is this tokenizer's name of another token", "Choose another text"
            )
    tokenizer.add_tokens([Added(text, normalized=False, special=False) for text in new])
    vocabulary = tokenizer.get_vocab()
    for text in new:  # a byte-level decoder takes the letters of an added token for names of bytes
        written = tokenizer.decode([vocabulary[text]])
        if written != text:
            raise ConfigError(f"--add-tokens: this tokenizer would write {text!r} as {written!r}", "Use ASCII letters")
    return [
        AddedToken(text, pieces[text][0], ()) if text in known else AddedToken(text, vocabulary[text], pieces[text])
        for text in texts
    ]


def told(tokens: Sequence[AddedToken], new_rows: int) -> str:
    """One line for the screen. new_rows: by how many the embeddings grew."""
    known = [token.text for token in tokens if not token.is_new]
    parts = [f"{len(tokens) - len(known)} tokens added"]
    if known:
        parts.append(f"{listed(known)} known already")
    grown = f"; the embeddings grew by {new_rows} rows" if new_rows else ""
    return f"{', '.join(parts)}: {listed([f'{token.text} ({token.id})' for token in tokens])}{grown}"
