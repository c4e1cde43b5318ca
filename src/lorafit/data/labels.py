"""Labelled rows: which labels there are, and a text with its label as token ids.

A row is its text with the special tokens that the tokenizer puts around it, and one cell more: the number of its label,
which the text's last token predicts. So batches are made of labelled rows as of any others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorafit.data.example import Example, Labelled, Tagged
from lorafit.data.formats import LABELLED, NUMBERED, TAGGED, FormatReader, detect
from lorafit.data.load import Source
from lorafit.data.rows import Row
from lorafit.data.store import Encoded
from lorafit.errors import DataError, listed
from lorafit.units import format_count

if TYPE_CHECKING:
    from lorafit.data.mask import Marks
    from lorafit.data.tokenise import Whole

# Formats that a task tries first: their columns may be those of others as well.
FIRST = {"regress": (*LABELLED, *NUMBERED)}
# Bits of a cell that are free for a set of labels: the highest is its mask, and it is read as a signed number.
MOST_OF_SEVERAL = 30


def task_of(source: Source, fmt: str | None, rename: Mapping[str, str], wanted: str = "auto") -> str:
    """generate, classify, regress or tag: `wanted`, else what the first row's columns are for. Raises DataError.

    Numbers are predicted where the first label is one with a point, and of other columns where that is wanted: a
    `score` beside a text says as a rule how good the text is to learn from.
    """
    if wanted != "auto":
        return wanted
    for row in islice(source.rows(), 1):
        record = {rename.get(column, column): value for column, value in row.record.items()}
        name = fmt or detect(record, row.origin)
        if name in NUMBERED or (name in LABELLED and isinstance(record.get("label", record.get("labels")), float)):
            return "regress"
        return "classify" if name in LABELLED else "tag" if name in TAGGED else "generate"
    return "generate"


@dataclass(frozen=True)
class Names:
    """What rows are labelled with. task: classify, regress or tag. names: labels, or tags, sorted; of numbers one.

    several: whether a row may have any number of labels: at least one row has a list. mean, deviation: of numbers.
    """

    names: tuple[str, ...]
    several: bool = False
    task: str = "classify"
    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Names:
        """What `dataclasses.asdict` made of it, or of what says more, and JSON of that."""
        own = {field.name: told[field.name] for field in fields(cls)}
        return cls(**{**own, "names": tuple(told["names"])})

    @property
    def counted(self) -> str:
        """How many there are, for people."""
        if self.task == "regress":
            return f"numbers to be predicted: mean {self.mean:.4g}, deviation {self.deviation:.4g}"
        return f"{format_count(len(self.names))} {'tags' if self.task == 'tag' else 'labels'}"


def reader_of(fmt: str | None, rename: Mapping[str, str], task: str) -> FormatReader:
    """A reader of rows for a task, which says what their columns are where those could be of several."""
    return FormatReader(fmt, rename, FIRST.get(task, ()))


def names_of(
    rows: Iterable[Row], fmt: str | None, rename: Mapping[str, str], skip_bad: bool, task: str = "classify"
) -> Names:
    """Every label of the rows: by number where all are whole numbers, else as text; of numbers mean and deviation.

    Raises DataError for fewer than two, for more than a row's set can hold, and for a row that cannot be used where
    those are not skipped.
    """
    reader, found = reader_of(fmt, rename, task), _Found(task)
    for row in rows:
        try:
            found.add(reader.read(row))
        except DataError:
            if not skip_bad:
                raise
    return found.names()


class _Found:
    """What rows are labelled with, as they come. Numbers by Welford 1962."""

    def __init__(self, task: str) -> None:
        self.task, self.labels, self.several = task, set[str](), False
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, example: Example) -> None:
        """Raises DataError for a row of another task."""
        if self.task == "regress":
            value = value_of(example)
            self.count += 1
            off = value - self.mean
            self.mean += off / self.count
            self.squares += off * (value - self.mean)
        elif self.task == "tag":
            self.labels.update(tagged(example).tags)
        else:
            one = labelled(example)
            self.labels.update(one.labels)
            self.several = self.several or one.several

    def names(self) -> Names:
        """Raises DataError as `names_of` does."""
        if self.task == "regress":
            return self._numbers()
        found = self.labels
        if len(found) < 2:
            what = "tag" if self.task == "tag" else "label"
            raise DataError(
                f"the rows have {len(found)} {what} ({listed(found)})", f"Give rows of two {what}s at least"
            )
        if self.several and len(found) > MOST_OF_SEVERAL:
            raise DataError(
                f"rows have lists of labels, of {len(found)} in all; at most {MOST_OF_SEVERAL} are told side by side",
                "Leave out rare labels, or train one run for each group of them",
            )
        whole = all(name.lstrip("-").isdecimal() for name in found)
        return Names(tuple(sorted(found, key=int) if whole else sorted(found)), self.several, self.task)

    def _numbers(self) -> Names:
        if self.count < 2 or self.squares == 0:
            raise DataError(
                f"the rows have {self.count} numbers, none of which differs from another", "Give rows of two at least"
            )
        return Names(("number",), task="regress", mean=self.mean, deviation=math.sqrt(self.squares / self.count))


def labelled(example: Example) -> Labelled:
    """A text with labels. Raises DataError for anything else."""
    if not isinstance(example, Labelled):
        raise DataError(
            f"{example.origin} has no label, and these rows are for a model that tells labels apart",
            "Give rows with text and label",
        )
    if not example.labels and not example.several:
        raise DataError(
            f"{example.origin}: label is {example.number!r}, not a string or a whole number",
            "Write a name, or give --task regress to predict numbers",
        )
    return example


def tagged(example: Example) -> Tagged:
    """Words with tags. Raises DataError for anything else."""
    if not isinstance(example, Tagged):
        raise DataError(
            f"{example.origin} has no tags, and these rows are for a model that tags words",
            "Give rows with tokens and tags, two lists",
        )
    return example


def value_of(example: Example) -> float:
    """The number of a row, which in CSV is a string. Raises DataError where there is none."""
    if isinstance(example, Labelled) and not example.several:
        if example.number is not None:
            return example.number
        with suppress(ValueError):
            found = float(example.labels[0])
            if math.isfinite(found):
                return found
    raise DataError(
        f"{example.origin} has no number, and these rows are for a model that predicts one",
        "Give rows with text and a number as label, score or value",
    )


def target_of(example: Example, names: Mapping[str, int], told: Names) -> tuple[int, ...]:
    """What a row's cells say: the number of its label, of its set of labels, of each word's tag, or a number's bits.

    names: those there are, with their numbers. Raises DataError for another label, or a row of another task.
    """
    if told.task == "regress":
        return (bits_of((value_of(example) - told.mean) / told.deviation),)
    if told.task == "tag":
        return tuple(_number(tag, example.origin, names, "tag") for tag in tagged(example).tags)
    return (number_of(labelled(example), names, told.several),)


def bits_of(value: float) -> int:
    """A number in the 31 bits of a cell: a float32 without the last bit of its mantissa, off by 2^-23 of it at most."""
    return int(np.array(value, dtype=np.float32).view(np.uint32)) >> 1


def value_in(cell: int) -> float:
    """The number that `bits_of` made a cell of."""
    return float(np.array(cell << 1, dtype=np.uint32).view(np.float32))


def number_of(example: Labelled, names: Mapping[str, int], several: bool) -> int:
    """The number of a row's label; where it may have several, of its set: bit k for label k.

    names: those there are, with their numbers. Raises DataError for another, and for a list where there is to be one.
    """
    if example.several and not several:
        raise DataError(f"{example.origin} has a list of labels, and a row is to have one", "Write one label a row")
    numbers = [_number(label, example.origin, names) for label in set(example.labels)]
    return sum(1 << number for number in numbers) if several else numbers[0]


def members(number: int, told: Names) -> list[str]:
    """What a cell of `target_of` stands for: the label, the tag, the number, or the labels of the set."""
    if told.task == "regress":
        return [f"{told.mean + told.deviation * value_in(number):.6g}"]
    if not told.several:
        return [told.names[number]]
    return [name for k, name in enumerate(told.names) if number >> k & 1]


def _number(label: str, origin: str, names: Mapping[str, int], what: str = "label") -> int:
    if label not in names:
        raise DataError(
            f"{origin} has the {what} {label!r}, which is none of the {len(names)} of the training rows: "
            f"{listed(names, 6)}",
            f"Remove the row, or train with rows of that {what}",
        )
    return names[label]


def with_label(ids: Sequence[int] | NDArray[np.int32], label: int, marks: Marks, origin: str, row: int) -> Encoded:
    """A text's tokens with those that the tokenizer puts around it, and its label as the token that is predicted.

    A tokenizer that puts nothing behind a text ends it with its end-of-sequence token, if it has one: what comes last
    speaks for the whole text, and is then the same token everywhere.
    """
    whole = np.array([*marks.bos, *ids, *marks.closing, label], dtype=np.int32)
    return Encoded(whole, np.arange(len(whole)) == len(whole) - 1, len(whole) - 1, origin, row=row)


def with_tags(text: Whole, starts: Sequence[int], tags: Sequence[int], marks: Marks, origin: str, row: int) -> Encoded:
    """A text's tokens with those that the tokenizer puts around it; behind the first of each word a cell with its tag.

    starts: the character that each word begins with. Those cells are no input: a token predicts the one behind it. A
    word that begins with no token of its own has none.
    """
    cells, supervised = [*marks.bos], [False] * len(marks.bos)
    at = dict[int, int]()
    for start, tag in zip(starts, tags, strict=True):
        at.setdefault(text.token_at(start), tag)
    for number, token in enumerate(text.ids):
        cells.append(token)
        supervised.append(False)
        if number in at:
            cells.append(at[number])
            supervised.append(True)
    cells += marks.closing
    supervised += [False] * len(marks.closing)
    return Encoded(np.array(cells, dtype=np.int32), np.array(supervised), 0, origin, row=row)


def fit_tags(row: Encoded, seq_len: int, marks: Marks) -> Encoded:
    """The row with at most seq_len tokens beside its tags: cut at the end of its text, before the closing tokens."""
    closing, over = len(marks.closing), int((~row.supervised).sum()) - seq_len
    if over <= 0:
        return row
    own = slice(0, len(row.input_ids) - closing)
    kept = np.cumsum(~row.supervised[own]) <= seq_len - closing
    if not row.supervised[own][kept].any():
        raise DataError(f"{row.origin}: nothing of the text is left at --seq-len {seq_len}", "Raise --seq-len")
    end = len(row.input_ids) - closing
    ids, supervised = (np.concatenate([part[own][kept], part[end:]]) for part in (row.input_ids, row.supervised))
    return replace(row, input_ids=ids, supervised=supervised, cut_tokens=row.cut_tokens + over)


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
