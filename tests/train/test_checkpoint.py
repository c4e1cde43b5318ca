from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lorafit.errors import CheckpointError, RunDirError
from lorafit.train import checkpoint
from lorafit.train.checkpoint import Checkpoint, Progress


def _state(step: int) -> Checkpoint:
    progress = Progress(step=step, tokens_seen=step * 7, best_loss=0.5, skipped_steps=[1])
    return Checkpoint(
        progress=progress,
        identity={"config": {"r": 3}},
        adapter={"q.lora_A": torch.arange(6.0).view(2, 3) + step},
        optimizer={"q.lora_A.step": torch.tensor(float(step))},
        best={},
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, _state(4))
    found, complaints = checkpoint.newest(tmp_path)
    assert complaints == []
    assert found is not None
    assert found.progress == _state(4).progress
    assert found.identity == {"config": {"r": 3}}
    assert torch.equal(found.adapter["q.lora_A"], _state(4).adapter["q.lora_A"])
    assert torch.equal(found.optimizer["q.lora_A.step"], torch.tensor(4.0))
    assert found.best == {}


def test_only_the_newest_two_are_kept_and_nothing_is_pickled(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        checkpoint.write(tmp_path, _state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]
    suffixes = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert suffixes == {".safetensors", ".json"}


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path, name: str, damage: str) -> None:
    checkpoint.write(tmp_path, _state(1))
    file = checkpoint.write(tmp_path, _state(2)) / name
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-9] if damage == "cut" else content[:-9] + bytes([content[-9] ^ 255]) + content[-8:])
    found, complaints = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.progress.step == 1
    assert len(complaints) == 1
    assert "step-00000002 is damaged" in complaints[0]


def test_a_manifest_of_another_shape_is_damage_not_a_crash(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, _state(1))
    (path / "manifest.json").write_text(json.dumps(["adapter.safetensors"]))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read(path)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") == (None, [])


def test_a_full_disk_leaves_the_older_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path, _state(1))

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(RunDirError, match="disk is full"):
        checkpoint.write(tmp_path, _state(2))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    found, _ = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.progress.step == 1
