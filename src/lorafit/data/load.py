"""A data file -> rows, each with its origin (`file.jsonl:12`), and the seeded split of rows into two sides.

Nothing here knows what the columns mean. A new file type is one function and one line in READERS.
"""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import ConfigError, DataError, listed

SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it came from. record: column -> JSON value. origin: `file.jsonl:12`, lines from 1."""

    record: dict[str, Any]
    origin: str


def read_rows(path: Path) -> list[Row]:
    """All rows of a data file, in order; blank lines are skipped but counted.

    Raises DataError: missing, unreadable, of a type that is not read, empty, or a line that is no JSON object.
    """
    try:
        rows = _reader(path)(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", "Check the path and its permissions"
        ) from None
    if not rows:
        raise DataError(f"{path} holds no rows: {_emptiness(path)}", "Write one JSON object per line")
    return rows


def _reader(path: Path) -> Callable[[Path], list[Row]]:
    """What reads this file type. Raises DataError if the path is no file, or its type is not read."""
    if path.is_dir():
        raise DataError(f"{path} is a directory, not a file", f"Give one file: {listed(READERS)}")
    if not path.exists():
        raise DataError(f"data file {path} does not exist", _near_names(path))
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(
            f"{path} ends in {suffix or 'no suffix'!r}, and only {listed(READERS)} is read now",
            "Write it as JSON Lines, one object per line, in a file that ends in .jsonl",
        )
    return READERS[suffix]


def _near_names(path: Path) -> str:
    """What is there instead: the directory's data files, or that the directory is missing too."""
    if not path.parent.is_dir():
        return f"The directory {path.parent} does not exist either; check the path"
    present = sorted(file.name for file in path.parent.iterdir() if file.suffix.lower() in READERS)
    return f"In {path.parent}: {listed(present)}" if present else "Check the path"


def _emptiness(path: Path) -> str:
    return "all its lines are blank" if path.stat().st_size else "it is 0 bytes long"


def read_jsonl(path: Path) -> list[Row]:
    """JSON Lines in UTF-8, with or without a byte order mark, lines ended by LF or CRLF. Raises DataError."""
    content = path.read_bytes()
    _refuse_other_encodings(content, path)
    rows: list[Row] = []
    for number, line in _lines(content.removeprefix(codecs.BOM_UTF8)):
        origin = f"{path.name}:{number}"
        try:
            rows.append(Row(_parse(line, origin), origin))
        except DataError:
            if not rows:  # the first line shows whether the whole file is something else
                _refuse_whole_json(content, path)
            raise
    return rows


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their number. Split at LF alone: U+2028 may stand inside a JSON string."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        stripped = line.strip()
        if stripped:
            yield number, stripped


def _refuse_other_encodings(content: bytes, path: Path) -> None:
    start = content[:4]
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        name = "UTF-32"
    elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[:2].count(0) == 1:
        name = "UTF-16"
    else:
        return
    raise DataError(f"{path} is {name}, and only UTF-8 is read", f"Convert it: iconv -f {name} -t UTF-8")


def _refuse_whole_json(content: bytes, path: Path) -> None:
    """Name the two files that are often called .jsonl: one JSON array, and one object over several lines."""
    try:
        value = json.loads(content.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError):
        return
    fix = "Write one object per line"
    if isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict):
        raise DataError(
            f"{path} is one JSON array of {len(value)} items, not JSON Lines",
            f"{fix}: jq -c '.[]' old.json > new.jsonl",
        )
    if isinstance(value, dict) and b"\n" in content.strip():
        raise DataError(f"{path} is one JSON object over several lines, not JSON Lines", fix)


def _parse(line: bytes, origin: str) -> dict[str, Any]:
    """One line as an object. Raises DataError with the origin and what the parser said."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        bad = line[error.start : error.start + 1].hex()
        where = f"byte 0x{bad} at column {error.start + 1}"
        raise DataError(f"{origin} is not UTF-8: {where}", "Save the file as UTF-8") from None
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise DataError(f"{origin} is nested too deeply: {_shown(text)}", "Write flat objects") from None
    except ValueError as error:  # JSONDecodeError, a number of thousands of digits, or one of the two hooks
        raise DataError(f"{origin} is not JSON: {_reason(error)}: {_shown(text)}", "Correct the line") from None
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}.get(
            type(value), "a number"
        )
        raise DataError(f"{origin} is {kind}, not an object: {_shown(text)}", 'Write {"column": value, ...}')
    if "\\u" in text:
        _refuse_surrogates(value, origin)
    return value


def _reason(error: ValueError) -> str:
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would keep the last of two equal keys and drop the other without a word."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return record


def _refuse_surrogates(value: Any, origin: str) -> None:
    r"""Half of a surrogate pair, as in "\ud83d", is no character: no tokenizer can read it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{origin} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character",
            "Write the whole character, as UTF-8 or as both halves",
        ) from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "...")


READERS: dict[str, Callable[[Path], list[Row]]] = {".jsonl": read_jsonl}


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held_out): about `share` of the rows are held out, chosen by `seed`; both keep the order of `rows`.

    Equal records stay on one side, so that no held-out row was trained on. The held-out side is never larger than
    the share asks for, unless the smallest group of equal records already is; it has at least one row.
    Raises ConfigError for a share outside (0, 1), DataError where one side would be empty.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the share of rows to hold out is {share}", "Give a share between 0 and 1, such as 10%")
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(json.dumps(row.record, sort_keys=True), []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"{len(rows)} rows with {len(groups)} distinct records cannot be split in two",
            "Give more rows, or a file of its own to evaluate on",
        )
    held = _choose(list(groups.values()), round(share * len(rows)), seed)
    return (
        [row for index, row in enumerate(rows) if index not in held],
        [row for index, row in enumerate(rows) if index in held],
    )


def _choose(groups: list[list[int]], target: int, seed: int) -> set[int]:
    """Row numbers of groups in random order, as long as they fit into `target` rows; at least one group, not all.

    Sorted by random(), whose stream Python promises to keep; it does not promise that of shuffle().
    """
    source = random.Random(seed)
    order = sorted(groups, key=lambda group: source.random())
    held: set[int] = set()
    for group in order[:-1]:
        if len(held) + len(group) <= target:
            held.update(group)
    smallest = min(order, key=len)
    return held or set(smallest)
