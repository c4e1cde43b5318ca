"""Texts -> token ids, and which token begins at which character: the tokenizer's own batch encoder, in all its threads.

Asking it for every token's offsets as Python objects would take as long as tokenising; a few are asked for here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lorafit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters at the end of a prompt in which its last added token is looked for.
TAIL_CHARS = 400
# So many prompts are tokenised whole as well, to see that their ends alone say as much.
CHECKED = 64
# A character that no token covers (a space that a tokenizer drops) is passed over; more than so many are not.
GAP = 64


class Text(Protocol):
    """A tokenised text."""

    @property
    def ids(self) -> list[int]:
        """Its tokens."""

    def start(self, number: int) -> int:
        """The character with which token `number` begins."""

    def token_at(self, char: int) -> int:
        """The first token at or behind a character; the number of tokens where there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A text that was tokenised in one piece. encoding: of the library `tokenizers`."""

    ids: list[int]
    encoding: Any

    def start(self, number: int) -> int:
        """The character with which token `number` begins."""
        return int(self.encoding.token_to_chars(number)[0])

    def token_at(self, char: int) -> int:
        """The first token at or behind a character; the number of tokens where there is none."""
        for at in range(char, char + GAP):
            number = self.encoding.char_to_token(at)
            if number is not None:
                return int(number)
        starts = [start for start, _ in self.encoding.offsets]
        return next((number for number, start in enumerate(starts) if start >= char), len(self.ids))


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """A text that was tokenised in two pieces. cut: the character with which the second begins."""

    ids: list[int]
    first: Whole
    second: Whole
    cut: int

    def start(self, number: int) -> int:
        """The character with which token `number` begins."""
        before = len(self.first.ids)
        return self.first.start(number) if number < before else self.cut + self.second.start(number - before)

    def token_at(self, char: int) -> int:
        """The first token at or behind a character; the number of tokens where there is none."""
        if char < self.cut:
            return self.first.token_at(char)
        return len(self.first.ids) + self.second.token_at(char - self.cut)


class Tokeniser:
    """The batch encoder of a fast tokenizer, without truncation, padding or special tokens of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ModelError for a tokenizer that has no fast version."""
        if not tokenizer.is_fast:
            raise ModelError("this tokenizer has no fast version, so it cannot tell which token is which text")
        self.backend: Any = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        added = sorted({token.content for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._tails: dict[str, list[int]] = {}
        self._checked, self._ends_suffice = 0, True

    def whole(self, texts: Sequence[str]) -> list[Whole]:
        """Each text in one piece."""
        return [Whole(encoding.ids, encoding) for encoding in self._encoded(texts)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids alone, which is faster."""
        encode = getattr(self.backend, "encode_batch_fast", self.backend.encode_batch)
        return [encoding.ids for encoding in encode(list(texts), add_special_tokens=False)] if texts else []

    def joined(self, text: str, cut: int) -> Joined:
        """A text in two pieces, tokenised apart."""
        first, second = self.whole([text[:cut], text[cut:]])
        return Joined([*first.ids, *second.ids], first, second, cut)

    def prompt_tokens(self, text: Text, prompt: str) -> int | None:
        """How many tokens a prompt has, where the text begins with exactly those; None where it does not.

        An added token parts what stands before it from what follows: nothing is merged across it. So only what follows
        the prompt's last added token has to be looked at. That this holds is checked on the first CHECKED prompts.
        """
        quick = self._by_end(text, prompt) if self._ends_suffice else None
        if quick is not None and self._checked >= CHECKED:
            return quick
        (own,) = self.ids([prompt])
        found = len(own) if text.ids[: len(own)] == own else None
        self._checked += 1
        if quick is not None and quick != found:
            self._ends_suffice = False
        return found

    def _by_end(self, text: Text, prompt: str) -> int | None:
        number = text.token_at(len(prompt))
        if number < len(text.ids) and text.start(number) < len(prompt):
            return None  # a token of both
        end = prompt[-TAIL_CHARS:]
        added = [found.start() for found in self._added.finditer(end)] if self._added else []
        if not added:
            return None
        tail = end[added[-1] :]
        if tail not in self._tails:
            (self._tails[tail],) = self.ids([tail])
        own = self._tails[tail]
        return number if len(own) <= number and text.ids[number - len(own) : number] == own else None

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        return list(self.backend.encode_batch(list(texts), add_special_tokens=False)) if texts else []
