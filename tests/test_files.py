from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from lorafit import files
from lorafit.errors import RunDirError


def test_an_atomic_write_leaves_the_old_file_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    files.write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirError, match=r"the disk is full\. Free some space"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def _write_above_the_limit(path: Path, connection: multiprocessing.connection.Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        files.write_atomic(path, b"x" * 5000)
    except RunDirError as error:
        connection.send(str(error))


def test_a_file_above_the_process_limit_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_write_above_the_limit, args=(tmp_path / "big", theirs)
    )
    process.start()
    process.join()
    assert "the file would exceed the size limit of this process" in ours.recv()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail_half_way(directory: Path) -> None:
        (directory / "one").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunDirError, match="disk is full"):
        files.write_dir_atomic(tmp_path / "adapter", fail_half_way)
    assert list(tmp_path.iterdir()) == []

    files.write_dir_atomic(tmp_path / "adapter", lambda directory: (directory / "one").write_text("1") and None)
    assert (tmp_path / "adapter" / "one").read_text() == "1"


def test_replacing_a_directory_leaves_only_the_new_files(tmp_path: Path) -> None:
    for name in ("old", "new"):
        files.write_dir_atomic(
            tmp_path / "d", lambda directory, name=name: (directory / name).write_text(name) and None
        )
    assert [entry.name for entry in (tmp_path / "d").iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]


def test_json_refuses_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
    files.write_json(tmp_path / "x.json", {"loss": 1.5})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": 1.5}


def _hold(path: Path, ready: multiprocessing.synchronize.Event) -> None:
    with files.lock(path, RunDirError("busy")):
        ready.set()
        time.sleep(60)


def test_a_lock_is_held_by_the_living_and_dropped_by_the_dead(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / ".lock", ready))
    holder.start()
    ready.wait(10)
    with pytest.raises(RunDirError, match="busy"), files.lock(tmp_path / ".lock", RunDirError("busy")):
        pass
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    with files.lock(tmp_path / ".lock", RunDirError("busy")):
        pass


def test_the_hash_of_one_file_is_its_sha256_and_of_several_depends_on_names(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"abc")
    b.write_bytes(b"")
    assert files.sha256(a) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_all([a]) == files.sha256(a)
    assert files.sha256_all([a, b]) == files.sha256_all([b, a])
    before = files.sha256_all([a, b])
    b.rename(tmp_path / "c")
    assert files.sha256_all([a, tmp_path / "c"]) != before
