"""One data file -> rows, one after the other: what is in memory is a row, or a batch of a table, never the file.

A new type of file is one function and one line in READERS. Nothing here knows what the columns mean.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from lorafit.data.rows import Row
from lorafit.data.text import SHOWN_CHARS, JSONTexts, numbered_lines, parse, shown
from lorafit.errors import DataError, listed

# A text file is one text. Beyond so many characters it is cut at the end of a line: it is never whole in memory.
TEXT_CHARS = 16 << 20
TABLE_ROWS = 1024  # of a columnar file, decoded at a time
# Where one object holds the rows, it is under one of these keys.
HOLDERS = ("data", "rows", "examples", "instances", "train")

Reader = Callable[[BufferedReader, str], Iterator[Row]]


def read_jsonl(file: BufferedReader, name: str) -> Iterator[Row]:
    """JSON Lines; a file that begins with `[` is read as the JSON array that it is. Raises DataError."""
    if file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from read_json(file, name)
        return
    for number, line in numbered_lines(file, name):
        text = line.strip(" \t\r\n\v\f")
        if text:
            origin = f"{name}:{number}"
            yield Row(parse(text, origin), origin)


def read_json(file: BufferedReader, name: str) -> Iterator[Row]:
    """A JSON array of objects, objects one after the other, or one object that holds the rows. Raises DataError."""
    texts = JSONTexts(file, name)
    if texts.peek() == "[":
        for number, value in enumerate(texts.items()):
            yield Row(_object(value, f"{name}[{number}]"), f"{name}[{number}]")
        return
    values = texts.values()
    first = next(values, None)
    if first is None:
        return
    record = _object(first, f"{name}[0]")
    second = next(values, None)
    held = _held(record) if second is None else None
    if held:
        yield from (Row(_object(item, f"{name}[{at}]"), f"{name}[{at}]") for at, item in enumerate(held))
        return
    yield Row(record, f"{name}[0]")
    number = 1
    while second is not None:
        yield Row(_object(second, f"{name}[{number}]"), f"{name}[{number}]")
        number, second = number + 1, next(values, None)


def _held(record: dict[str, Any]) -> list[Any] | None:
    """The rows, where the object is a wrapping of them."""
    found = [record[key] for key in HOLDERS if isinstance(record.get(key), list) and record[key]]
    return found[0] if len(found) == 1 and all(isinstance(item, dict) for item in found[0]) else None


def _object(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{origin} is no object: {shown(json.dumps(value))}", 'Write {"column": value, ...}')
    return value


def read_csv(file: BufferedReader, name: str) -> Iterator[Row]:
    """Comma-separated values under a line of column names; semicolons or tabs where that line has no comma.

    Every value is a string. Raises DataError.
    """
    yield from _separated(file, name, None)


def read_tsv(file: BufferedReader, name: str) -> Iterator[Row]:
    """Tab-separated values under a line of column names. Raises DataError."""
    yield from _separated(file, name, "\t")


def _separated(file: BufferedReader, name: str, separator: str | None) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    lines = (line for _, line in numbered_lines(file, name))
    head = next(lines, None)
    if head is None:
        return
    if separator is None:
        separator = next((mark for mark in ",;\t" if mark in head), ",")
    table = csv.reader(_first_again(head, lines), delimiter=separator, strict=True)
    columns: list[str] | None = None
    begun = 1
    while True:
        try:
            cells = next(table, None)
        except csv.Error as error:
            raise DataError(f"{name}:{begun} is no row of a table: {error}", "Quote cells as CSV does") from None
        if cells is None:
            return
        origin, begun = f"{name}:{begun}", table.line_num + 1
        if columns is None:
            columns = _column_names(cells, origin)
        elif cells:  # a blank line has none
            yield Row(_by_column(columns, cells, origin), origin)


def _first_again(head: str, rest: Iterator[str]) -> Iterator[str]:
    yield head
    yield from rest


def _column_names(cells: list[str], origin: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not all(names):
        what = f"names the column {twice!r} twice" if twice else "leaves a column without a name"
        raise DataError(f"{origin} {what}: {listed(names)}", "Give every column a name of its own in the first line")
    return names


def _by_column(columns: list[str], cells: list[str], origin: str) -> dict[str, str]:
    if len(cells) != len(columns):
        raise DataError(
            f"{origin} has {len(cells)} cells under {len(columns)} columns: {shown(', '.join(cells))}",
            "Quote a cell that has the separator in it",
        )
    return dict(zip(columns, cells, strict=True))


def read_text(file: BufferedReader, name: str) -> Iterator[Row]:
    """The whole file as one running text, {"text": ...}; a large one as several, cut at ends of lines."""
    parts: list[str] = []
    size, first = 0, 1
    for number, line in numbered_lines(file, name):
        parts.append(line)
        size += len(line)
        if size >= TEXT_CHARS:
            yield Row({"text": "".join(parts)}, f"{name}:{first}")
            parts, size, first = [], 0, number + 1
    text = "".join(parts)
    if text.strip():
        yield Row({"text": text}, f"{name}:{first}")


def read_parquet(file: BufferedReader, name: str) -> Iterator[Row]:
    """The rows of a Parquet file. Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=TABLE_ROWS)
        yield from _of_batches(batches, name)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(name, "Parquet", error) from None


def parquet_rows(path: Path) -> int:
    """How many rows a Parquet file says in its end that it has. Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path.name, "Parquet", error) from None


def read_arrow(file: BufferedReader, name: str) -> Iterator[Row]:
    """The rows of an Arrow file, or of a stream as `datasets` writes them. Raises DataError."""
    import pyarrow

    try:
        try:
            opened = pyarrow.ipc.open_file(file)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        except pyarrow.ArrowInvalid:
            file.seek(0)
            batches = iter(pyarrow.ipc.open_stream(file))
        yield from _of_batches(batches, name)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(name, "Arrow", error) from None


def _of_batches(batches: Iterator[Any], name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for first in range(0, batch.num_rows, TABLE_ROWS):
            for record in batch.slice(first, TABLE_ROWS).to_pylist():
                yield Row(record, f"{name}[{number}]")
                number += 1


def _damaged(name: str, kind: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{name} cannot be read as {kind}: {reason[: 2 * SHOWN_CHARS]}", "Write the file again")


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_text,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
# Readers that jump about in their file: a packed one is unpacked to disk for them first.
SEEKING = frozenset({".parquet", ".arrow"})
