"""The directory of a command of many runs: its process's own, and what is settled in it once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorafit import files
from lorafit.config import TrialsConfig
from lorafit.errors import RunDirError
from lorafit.rundir import LOCK, check_same
from lorafit.trials.rows import Rows

SETUP = "setup.json"


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """The directory is this process's own; one that was made for it and in which nothing began is removed again."""
    busy = RunDirError(f"{directory} is in use by another lorafit process", "Wait until it ends, or choose another -o")
    is_new = not directory.exists()
    with files.lock(directory / LOCK, busy):
        try:
            yield
        finally:
            if is_new and not (directory / SETUP).exists():
                shutil.rmtree(directory, ignore_errors=True)


def check_usable(directory: Path, resume: bool, names: tuple[str, ...], what: str) -> None:
    """Refuse a directory that holds something else, or something to be resumed when not resuming.

    names: of what stands in it. what: it holds then, such as "a comparison". Raises RunDirError.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise RunDirError(f"{directory} is a file", "Choose a directory with -o")
    present = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
    strangers = sorted(set(present) - set(names))
    if strangers:
        raise RunDirError(f"{directory} already holds other files ({strangers[0]})", "Choose another directory with -o")
    if SETUP in present and not resume:
        raise RunDirError(
            f"{directory} already holds {what}", "Choose another directory with -o, or go on with it by --resume"
        )


def settle(
    config: TrialsConfig,
    directory: Path,
    free: frozenset[str],
    inputs: Mapping[str, str],
    rows: Rows,
    find: Callable[[], dict[str, Any]],
    what: str,
) -> dict[str, Any]:
    """What `find` gives, found once; with the settings, but for those that are `free` to change, and hashes of inputs.

    Raises CheckpointError where `what` is resumed with other settings or inputs.
    """
    path = directory / SETUP
    settings = {name: value for name, value in config.model_dump().items() if name not in free}
    hashes = {**inputs, **{side: files.sha256(Path(rows.path(side))) for side in rows.counts}}
    if path.is_file():
        earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_same(what, earlier, {"config": settings, "sha256": hashes})
        return earlier
    found = {"config": settings, "sha256": hashes} | find()
    files.write_json(path, found)
    return found
