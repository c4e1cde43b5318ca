"""Labelled rows: which labels there are, and a text with its label as token ids.

A row is its text with the special tokens that the tokenizer puts around it, and one cell more: the number of its label,
which the text's last token predicts. So batches are made of labelled rows as of any others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorafit.data.example import Labelled
from lorafit.data.formats import LABELLED, FormatReader, detect
from lorafit.data.load import Source
from lorafit.data.rows import Row
from lorafit.data.store import Encoded
from lorafit.errors import DataError, listed

if TYPE_CHECKING:
    from lorafit.data.mask import Marks

# Bits of a cell that are free for a set of labels: the highest is its mask, and it is read as a signed number.
MOST_OF_SEVERAL = 30


def is_labelled(source: Source, fmt: str | None, rename: Mapping[str, str]) -> bool:
    """Whether the rows are texts with a label, by --format or else by the first row's columns. Raises DataError."""
    if fmt is not None:
        return fmt in LABELLED
    for row in islice(source.rows(), 1):
        record = {rename.get(column, column): value for column, value in row.record.items()}
        return detect(record, row.origin) in LABELLED
    return False


@dataclass(frozen=True)
class Names:
    """Labels, sorted. several: whether a row may have any number of them: at least one row has a list."""

    names: tuple[str, ...]
    several: bool = False

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Names:
        """What `dataclasses.asdict` made of it, and JSON of that."""
        return cls(**{**told, "names": tuple(told["names"])})


def names_of(rows: Iterable[Row], fmt: str | None, rename: Mapping[str, str], skip_bad: bool) -> Names:
    """Every label of the rows: by number where all are whole numbers, else as text.

    Raises DataError for fewer than two, for more than a row's set can hold, and for a row that cannot be used where
    those are not skipped.
    """
    reader, found, several = FormatReader(fmt, rename), set[str](), False
    for row in rows:
        try:
            example = reader.read(row)
            if isinstance(example, Labelled):
                found.update(example.labels)
                several = several or example.several
        except DataError:
            if not skip_bad:
                raise
    if len(found) < 2:
        raise DataError(f"the rows have {len(found)} label ({listed(found)})", "Give rows of two labels at least")
    if several and len(found) > MOST_OF_SEVERAL:
        raise DataError(
            f"rows have lists of labels, of {len(found)} in all; at most {MOST_OF_SEVERAL} are told side by side",
            "Leave out rare labels, or train one run for each group of them",
        )
    whole = all(name.lstrip("-").isdecimal() for name in found)
    return Names(tuple(sorted(found, key=int) if whole else sorted(found)), several)


def number_of(example: Labelled, names: Mapping[str, int], several: bool) -> int:
    """The number of a row's label; where it may have several, of its set: bit k for label k.

    names: those there are, with their numbers. Raises DataError for another, and for a list where there is to be one.
    """
    if example.several and not several:
        raise DataError(f"{example.origin} has a list of labels, and a row is to have one", "Write one label a row")
    numbers = [_number(label, example.origin, names) for label in set(example.labels)]
    return sum(1 << number for number in numbers) if several else numbers[0]


def members(number: int, told: Names) -> list[str]:
    """What `number_of` stands for: the label, or those of the set."""
    if not told.several:
        return [told.names[number]]
    return [name for k, name in enumerate(told.names) if number >> k & 1]


def _number(label: str, origin: str, names: Mapping[str, int]) -> int:
    if label not in names:
        raise DataError(
            f"{origin} has the label {label!r}, which is none of the {len(names)} of the training rows: "
            f"{listed(names, 6)}",
            "Remove the row, or train with rows of that label",
        )
    return names[label]


def with_label(ids: Sequence[int] | NDArray[np.int32], label: int, marks: Marks, origin: str, row: int) -> Encoded:
    """A text's tokens with those that the tokenizer puts around it, and its label as the token that is predicted.

    A tokenizer that puts nothing behind a text ends it with its end-of-sequence token, if it has one: what comes last
    speaks for the whole text, and is then the same token everywhere.
    """
    whole = np.array([*marks.bos, *ids, *marks.closing, label], dtype=np.int32)
    return Encoded(whole, np.arange(len(whole)) == len(whole) - 1, len(whole) - 1, origin, row=row)


def fit_label(row: Encoded, seq_len: int, marks: Marks) -> Encoded:
    """The row with at most seq_len tokens before its label: cut at the end of its text, before the closing tokens."""
    closing = len(marks.closing)
    over = len(row.input_ids) - 1 - seq_len
    if over <= 0:
        return row
    if seq_len - closing <= len(marks.bos):
        raise DataError(f"{row.origin}: nothing of the text is left at --seq-len {seq_len}", "Raise --seq-len")
    kept = np.concatenate([row.input_ids[: seq_len - closing], row.input_ids[-1 - closing :]])
    supervised = np.arange(len(kept)) == len(kept) - 1
    return replace(
        row, input_ids=kept, supervised=supervised, prompt_length=len(kept) - 1, cut_tokens=row.cut_tokens + over
    )
