"""What the user named -> where its rows are: a file, packed or not, a directory of sides, or a data set of the hub.

A source is read row by row, as often as one likes; `readers.py` knows the types of files.
"""

from __future__ import annotations

import gzip
import io
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lorafit import files
from lorafit.data.readers import READERS, SEEKING
from lorafit.data.rows import Row
from lorafit.errors import DataError, listed

PACKED = (".gz", ".zst")
# How the files of a side may be called.
SIDES = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Rows that can be read again and again.

    name: for sentences. digest: of their content. size: bytes on disk; both when they are asked for. files: that it is
    read from, one after the other; none where it is no file.
    """

    name: str
    read: Callable[[], Iterator[Row]]
    digest: Callable[[], str]
    size: Callable[[], int]
    files: tuple[Path, ...] = ()

    def rows(self) -> Iterator[Row]:
        """All rows, in order. Raises DataError: unreadable, empty, or a row that is no object."""
        count = 0
        for row in self.read():
            count += 1
            yield row
        if not count:
            raise DataError(f"{self.name} holds no rows", "Write one record per line, or one object per item")


@dataclass(frozen=True)
class Located:
    """The sides of a data set by their names in SIDES; one that is a single file has `train` alone."""

    name: str
    sides: dict[str, Source] = field(default_factory=dict)

    def train(self) -> Source:
        """What is trained on. Raises DataError if there is none."""
        return self._first("train")

    def held_out(self) -> Source | None:
        """What is evaluated on while training, if the data set brings it along."""
        return self.sides.get("valid")

    def unseen(self) -> Source:
        """What is evaluated on afterwards: test, else valid, else whatever there is."""
        return self._first("test", "valid", "train")

    def _first(self, *names: str) -> Source:
        found = next((self.sides[name] for name in names if name in self.sides), None)
        if found is None:
            raise DataError(f"{self.name} has {listed(self.sides)} and no {names[0]}", "Name the file itself")
        return found


def locate(data: str) -> Located:
    """Where the rows are. data: a path, or the id of a data set on the hub, `owner/name` or `owner/name:config`.

    Raises DataError: missing, of a type that is not read, or a directory in which it is not clear what is what.
    """
    path = Path(data)
    try:
        if path.is_dir():
            return _in_directory(path)
        if path.exists():
            return Located(data, {"train": _of_files(data, [path])})
    except OSError as error:
        raise _unreadable(path, error) from None
    if HUB_ID.fullmatch(data) and not _suffix(path) and not path.parent.exists():
        return _on_the_hub(data)
    raise DataError(f"data file {path} does not exist", _near_names(path))


# --- files ------------------------------------------------------------------------------------------------------------


def _of_files(name: str, paths: list[Path]) -> Source:
    for path in paths:
        _check_type(path)

    def read() -> Iterator[Row]:
        for path in paths:
            yield from _rows_of(path)

    size = sum(path.stat().st_size for path in paths)
    return Source(name, read, lambda: files.sha256_all(paths), lambda: size, tuple(paths))


def _suffix(path: Path) -> str:
    """`.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`; "" where it is no type that is read."""
    inner = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return inner.suffix.lower() if inner.suffix.lower() in READERS else ""


def _check_type(path: Path) -> None:
    if not _suffix(path):
        raise DataError(
            f"{path} ends in {path.suffix or 'no suffix'!r}, and only {listed(READERS)} are read, also as "
            f"{listed(PACKED)}",
            "Write it as JSON Lines, one object per line, in a file that ends in .jsonl",
        )


def _rows_of(path: Path) -> Iterator[Row]:
    suffix = _suffix(path)
    try:
        with _opened(path, seeking=suffix in SEEKING) as file:
            yield from READERS[suffix](file, path.name)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}", "Pack it again: it is cut off or damaged") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}", "Check the path and its permissions")


@contextmanager
def _opened(path: Path, seeking: bool) -> Iterator[io.BufferedReader]:
    """The unpacked bytes. seeking: from a file on disk, so that a reader may jump about in it."""
    if path.suffix.lower() not in PACKED:
        with open(path, "rb") as file:
            yield file
        return
    with _unpacking(path) as packed, io.BufferedReader(packed) as file:
        if not seeking:
            yield cast(io.BufferedReader, file)
            return
        with tempfile.TemporaryFile() as whole:
            shutil.copyfileobj(file, whole)
            whole.seek(0)
            yield cast(io.BufferedReader, whole)


def _unpacking(path: Path) -> io.RawIOBase:
    if path.suffix.lower() == ".gz":
        return cast(io.RawIOBase, gzip.open(path, "rb"))  # the caller closes it
    import pyarrow  # has zstd, which Python's own library has from 3.14 on

    return cast(io.RawIOBase, pyarrow.input_stream(str(path), compression="zstd"))


def _near_names(path: Path) -> str:
    """What is there instead: the directory's data files, or that the directory is missing too."""
    if not path.parent.is_dir():
        return f"The directory {path.parent} does not exist either; check the path"
    present = sorted(file.name for file in path.parent.iterdir() if _suffix(file))
    return f"In {path.parent}: {listed(present)}" if present else "Check the path"


# --- directories ------------------------------------------------------------------------------------------------------


def _in_directory(directory: Path) -> Located:
    """Files called by their sides, several of one side being parts of it; or the only file."""
    present = _data_files(directory) or _data_files(directory / "data")
    if not present:
        raise DataError(f"{directory} is a directory without data files", f"Read are {listed(READERS)}")
    if len(present) == 1:
        return Located(str(directory), {"train": _of_files(present[0].name, present)})
    sides: dict[str, list[Path]] = {}
    for path in present:
        names = [side for side in SIDES if _words(path) & set(SIDES[side])]
        if len(names) == 1:
            sides.setdefault(names[0], []).append(path)
    if "train" not in sides:
        raise DataError(
            f"{directory} holds {listed(path.name for path in present)}, and none is called train",
            "Name one file, or call them train, valid and test",
        )
    for side, paths in sides.items():
        if len({_without_numbers(path) for path in paths}) > 1:
            raise DataError(
                f"{directory} has several files for {side}: {listed(path.name for path in paths)}", "Name one file"
            )
    return Located(str(directory), {side: _of_files(f"{directory} ({side})", paths) for side, paths in sides.items()})


def _data_files(directory: Path) -> list[Path]:
    return (
        sorted(path for path in directory.iterdir() if path.is_file() and _suffix(path)) if directory.is_dir() else []
    )


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.name.lower()))


def _without_numbers(path: Path) -> str:
    """Equal for the parts of one side, such as train-00000-of-00002.parquet and train-00001-of-00002.parquet."""
    return re.sub(r"\d+", "", path.name)


# --- the hub ----------------------------------------------------------------------------------------------------------


def _on_the_hub(data: str) -> Located:
    """A data set of the hub, by `datasets`, from its cache where it is there already. Code in it is never run."""
    import datasets

    name, _, config = data.partition(":")
    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as error:  # of half a dozen libraries: there is no network, no such name, a script, no such config
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{data} is no file here, and cannot be had from the hub: {type(error).__name__}: {reason}",
            "Check the name and the network, or give a file",
        ) from None
    sides = {side: own for side, names in SIDES.items() for own in names if own in found}
    if not sides:
        raise DataError(f"{data} has {listed(found)}, and none is called train", "Save the one you mean as a file")
    return Located(data, {side: _of_table(f"{data} ({side})", found[own]) for side, own in sides.items()})


def _of_table(name: str, table: Any) -> Source:
    def read() -> Iterator[Row]:
        for number, record in enumerate(table):
            yield Row(record, f"{name}[{number}]")

    return Source(name, read, lambda: str(table._fingerprint), lambda: int(table.data.nbytes))
