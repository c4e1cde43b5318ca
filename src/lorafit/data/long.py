"""Texts too long to be tokenised in one piece: a tokenizer takes a hundred bytes and more for each of their characters.

Of a conversation only its beginning is trained on, as far as --seq-len reaches; the rest is counted. Running text is
tokenised in windows that overlap, and cut where two neighbours have a token that begins at the same character.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lorafit.data.tokenise import Tokeniser

WINDOW_CHARS = 1 << 20
# Windows share so many characters: far more than what decides where a token ends.
OVERLAP_CHARS = 1 << 12
WINDOWS_AT_ONCE = 4
# A row is looked at up to so many characters for each token of --seq-len, and so many at least. Only texts like long
# runs of spaces have fewer tokens, and those are refused.
CHARS_PER_TOKEN, LEAST_CHARS = 64, 1 << 16


def reach(seq_len: int) -> int:
    """How many characters of a conversation are tokenised, where seq_len tokens are kept of it."""
    return max(LEAST_CHARS, CHARS_PER_TOKEN * seq_len)


def is_long(text: str) -> bool:
    """Whether it is more than one window."""
    return len(text) > WINDOW_CHARS


def count_tokens(text: str, tokeniser: Tokeniser) -> int:
    """How many tokens a text has, up to one for each window."""
    windows = [text[first : first + WINDOW_CHARS] for first in range(0, len(text), WINDOW_CHARS)]
    lots = (windows[first : first + WINDOWS_AT_ONCE] for first in range(0, len(windows), WINDOWS_AT_ONCE))
    return sum(len(ids) for lot in lots for ids in tokeniser.ids(lot))


def ids_of(text: str, tokeniser: Tokeniser) -> NDArray[np.int32]:
    """The tokens of a long text: (tokens,)."""
    parts: list[NDArray[np.int32]] = []
    ids, starts = np.zeros(0, np.int32), np.zeros(0, np.int64)  # of the window before, not yet handed out
    for first, new_ids, new_starts in _windows(text, tokeniser):
        cut = _meeting(starts, new_starts, first)
        parts.append(ids[: np.searchsorted(starts, cut)])
        kept = np.searchsorted(new_starts, cut)
        ids, starts = new_ids[kept:], new_starts[kept:]
    return np.concatenate([*parts, ids])


def _windows(text: str, tokeniser: Tokeniser) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.int64]]]:
    """(first character, ids, the character that each begins with) of one window after the other."""
    firsts = range(0, max(1, len(text) - OVERLAP_CHARS), WINDOW_CHARS - OVERLAP_CHARS)
    for lot in range(0, len(firsts), WINDOWS_AT_ONCE):
        own = firsts[lot : lot + WINDOWS_AT_ONCE]
        found = tokeniser.whole([text[first : first + WINDOW_CHARS] for first in own])
        for first, window in zip(own, found, strict=True):
            starts = np.array([start for start, _ in window.encoding.offsets], dtype=np.int64)
            yield first, np.array(window.ids, dtype=np.int32), first + starts


def _meeting(before: NDArray[np.int64], after: NDArray[np.int64], first: int) -> int:
    """A character at which both windows begin a token, as near to the middle of what they share as there is one.

    first: the character that the second begins with. Where there is none, the middle itself: a token there may differ
    from what it would be in one piece.
    """
    middle = first + OVERLAP_CHARS // 2
    both = np.intersect1d(before[before > first], after)
    if not len(before):
        return first
    return int(both[np.argmin(np.abs(both - middle))]) if len(both) else middle
