"""Records of work that is done once: small JSON files, so that what was killed goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafit import files

Record = dict[str, Any]
# Makes a record; what it prints goes to the file.
Work = Callable[[Path], Record]


def log_of(directory: Path, name: str) -> Path:
    """Where the work of a record prints to."""
    return directory / f"{name}.log"


def record(directory: Path, name: str, work: Work, together: bool = False) -> Record:
    """The record of that name, or what `work` gives, with the seconds it took.

    together: whether other work is done beside it. One that says "again" is not kept.
    """
    path = directory / f"{name}.json"
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    started = time.monotonic()
    found = work(log_of(directory, name))
    found |= {"wall_s": time.monotonic() - started, "together": together}
    if "again" not in found:  # after a resume there may be the memory
        files.write_atomic(path, json.dumps(found))
    return found
