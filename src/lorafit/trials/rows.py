"""The rows of many runs, split once and for all of them alike, into files of one directory.

train: what every run learns, in one order. valid: rows that something is chosen by. search: the part of them that
learning rates are chosen by. test: rows that nothing is chosen by.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lorafit import files
from lorafit.config import TrialsConfig
from lorafit.data.example import Example, Labelled
from lorafit.data.formats import FormatReader
from lorafit.data.load import Located, Source, locate
from lorafit.data.rows import Row
from lorafit.data.split import DIGEST, digest, held_out, label_of, share_of
from lorafit.errors import DataError

# What should not be forgotten, where nothing else is given.
KEEP = Path(__file__).parent / "keep.txt"
TEST_SHARE, VALID_SHARE = 0.2, 0.2
# More validation rows than these tell little more, and cost time in every trial.
MOST_VALID = 200
# Fewer unseen rows than these leave wide intervals.
FEW_ROWS = 50
# Of fewer texts than these, each is cut into parts of about so many characters.
FEW_TEXTS, PART_CHARS = 20, 1000


@dataclass(frozen=True)
class Rows:
    """Where the rows of each side are, how many each has, what should be known of them, and where each came from.

    as_given: whether those to train on and those to judge by are what the user named, nothing split and nothing cut.
    """

    directory: Path
    counts: dict[str, int]
    notes: list[str]
    origins: dict[str, list[str]]
    as_given: bool = False

    def path(self, side: str) -> str:
        """The file of a side."""
        return str(self.directory / f"{side}.jsonl")

    def given(self, side: str, origin: str) -> str:
        """Where a row of a side's file stands in what the user gave. origin: FILE:LINE of the former."""
        return self.origins[side][int(origin.rpartition(":")[2]) - 1]


def split_in_three(config: TrialsConfig, directory: Path) -> Rows:
    """Train, valid and test, which --eval says. Writes each side to `directory`. Raises DataError, ConfigError."""
    located = locate(config.data)
    train = _read(located.train(), config)
    share = _share(config.eval)
    if config.eval and share is None:
        test = _read(locate(config.eval).unseen(), config)
    elif share is None and "test" in located.sides:
        test = _read(located.sides["test"], config)
    else:
        train, test = _divide(train, share or TEST_SHARE, config)
    train, valid = _held_out(train, located, config)
    return _written({"train": train, "search": valid[::2], "valid": valid, "test": test}, "test", directory)


def split_in_two(config: TrialsConfig, directory: Path) -> Rows:
    """Train and valid, which --eval says. Writes each side to `directory`. Raises DataError, ConfigError."""
    located = locate(config.data)
    train = _read(located.train(), config)
    share, as_given = _share(config.eval), False
    if share is not None:
        train, valid = _divide(train, share, config)
    elif config.eval:
        valid = _read(locate(config.eval).unseen(), config)
        as_given = not any(len({row.origin for row in rows}) < len(rows) for rows in (train, valid))
    else:
        train, valid = _held_out(train, located, config)
    return replace(_written({"train": train, "valid": valid}, "valid", directory), as_given=as_given)


def _held_out(train: list[Row], located: Located, config: TrialsConfig) -> tuple[list[Row], list[Row]]:
    """What stays, and what is chosen by: DATA's own valid file, else some of the training rows."""
    own = located.held_out()
    if own is None:
        return _divide(train, min(VALID_SHARE, MOST_VALID / len(train)), config)
    valid = _read(own, config)
    return train, valid[:: math.ceil(len(valid) / MOST_VALID)]


def _written(sides: dict[str, list[Row]], told_by: str, directory: Path) -> Rows:
    """told_by: the side that the result rests on."""
    for name, rows in sides.items():
        _write(directory / f"{name}.jsonl", rows)
    counts = {name: len(rows) for name, rows in sides.items()}
    origins = {name: [row.origin for row in rows] for name, rows in sides.items()}
    return Rows(directory, counts, _notes(sides["train"], sides[told_by], told_by), origins)


def _read(source: Source, config: TrialsConfig) -> list[Row]:
    """All rows; each is looked at here, where its file and line are known. Raises DataError."""
    rows, reader = list(source.rows()), FormatReader(config.format, config.rename)
    for row in rows:
        reader.read(row)
    if reader.format != "text" or len(rows) >= FEW_TEXTS:
        return rows
    column = next((old for old, new in config.rename.items() if new == "text"), "text")
    return [Row(row.record | {column: part}, row.origin) for row in rows for part in _in_parts(row.record[column])]


def _in_parts(text: str) -> Iterator[str]:
    """A long text, cut at ends of lines, so that there is something to split and to draw from; none is blank."""
    own = ""
    for line in text.splitlines(keepends=True):
        own += line
        if len(own) >= PART_CHARS and own.strip():
            yield own
            own = ""
    if own.strip():
        yield own


def _share(text: str | None) -> float | None:
    return share_of(text) if text and text.endswith("%") else None


def _divide(rows: list[Row], share: float, config: TrialsConfig) -> tuple[list[Row], list[Row]]:
    """What stays, and what is held out; equal rows on one side, labels in proportion, each among those that stay.

    Raises DataError where none can be held out.
    """
    numbers, reader = dict[str, int](), FormatReader(config.format, config.rename)
    examples = [reader.read(row) for row in rows]
    told = [_labels(example, row) for example, row in zip(examples, rows, strict=True)]
    labels = [numbers.setdefault(own[0], len(numbers)) if len(own) == 1 else -1 for own in told]
    held = held_out(_digests(rows), np.array(labels, dtype=np.int32), share, config.seed)
    if isinstance(examples[0], Labelled):  # what no method could learn tells none from another
        known = {label for own, is_held in zip(told, held, strict=True) if not is_held for label in own}
        held &= [set(own) <= known for own in told]
    if not held.any():
        what = f"no row of {config.data} can be held out: those that were drawn are the only ones with their label"
        raise DataError(what, "Give rows to judge by with --eval FILE")
    pairs = list(zip(rows, held, strict=True))
    return [row for row, is_held in pairs if not is_held], [row for row, is_held in pairs if is_held]


def _labels(example: Example, row: Row) -> tuple[str, ...]:
    if isinstance(example, Labelled):
        return example.labels
    label = label_of(row.record)
    return () if label is None else (label,)


def _digests(rows: Sequence[Row]) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    return np.frombuffer(b"".join(digest(row.record) for row in rows), DIGEST)


def _notes(train: list[Row], unseen: list[Row], side: str) -> list[str]:
    notes = []
    if len(unseen) < FEW_ROWS:
        few = f"there is 1 {side} row" if len(unseen) == 1 else f"there are {len(unseen)} {side} rows"
        notes.append(f"{few}: only large differences can be seen")
    again = int(np.isin(_digests(unseen), _digests(train)).sum())
    if again:
        notes.append(f"{again} of {len(unseen)} {side} rows are among the training rows too: every run is flattered")
    return notes


def _write(path: Path, rows: list[Row]) -> None:
    try:
        lines = [json.dumps(row.record, ensure_ascii=False) + "\n" for row in rows]
    except TypeError as error:
        raise DataError(
            f"{rows[0].origin}: a column holds what JSON has not: {error}", "Leave that column out of the file"
        ) from None
    files.write_atomic(path, "".join(lines).encode(errors="surrogatepass"))
