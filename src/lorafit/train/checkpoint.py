"""Checkpoints that survive a kill at any moment: written aside, fsynced, manifest last, renamed. No pickle.

A checkpoint is a directory `step-00000020` with adapter.safetensors, optimizer.safetensors, best.safetensors where an
evaluation has found a best, ranks.safetensors where ranks have a schedule, state.json, and manifest.json with the
sha256 of the others.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafit import files
from lorafit.errors import CheckpointError

NAME = re.compile(r"step-(\d{8})")
KEPT = 2
TENSORS = ("adapter", "optimizer", "best", "ranks")


@dataclass
class Progress:
    """Everything about a run that is not a tensor and must survive a restart. Counts are totals since step 0."""

    step: int = 0
    tokens_seen: int = 0
    tokens_supervised: int = 0
    tokens_computed: int = 0
    flop: int = 0
    train_s: float = 0.0
    eval_s: float = 0.0
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    bad_steps_in_a_row: int = 0
    skipped_steps: list[int] = field(default_factory=list)
    stopped_early: bool = False
    loss_scale: float = 1.0
    """See `loss_scale`; steps_at_scale: since it was last changed."""
    steps_at_scale: int = 0


@dataclass
class Checkpoint:
    """The whole state of a run after `progress.step` steps. `identity` says to which run it belongs.

    ranks: of the schedule of ranks, where there is one.
    """

    progress: Progress
    identity: dict[str, Any]
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor]
    ranks: dict[str, Tensor] = field(default_factory=dict)


def write(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint atomically below `directory` and remove all but the newest two. Raises RunDirError."""
    path = directory / f"step-{checkpoint.progress.step:08d}"

    def fill(temporary: Path) -> None:
        tensors = {name: getattr(checkpoint, name) for name in TENSORS}
        for name, values in tensors.items():
            if values:
                save_file({key: value.contiguous() for key, value in values.items()}, temporary / f"{name}.safetensors")
        state = {"progress": asdict(checkpoint.progress), "identity": checkpoint.identity}
        files.write_json(temporary / "state.json", state)
        hashes = {file.name: files.sha256(file) for file in sorted(temporary.iterdir())}
        files.write_json(temporary / "manifest.json", hashes)

    files.write_dir_atomic(path, fill)
    for old in _numbered(directory)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, or None; and a sentence for each newer one that is not."""
    complaints: list[str] = []
    for path in _numbered(directory):
        try:
            return read(path), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    return None, complaints


def read(path: Path) -> Checkpoint:
    """One checkpoint, every file held against the manifest. Raises CheckpointError if it is damaged."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if files.sha256(path / name) != expected:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} does not match its hash", "It is passed over"
                )
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = {
            name: load_file(path / f"{name}.safetensors") if f"{name}.safetensors" in manifest else {}
            for name in TENSORS
        }
        return Checkpoint(progress=Progress(**state["progress"]), identity=state["identity"], **tensors)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}", "It is passed over") from None


def _numbered(directory: Path) -> list[Path]:
    """Checkpoints below `directory`, newest first."""
    found = [path for path in directory.iterdir() if NAME.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(found, key=lambda path: path.name, reverse=True)
