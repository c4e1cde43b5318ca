"""Writing a model's safetensors files one tensor at a time, so that an interrupted writing goes on where it stopped.

Files are written into a directory beside the one that is to be, which takes its name when it is whole. A file is
written aside, synced, renamed, and noted in a journal with its size and hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lorafit import files
from lorafit.errors import MergeError, RunDirError
from lorafit.model.keep import DTYPES
from lorafit.units import format_bytes

JOURNAL = "journal.json"
LOCK = ".lock"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """What it takes in a file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Journal:
    """What is finished in the directory where a model is being written.

    identity: of what is written there; with another one everything begins anew. finished: name of a file -> its size,
    hash, and what was found while it was made.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        self.directory, self.identity = directory, identity
        self.finished: dict[str, dict[str, Any]] = {}
        self.resumed: list[str] = []
        self._begin()

    def _begin(self) -> None:
        """Take over what is whole of an earlier attempt at the same; remove all else."""
        try:
            stated = json.loads((self.directory / JOURNAL).read_text(encoding="utf-8"))
            same = stated["identity"] == self.identity
            earlier = {name: dict(entry) for name, entry in stated["finished"].items()} if same else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            earlier = {}
        self.finished = {name: entry for name, entry in earlier.items() if _is_whole(self.directory / name, entry)}
        self.resumed = sorted(self.finished)
        for entry in self.directory.iterdir():
            if entry.name not in (LOCK, *self.finished):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._write()

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Note a file that is durable under its name."""
        self.finished[name] = entry
        self._write()

    def _write(self) -> None:
        files.write_json(self.directory / JOURNAL, {"identity": self.identity, "finished": self.finished})


def _is_whole(path: Path, entry: Mapping[str, Any]) -> bool:
    try:
        return bool(path.stat().st_size == entry["bytes"] and files.sha256(path) == entry["sha256"])
    except (OSError, KeyError):
        return False


@contextmanager
def in_progress(output: Path) -> Iterator[Path]:
    """The directory in which `output` is being written, locked. Raises RunDirError, which says how to go on."""
    directory = output.with_name(f".{output.name}.merging")
    busy = RunDirError(f"{output} is being written by another process", "Wait until it ends, or choose another with -o")
    with files.lock(directory / LOCK, busy):
        try:
            yield directory
        except RunDirError as error:
            again = f"What is finished is kept in {directory}: the same command goes on there"
            raise RunDirError(error.what, f"Free some space, or choose another place. {again}") from error
        except MergeError:
            shutil.rmtree(directory, ignore_errors=True)  # it would fail again
            raise


def put_in_place(directory: Path, output: Path) -> None:
    """Give a whole directory its name, without what was needed to make it. Raises RunDirError."""
    with files.explained(output):
        for file in sorted(directory.iterdir()):
            files.fsync_file(file)
        for name in (JOURNAL, LOCK):
            (directory / name).unlink(missing_ok=True)
        os.chmod(directory, 0o755)
        os.rename(directory, output)  # onto an empty directory too
        files.fsync_dir(output.parent)


def check_space(directory: Path, needed_bytes: int) -> None:
    """Raises RunDirError if the disk has not that much room."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise RunDirError(
            f"{format_bytes(needed_bytes)} are still to be written to {directory.parent}, where {format_bytes(free)} "
            "are free",
            "",
        )


def write_file(path: Path, planned: Mapping[str, Planned], pieces: Callable[[str], Iterator[Tensor]]) -> dict[str, Any]:
    """Write a safetensors file. pieces: of a tensor, in order, whole rows. Returns its size and hash.

    A few numbers of each tensor are read again by the library safetensors, from the file. Raises RunDirError, and
    MergeError if they are not those that were written.
    """
    # Wide numbers first, as the library does: all are then aligned.
    names = sorted(planned, key=lambda name: -planned[name].dtype.itemsize)
    aside = path.with_name(f"{path.name}.part")
    with files.explained(path), open(aside, "wb") as file:
        out = _Hashed(file)
        out.write(_header({name: planned[name] for name in names}))
        ends: dict[str, tuple[Tensor, Tensor]] = {}
        for name in names:
            ends[name] = _write_tensor(out, name, planned[name], pieces(name))
        file.flush()
        os.fsync(file.fileno())
    _read_again(aside, ends)
    with files.explained(path):
        os.replace(aside, path)
        files.fsync_dir(path.parent)
    return {"bytes": out.nbytes, "sha256": out.digest.hexdigest()}


class _Hashed:
    """A file whose content is counted and hashed as it is written."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest, self.nbytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.nbytes += len(data)


def _header(planned: Mapping[str, Planned]) -> bytes:
    """Length and table. Source: https://github.com/huggingface/safetensors#format."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, one in planned.items():
        end = offset + one.nbytes
        table[name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(out: _Hashed, name: str, planned: Planned, pieces: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Write the pieces of one tensor. Returns copies of its first and its last row."""
    before, first, last = out.nbytes, torch.empty(0), torch.empty(0)
    for piece in pieces:
        if piece.dtype != planned.dtype:
            raise TypeError(f"{name} is planned in {planned.dtype} and made in {piece.dtype}")
        if piece.numel():
            rows = piece.reshape(-1, *planned.shape[1:]) if planned.shape else piece.reshape(1)
            first = rows[:1].clone() if not first.numel() else first
            last = rows[-1:].clone()
            out.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy())
    if out.nbytes - before != planned.nbytes:
        raise ValueError(f"{name} took {out.nbytes - before} bytes, and {planned.nbytes} were planned")
    return first, last


def _read_again(path: Path, ends: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    with safe_open(path, framework="pt") as file:
        for name, (first, last) in ends.items():
            found = file.get_slice(name)
            shape = found.get_shape()
            if not shape or 0 in shape:
                continue
            same = all(
                torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
                for got, expected in ((found[:1], first), (found[shape[0] - 1 :], last))
            )
            if not same:
                raise MergeError(f"{name} is read from {path} otherwise than it was written", "Is the disk in order?")
