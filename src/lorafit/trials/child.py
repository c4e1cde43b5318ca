"""A function in a process of its own, which has imported what is needed: its memory is its own, and it ends with us.

The processes are forked from a server that loads torch once. What they print goes to a file.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
import sys
import threading
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from lorafit import files
from lorafit.errors import DoesNotFitError, Interrupted, LorafitError, RunDirError

CONTEXT = multiprocessing.get_context("forkserver")
# One run of a training.
TRAIN = "lorafit.trials.measuring:train"
# What transformers imports late is imported by every child otherwise.
PRELOADED = ["lorafit.run", "lorafit.trials.measuring", "transformers.modeling_utils", "transformers.modeling_layers"]
# How long a run may take to save what it has when it is interrupted.
SAVING_S = 60


class Refused(LorafitError):
    """What the child could not do, as it said itself. kind: of the error there."""

    def __init__(self, what: str, do: str = "", kind: type[LorafitError] = LorafitError) -> None:
        super().__init__(what, do)
        self.kind = kind

    @property
    def may_go_better(self) -> bool:
        """Whether the same may do another time: with more memory free, or more of the disk."""
        return issubclass(self.kind, (DoesNotFitError, RunDirError))


class Killed(Refused):
    """The child ended without a word."""

    @property
    def may_go_better(self) -> bool:
        """As most are killed for want of memory."""
        return True


def call(work: str, arguments: tuple[Any, ...], log: Path) -> dict[str, Any]:
    """work(*arguments, console) in a process of its own; what it prints is added to `log`.

    work: as `module:function`, so that what it needs, torch above all, is imported there alone. Raises Refused where
    it raised a LorafitError, Killed where it said nothing, Interrupted on Ctrl-C, once it has saved its state.
    """
    with files.explained(log):
        log.parent.mkdir(parents=True, exist_ok=True)
    CONTEXT.set_forkserver_preload(PRELOADED)
    ours, its = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_child, args=(its, work, arguments, str(log)))
    process.start()
    its.close()
    try:
        said = _hear(ours)
        process.join()
    except KeyboardInterrupt:
        process.join(SAVING_S)
        process.kill()
        raise interrupted() from None
    if said is None:
        raise Killed(f"its process ended with {process.exitcode} (-9: killed, mostly for want of memory); see {log}")
    kind, value = said
    if kind == "interrupted":
        raise interrupted()
    if kind == "refused":
        raise Refused(*value)
    if kind == "failed":
        raise RuntimeError(f"a trial failed; see {log}\n{value}")  # our own fault
    found: dict[str, Any] = value
    return found


def interrupted() -> Interrupted:
    """What Ctrl-C comes to."""
    what = "interrupted; what is finished is kept"
    return Interrupted(what, "Run the same command with --resume to go on", signal.SIGINT)


def _hear(connection: Connection) -> tuple[str, Any] | None:
    try:
        said: tuple[str, Any] = connection.recv()
        return said
    except EOFError:
        return None


def _child(connection: Connection, work: str, arguments: tuple[Any, ...], log: str) -> None:
    _die_with_parent()
    with open(log, "a", encoding="utf-8", buffering=1) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            said: tuple[str, Any] = "done", pkgutil.resolve_name(work)(*arguments, Console(file=file, width=200))
        except Interrupted as error:
            said = "interrupted", str(error)
        except LorafitError as error:
            said = "refused", (error.what, error.do, type(error))
        except Exception as error:
            import traceback

            traceback.print_exc()
            said = "failed", f"{type(error).__name__}: {error}"
        connection.send(said)
        connection.close()


def _die_with_parent() -> None:
    """Whoever started it may be killed: a trial that goes on alone would be in the way of the next try."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
