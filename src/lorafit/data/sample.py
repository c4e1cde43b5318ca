"""Some rows of a source that may be far larger, for a plan that must not take longer than a look.

A small source is read whole. Of a large file of lines pieces are read that lie evenly in it, so that a file in some
order is seen in all its parts; how many rows it has follows from the bytes of those that were read. Anything else is
read from its beginning, for a second; of Parquet files how many rows there are stands in the files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorafit.data.load import Source
from lorafit.data.readers import parquet_rows
from lorafit.data.rows import Row
from lorafit.data.text import parse

SMALL_BYTES = 8 << 20
SECONDS = 1.0
PIECES, PIECE_BYTES = 64, 32 << 10
LINES = (".jsonl", ".ndjson")
# What is tokenised: enough that a mean over them is within a few percent.
ROWS = 512
CHARS = 2 << 20


@dataclass(frozen=True)
class Sample:
    """rows: some of a source. total: how many it has, None where that is not known. counted: whether total is exact.

    first_only: whether they are its first ones and not spread over it.
    """

    rows: list[Row]
    total: int | None
    counted: bool
    first_only: bool


def sample(source: Source) -> Sample:
    """At most ROWS rows, fewer where they are long. Raises DataError as reading the source does."""
    if source.size() > SMALL_BYTES:
        found = _of_lines(source.files) if _are_lines(source.files) else None
        if found is not None:
            return found
    rows: list[Row] = []
    ends = time.monotonic() + (SECONDS if source.size() > SMALL_BYTES else float("inf"))
    whole = True
    for row in source.rows():
        rows.append(row)
        if time.monotonic() > ends:
            whole = False
            break
    total = len(rows) if whole else _stated(source.files)
    return Sample(_some(rows), total, total is not None, not whole)


def _stated(files: tuple[Path, ...]) -> int | None:
    """How many rows the files say that they have, where they are of a type that says it."""
    if not files or any(path.suffix.lower() != ".parquet" for path in files):
        return None
    return sum(parquet_rows(path) for path in files)


def _some(rows: list[Row]) -> list[Row]:
    """Rows that lie evenly among these."""
    count = min(len(rows), ROWS)
    chosen = [rows[int(at)] for at in np.linspace(0, len(rows) - 1, count).round()] if count else []
    sizes = np.cumsum([sum(len(str(value)) for value in row.record.values()) for row in chosen])
    if count and sizes[-1] > CHARS:
        count = max(1, int(count * CHARS / sizes[-1]))
        chosen = [rows[int(at)] for at in np.linspace(0, len(rows) - 1, count).round()]
    return chosen


def _are_lines(files: tuple[Path, ...]) -> bool:
    """Whether every file is one row a line: a file that begins with `[` is an array."""
    if not files or any(path.suffix.lower() not in LINES for path in files):
        return False
    for path in files:
        with open(path, "rb") as file:
            if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
                return False
    return True


def _of_lines(files: tuple[Path, ...]) -> Sample | None:
    """From pieces of the files; None where no whole line lies in them."""
    total = sum(path.stat().st_size for path in files)
    lines = [line for path in files for line in _pieces(path, max(1, round(PIECES * path.stat().st_size / total)))]
    if not lines:
        return None
    mean = sum(len(line) for line, _ in lines) / len(lines)
    try:
        texts = [(line.decode("utf-8-sig"), origin) for line, origin in lines]
    except UnicodeDecodeError:
        return None  # another encoding, which the reader knows
    rows = [Row(parse(text.strip(), origin), origin) for text, origin in texts]
    return Sample(_some(rows), round(total / mean), counted=False, first_only=False)


def _pieces(path: Path, count: int) -> Iterator[tuple[bytes, str]]:
    """(a line, where it stands) of so many pieces of a file, whole lines alone."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        for number in range(count):
            begin = size * number // count
            file.seek(max(0, begin - 1))
            if begin and not file.readline(PIECE_BYTES).endswith(b"\n"):
                continue  # the line that stands there is longer
            left = PIECE_BYTES
            while left > 0:
                line = file.readline(left + PIECE_BYTES)
                if not line.endswith(b"\n"):
                    break
                left -= len(line)
                if line.strip():
                    yield line, f"{path.name}, near byte {begin}"
