"""The run directory: its names, and how its files are read and written. Knows no config class and no tensor."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from lorafit import files
from lorafit.errors import CheckpointError, RunDirError

LOCK = ".lock"
RANKS = "ranks"
FILE_NAMES = ("run.toml", "run.json", "metrics.jsonl", "adapter", RANKS, "checkpoints", "README.md")


class RunDir:
    """Paths and small files of one run.

    run.toml: the resolved config. run.json: what happened; it exists once the run has finished. metrics.jsonl: a line a
    step. adapter/: the result. ranks/: adapters of lower ranks, where the run leaves some.
    checkpoints/: what --resume starts from. README.md: the model card.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.run_toml = self.path / "run.toml"
        self.run_json = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.readme = self.path / "README.md"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.run_toml.is_file()

    @property
    def finished(self) -> bool:
        """Whether the run here has ended well."""
        return self.run_json.is_file()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process; one that was made for it and in which no run began is removed again.

        Raises RunDirError if another living process trains into it.
        """
        busy = RunDirError(
            f"{self.path} is in use by another lorafit process",
            "Wait until it ends, or choose another directory with -o",
        )
        is_new = not self.path.exists()
        with files.lock(self.path / LOCK, busy):
            try:
                yield
            finally:
                if is_new and not self.exists:
                    shutil.rmtree(self.path, ignore_errors=True)

    def check_usable(self, resume: bool) -> None:
        """Refuse a directory that holds something else, or a run when not resuming. Raises RunDirError."""
        if self.path.exists() and not self.path.is_dir():
            raise RunDirError(f"{self.path} is a file", "Choose a directory with -o")
        if not self.path.is_dir():
            return
        strangers = sorted(
            entry.name
            for entry in self.path.iterdir()
            if entry.name not in FILE_NAMES and not entry.name.startswith(".")
        )
        if strangers and not self.exists:
            raise RunDirError(
                f"{self.path} already holds other files ({strangers[0]})", "Choose another directory with -o"
            )
        if self.exists and not resume:
            state = "a finished run" if self.finished else "an unfinished run"
            raise RunDirError(
                f"{self.path} already holds {state}", "Choose another directory with -o, or go on with it by --resume"
            )
        if not os.access(self.path, os.W_OK):
            raise RunDirError(f"cannot write into {self.path}", "Choose a directory that you may write to")

    @property
    def scratch(self) -> Path:
        """For what a run needs while it lasts; `clean` removes it."""
        return self.path / ".scratch"

    def clean(self) -> None:
        """Remove what a killed process left half-written. Call it under the lock."""
        for directory in (self.path, self.checkpoints, self.path / RANKS):
            for entry in directory.glob(".*") if directory.is_dir() else ():
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name != LOCK:
                    entry.unlink(missing_ok=True)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write run.toml; fields that are None are left out, since TOML has no null."""
        present = {name: value for name, value in config.items() if value is not None}
        files.write_atomic(self.run_toml, tomli_w.dumps(present))

    def read_config(self) -> dict[str, Any]:
        """run.toml as a dict. Raises RunDirError if this is no run directory."""
        try:
            return tomllib.loads(self.run_toml.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunDirError(
                f"{self.path} is not a run directory: it has no run.toml", "Give the directory of `lorafit train -o`"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RunDirError(f"{self.run_toml} is damaged: {error}", "Train again, or restore the file") from None

    def read_result(self) -> dict[str, Any]:
        """run.json as a dict. Raises RunDirError if the run has not finished."""
        try:
            result: dict[str, Any] = json.loads(self.run_json.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunDirError(
                f"{self.path} holds no finished run: it has no run.json", "Finish it by `lorafit train --resume`"
            ) from None
        except ValueError as error:
            raise RunDirError(f"{self.run_json} is damaged: {error}", "Train again, or restore the file") from None
        return result

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none where there is no such file. See `read_lines`."""
        return read_lines(self.metrics)

    def of_rank(self, r: int) -> Path:
        """Where the adapter of a rank below the run's own is, if it leaves one."""
        return self.path / RANKS / f"r{r}"

    @property
    def held_out(self) -> Path:
        """Of a run that leaves an adapter of each rank, what each loses on each held-out row; see `read_held_out`."""
        return self.path / "ranks" / "held_out.json"

    def read_held_out(self) -> dict[int, dict[str, list[Any]]]:
        """By rank: nats (None where not finite), tokens with a loss, how many of these are the likeliest; of each row.

        Raises RunDirError where the file is damaged or missing.
        """
        try:
            return {int(r): dict(own) for r, own in json.loads(self.held_out.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise RunDirError(f"{self.held_out} cannot be read: {error}", "Train again, or restore the file") from None

    def by_rank(self) -> list[dict[str, Any]]:
        """Of a run that leaves an adapter of each rank: r, loss, steps, lr of each, in ascending order; else nothing.

        Raises RunDirError for an unfinished run.
        """
        return self.read_result().get("by_rank") or [] if self.exists else []

    def adapter_of(self, r: int) -> Path | None:
        """The adapter of that rank; None where the run leaves none."""
        ranks = [one["r"] for one in self.by_rank()]
        if r not in ranks:
            return None
        return self.adapter if r == ranks[-1] else self.of_rank(r)


def run_of_rank(adapter: Path) -> RunDir | None:
    """The finished run that left this adapter of a rank below its own; None where it is no such adapter."""
    path = adapter.resolve()
    run = RunDir(path.parent.parent)
    return run if path.parent.name == RANKS and run.finished else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; a killed process may have left a part of one at the end."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def check_same(what: str, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on under other settings or inputs. what: such as `run`, as it is called in the sentence.

    Raises CheckpointError that shows each difference.
    """
    changed = [
        f"{name} was {earlier[part].get(name)!r}, now {now[part].get(name)!r}"
        for part in ("config", "sha256")
        for name in sorted(earlier[part].keys() | now[part].keys())
        if earlier[part].get(name) != now[part].get(name)
    ]
    if changed:
        raise CheckpointError(
            f"this {what} was started otherwise: {'; '.join(changed)}",
            "Resume with the same settings and files, or start anew in another directory with -o",
        )
