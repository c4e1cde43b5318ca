"""A run that is killed at any moment and resumed ends bitwise as one left alone does.

Children are forked from a server that has imported torch already, so that a run costs a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorafit.engine.kernels.build import library
from tests import tiny

PARTS = 4  # so that two workers share what takes longest
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lorafit.run", "tests.tiny"])
# Two epochs of three steps each, the last of an epoch smaller; several micro-batches a step; dropout; evaluation.
SETTINGS: dict[str, Any] = {
    "r": 3,
    "alpha": 7.0,
    "dropout": 0.1,
    "epochs": 2,
    "batch_size": 4,
    "micro_tokens": 90,
    "eval": "25%",
    "eval_every": 2,
    "save_every": 1,
    "precision": "fp32",
    "threads": 1,
    "lr": 1e-2,
}


def _train(settings: dict[str, Any], die_at: int, counted: Path | None) -> None:
    """One whole run in this process. It kills itself at the die_at-th call that makes something durable (0: never)."""
    from lorafit import rates
    from lorafit.config import TrainConfig
    from lorafit.run import Start, train

    # The machine's best rate is kept whenever it was beaten: no part of the run, and a call more in some runs only.
    rates.keep = lambda threads, found: None
    rates.add_run = lambda threads, key, speed: None
    calls = 0

    def watch(name: str) -> None:
        original = getattr(os, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        setattr(os, name, watched)

    for name in ("fsync", "rename", "replace"):
        watch(name)
    with open(os.devnull, "w") as nowhere:
        train(TrainConfig(**settings), {}, Start(True, False, time.time()), Console(file=nowhere))
    if counted:
        counted.write_text(str(calls))


def _start(settings: dict[str, Any], die_at: int = 0, counted: Path | None = None) -> ForkServerProcess:
    process = CONTEXT.Process(target=_train, args=(settings, die_at, counted))
    process.start()
    return process


def _finish(settings: dict[str, Any]) -> None:
    process = _start(settings)
    process.join(60)
    assert process.exitcode == 0


def _result(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes, int]:
    """The settings, the adapter of a run left alone, and how many durable calls it made."""
    library()  # or the first run would compile the kernels, and make a durable call more than the others
    directory = tmp_path_factory.mktemp("kill")
    model, data = tiny.write_model(directory / "model"), tiny.write_chat(directory / "rows.jsonl", 14)
    settings = {**SETTINGS, "model": str(model), "data": str(data)}
    alone = {**settings, "output": str(directory / "alone")}
    process = _start(alone, counted=directory / "count")
    process.join(60)
    assert process.exitcode == 0
    return settings, _result(directory / "alone"), int((directory / "count").read_text())


@pytest.mark.parametrize("part", range(PARTS))
def test_killed_before_any_durable_call_and_resumed_the_adapter_is_the_same(
    part: int, reference: tuple[dict[str, Any], bytes, int], tmp_path: Path
) -> None:
    settings, expected, calls = reference
    assert calls > 40
    for die_at in range(1 + 3 * part, calls + 1, 3 * PARTS):
        run = {**settings, "output": str(tmp_path / str(die_at))}
        process = _start(run, die_at)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, die_at
        _finish(run)
        assert _result(tmp_path / str(die_at)) == expected, die_at
        left = [path.name for path in (tmp_path / str(die_at)).rglob(".*") if path.name != ".lock"]
        assert left == [], die_at


def test_killed_at_random_moments_again_and_again_the_adapter_is_the_same(
    reference: tuple[dict[str, Any], bytes, int], tmp_path: Path
) -> None:
    settings = {**reference[0], "epochs": 6, "output": str(tmp_path / "alone")}
    started = time.monotonic()
    _finish(settings)
    run_s, expected = time.monotonic() - started, _result(tmp_path / "alone")
    chance = random.Random(5)
    kills = 0
    for round_ in range(8):
        run = {**settings, "output": str(tmp_path / str(round_))}
        for _ in range(4):
            process = _start(run)
            process.join(chance.uniform(0.05, 0.5) * run_s)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
        _finish(run)
        assert _result(tmp_path / str(round_)) == expected
    assert kills >= 10
