"""Atomic writes, locks and hashes. Nothing here knows what the files mean."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorafit.errors import LorafitError, RunDirError

HASH_CHUNK_BYTES = 1 << 22


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError from writing `path` into a sentence that says what to do. Raises RunDirError.

    safetensors reports the system's error as text in an exception of its own.
    """
    try:
        yield
    except OSError as error:
        raise _explain(error, path) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise _explain(OSError(int(number[1]), os.strerror(int(number[1]))), path) from error


def _explain(error: OSError, path: Path) -> LorafitError:
    reason = {
        errno.ENOSPC: (
            "the disk is full",
            "Free some space or choose another place, then run the same command with --resume",
        ),
        errno.EDQUOT: ("your disk quota is used up", "Free some space or choose another place"),
        errno.EFBIG: (
            "the file would exceed the size limit of this process",
            "Raise `ulimit -f` or choose another place",
        ),
        errno.EACCES: ("permission denied", "Choose a directory that you may write to"),
        errno.EPERM: ("permission denied", "Choose a directory that you may write to"),
        errno.EROFS: ("the file system is read-only", "Choose a directory that you may write to"),
        errno.ENOTDIR: ("a part of the path is a file, not a directory", "Choose another path"),
        errno.EEXIST: ("it exists and is not a directory", "Choose another path"),
    }.get(error.errno or 0)
    what, do = reason or (error.strerror or str(error), "Check the path and try again")
    return RunDirError(f"cannot write {path}: {what}", do)


def fsync_dir(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of a written file durable."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write the whole file or nothing: temporary file beside it, fsync, rename. Raises RunDirError."""
    content = data.encode() if isinstance(data, str) else data
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


def write_file_atomic(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a file beside `path`, fsync it, then rename it to `path`. Raises RunDirError."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        try:
            fill(Path(name))
            fsync_file(Path(name))
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Floats that are not finite are refused. Raises RunDirError."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_dir_atomic(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a temporary directory beside `path`, fsync every file, then rename it to `path`.

    An older directory at `path` is replaced, and is put back should the rename fail. Raises RunDirError.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            fill(temporary)
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    fsync_file(file)
            os.chmod(temporary, 0o755)
            _swap(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_dir(path.parent)


def _swap(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        return
    old = temporary.with_name(temporary.name + ".old")
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def cache_dir() -> Path:
    """Where what was measured or compiled on this machine is kept: LORAFIT_CACHE, or `lorafit` in the user's cache."""
    chosen = os.environ.get("LORAFIT_CACHE")
    if chosen:
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lorafit"


def sha256(path: Path) -> str:
    """Hex SHA-256 of one file, read in chunks of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_all(paths: list[Path]) -> str:
    """One hash over several files: that of their names and hashes, in order of name; of a single file, its own."""
    if len(paths) == 1:
        return sha256(paths[0])
    lines = [f"{sha256(path)}  {path.name}" for path in sorted(paths)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def lock(path: Path, busy: LorafitError) -> Iterator[None]:
    """Hold an exclusive lock on `path`, or raise `busy`. The kernel drops it when the process dies."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        yield
    finally:
        os.close(descriptor)
