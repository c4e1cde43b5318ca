"""Encoded rows one after the other, in memory or memory-mapped from a directory: never all of them in memory.

A cell is a token id with its mask in the highest bit. What is known of each row stands beside it in arrays.
"""

from __future__ import annotations

import json
import mmap
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from lorafit import files

SUPERVISED = np.uint32(1 << 31)
# end: where its cells end. supervised: how many have a loss. read: tokens before the last of those. row: number of the
# record it was made from. origin: where the bytes of its origin end.
FIELDS = {
    "end": "<i8",
    "row": "<i8",
    "origin": "<i8",
    "supervised": "<i4",
    "read": "<i4",
    "prompt": "<i4",
    "cut": "<i4",
}
PIECE = np.dtype(list(FIELDS.items()))


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One row as the model reads it.

    input_ids: (tokens,) int32. supervised: (tokens,) bool; supervised[t]: token t has a loss, predicted from those
    before t, so supervised[0] is False. prompt_length: tokens before the last reply, 0 for running text.
    cut_tokens: how many were cut off at the end. row: number of the record in its source.
    """

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    prompt_length: int
    origin: str
    cut_tokens: int = 0
    row: int = 0


class Rows(Sequence[Encoded]):
    """Rows by number, which need not be in memory."""

    @overload
    def __getitem__(self, at: int) -> Encoded: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, at: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return self.row(at % len(self))

    @abstractmethod
    def row(self, at: int) -> Encoded:
        """One of them. at: from 0."""

    @property
    @abstractmethod
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""

    @property
    @abstractmethod
    def resident_bytes(self) -> int:
        """What of this has to be in memory."""

    @abstractmethod
    def let_go(self) -> None:
        """Hand back what was read of mapped files."""


class Tokens(Rows):
    """Rows of one source, by number.

    cells: (tokens,) uint32. pieces: (rows,) of PIECE. origins: UTF-8, one after the other. chosen: numbers of the
    rows that this is a part of, in its order; None for all.
    """

    def __init__(
        self,
        cells: NDArray[np.uint32],
        pieces: NDArray[Any],
        origins: NDArray[np.uint8],
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        self._cells, self._all, self._origins, self._chosen = cells, pieces, origins, chosen

    def __len__(self) -> int:
        return len(self._all if self._chosen is None else self._chosen)

    def row(self, at: int) -> Encoded:
        """Read from where it lies."""
        number = at if self._chosen is None else int(self._chosen[at])
        piece, before = self._all[number], self._all[number - 1] if number else np.zeros((), PIECE)
        cells = np.asarray(self._cells[int(before["end"]) : int(piece["end"])])
        origin = bytes(self._origins[int(before["origin"]) : int(piece["origin"])]).decode()
        return Encoded(
            (cells & ~SUPERVISED).astype(np.int32),
            (cells & SUPERVISED) != 0,
            int(piece["prompt"]),
            origin,
            int(piece["cut"]),
            int(piece["row"]),
        )

    def fact(self, name: str) -> NDArray[Any]:
        """One of FIELDS for each row."""
        return self._all[name] if self._chosen is None else self._all[name][self._chosen]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        lengths = np.diff(self._all["end"], prepend=0)
        return lengths if self._chosen is None else lengths[self._chosen]

    @property
    def resident_bytes(self) -> int:
        """What of this has to be in memory: mapped files have not."""
        arrays = self._cells, self._all, self._origins
        return sum(0 if isinstance(array, np.memmap) else array.nbytes for array in arrays)

    def let_go(self) -> None:
        """Hand back the pages of mapped files that were read; they stay in the system's cache, and come again."""
        for array in (self._cells, self._all, self._origins):
            mapped = getattr(array, "_mmap", None)
            if mapped is not None:
                with suppress(OSError, AttributeError):
                    mapped.madvise(mmap.MADV_DONTNEED)

    def part(self, chosen: NDArray[np.bool_]) -> Tokens:
        """The rows that are chosen, in their order. chosen: (rows,)."""
        numbers = np.flatnonzero(chosen)
        return Tokens(self._cells, self._all, self._origins, numbers if self._chosen is None else self._chosen[numbers])


class Led(Rows):
    """Rows that begin with the same tokens more, which have no loss. lead: those, at least one."""

    def __init__(self, rows: Sequence[Encoded], lead: Sequence[int]) -> None:
        self.rows, self.lead = rows, np.array(lead, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, at: int) -> Encoded:
        """With the tokens in front."""
        row = self.rows[at]
        return replace(
            row,
            input_ids=np.concatenate([self.lead, row.input_ids]),
            supervised=np.concatenate([np.zeros(len(self.lead), np.bool_), row.supervised]),
            prompt_length=row.prompt_length + len(self.lead),
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, those in front included."""
        return lengths(self.rows) + len(self.lead)

    @property
    def resident_bytes(self) -> int:
        """What of the rows has to be."""
        return resident_bytes(self.rows)

    def let_go(self) -> None:
        """Hand back what was read of mapped files."""
        let_go(self.rows)


class Known(Rows):
    """Labelled rows whose features are known: what is predicted is read by its number among those, one token.

    first: the number of the first. starts: (rows + 1,) int64, where the numbers of a row begin, and end. targets: of
    each, int64. tokens: (rows,) int64, of the texts.
    """

    def __init__(self, rows: Sequence[Encoded], first: int) -> None:
        self.rows, self.first = rows, first
        self.starts = starts_of(rows)
        self.targets = targets_of(rows)
        self.tokens = lengths(rows) - np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.rows)

    def pairs(self, chosen: Sequence[int]) -> NDArray[np.int64]:
        """Of some rows, one after the other, the places in `targets`."""
        return np.concatenate([np.arange(self.starts[row], self.starts[row + 1]) for row in chosen])

    def row(self, at: int) -> Encoded:
        """Numbers, each with its label behind it."""
        own = self.pairs([at])
        ids = np.stack([own + self.first, self.targets[own]], axis=1).astype(np.int32).ravel()
        return replace(self.rows[at], input_ids=ids, supervised=np.arange(len(ids)) % 2 == 1, prompt_length=1)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Two for each that is predicted."""
        return 2 * np.diff(self.starts)

    @property
    def resident_bytes(self) -> int:
        """What of the rows has to be, and what is known of each."""
        return resident_bytes(self.rows) + self.starts.nbytes + self.targets.nbytes + self.tokens.nbytes

    def let_go(self) -> None:
        """Hand back what was read of mapped files."""
        let_go(self.rows)


def led(rows: Sequence[Encoded], lead: Sequence[int]) -> Sequence[Encoded]:
    """The rows, with `lead` in front of each where there is any."""
    return Led(rows, lead) if lead else rows


def resident_bytes(rows: Sequence[Encoded]) -> int:
    """What of the rows has to be in memory."""
    if isinstance(rows, Rows):
        return rows.resident_bytes
    return sum(row.input_ids.nbytes + row.supervised.nbytes for row in rows)


def let_go(rows: Sequence[Encoded]) -> None:
    """Hand back what was read of mapped files."""
    if isinstance(rows, Rows):
        rows.let_go()


def lengths(rows: Sequence[Encoded]) -> NDArray[np.int64]:
    """Tokens of each row."""
    return rows.lengths if isinstance(rows, Rows) else np.array([len(row.input_ids) for row in rows], np.int64)


def starts_of(rows: Sequence[Encoded]) -> NDArray[np.int64]:
    """Where each row's predicted cells begin among those of all rows, and where the last one's end: (rows + 1,)."""
    counts = rows.fact("supervised") if isinstance(rows, Tokens) else [int(row.supervised.sum()) for row in rows]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def targets_of(rows: Sequence[Encoded]) -> NDArray[np.int64]:
    """What all rows' predicted cells say, one after the other."""
    return np.concatenate([row.input_ids[row.supervised] for row in rows]).astype(np.int64)


class Writer:
    """Takes rows one after the other. directory: where they are written, or None to keep them in memory."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._cells: list[NDArray[np.uint32]] = []
        self._pieces: list[tuple[int, ...]] = []
        self._origins = bytearray()
        self._end, self._origin_end = 0, 0
        self._files: dict[str, IO[bytes]] = {}
        if directory is not None:
            self._files = {name: open(directory / f"{name}.bin", "wb") for name in NAMES}  # noqa: SIM115  # close()

    def add(self, row: Encoded) -> None:
        """One more row."""
        cells = row.input_ids.astype(np.uint32) | (row.supervised * SUPERVISED)
        supervised = np.flatnonzero(row.supervised)
        read = int(supervised[-1]) if len(supervised) else 1
        origin = row.origin.encode()
        self._end += len(cells)
        self._origin_end += len(origin)
        self._cells.append(cells)
        self._origins += origin
        counts = len(supervised), read, row.prompt_length, row.cut_tokens
        self._pieces.append((self._end, row.row, self._origin_end, *counts))
        if self.directory is not None and len(self._pieces) >= ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        for name, part in zip(NAMES, self._parts(), strict=True):
            part.tofile(self._files[name])
        self._cells, self._pieces, self._origins = [], [], bytearray()

    def _parts(self) -> tuple[NDArray[Any], ...]:
        cells = np.concatenate(self._cells) if self._cells else np.zeros(0, np.uint32)
        return cells, np.array(self._pieces, dtype=PIECE), np.frombuffer(bytes(self._origins), np.uint8)

    def close(self) -> None:
        """Close the files; what was written so far stays unfinished."""
        for file in self._files.values():
            file.close()

    def finish(self, facts: dict[str, Any]) -> Tokens:
        """All rows. facts: what is to be known with them, kept beside them as JSON where they are kept."""
        if self.directory is None:
            return Tokens(*self._parts())
        self._flush()
        self.close()
        files.write_json(self.directory / "facts.json", facts)
        return opened(self.directory)[0]


NAMES = ("cells", "pieces", "origins")
TYPES: dict[str, Any] = {"cells": np.uint32, "pieces": PIECE, "origins": np.uint8}
ROWS_AT_ONCE = 4096


def opened(directory: Path) -> tuple[Tokens, dict[str, Any]]:
    """What a Writer left in a directory."""
    arrays = [_mapped(directory / f"{name}.bin", TYPES[name]) for name in NAMES]
    return Tokens(*arrays), json.loads((directory / "facts.json").read_text(encoding="utf-8"))


def _mapped(path: Path, dtype: Any) -> NDArray[Any]:
    # An empty file can't be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


# --- kept from run to run ---------------------------------------------------------------------------------------------

KEPT = 8  # sets of rows


def kept(cache: Path, key: str) -> Path | None:
    """Where the rows of this key are, if an earlier run finished them."""
    found = cache / key
    if not (found / "facts.json").is_file():
        return None
    found.touch()
    return found


def begin(cache: Path) -> Path:
    """A new directory to write rows to; `keep` gives it its name."""
    cache.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=cache, prefix="unfinished-"))


def keep(written: Path, key: str) -> Path:
    """Put a finished directory in its place, all at once, and remove the least used beyond KEPT."""
    final = written.parent / key
    if final.exists():  # another process was faster
        shutil.rmtree(written)
    else:
        written.rename(final)
    others = sorted((path for path in final.parent.iterdir() if path.is_dir()), key=lambda path: -path.stat().st_mtime)
    for old in others[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final
