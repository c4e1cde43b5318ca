"""A merge tensor by tensor that is killed at any moment is finished by the same command, bitwise as one left alone.

Children are forked from a server that has imported torch already.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.export.test_stream import made, same, tensors

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lorafit.ship", "tests.tiny"])


def _merge(settings: dict[str, Any], die_at: int, counted: Path | None) -> None:
    """One merge in this process. It kills itself at the die_at-th call that makes something durable (0: never)."""
    from lorafit import ship
    from lorafit.config import MergeConfig

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
        ship.merge(MergeConfig(**settings), Console(file=nowhere))
    if counted:
        counted.write_text(str(calls))


def _run(settings: dict[str, Any], die_at: int = 0, counted: Path | None = None) -> int | None:
    process = CONTEXT.Process(target=_merge, args=(settings, die_at, counted))
    process.start()
    process.join(60)
    return process.exitcode


def test_killed_before_any_durable_call_and_begun_again_the_model_is_the_same(tmp_path: Path) -> None:
    _, run = made(tmp_path, "llama", variant="dora", shard="120KB")
    settings = {"run": str(run), "stream": True, "dtype": "bf16"}
    alone, count = tmp_path / "alone", tmp_path / "count"
    assert _run({**settings, "output": str(alone)}, counted=count) == 0
    expected, calls = tensors(alone), int(count.read_text())
    assert calls > 20
    for die_at in (2, calls // 3, calls // 2, calls - 4, calls - 1):
        output = tmp_path / f"killed {die_at}"
        assert _run({**settings, "output": str(output)}, die_at) == -signal.SIGKILL, die_at
        # The last calls are those after the directory has its name.
        assert not output.exists() or same(tensors(output), expected), die_at
        if not output.exists():
            assert _run({**settings, "output": str(output)}) == 0, die_at
        assert same(tensors(output), expected), die_at
        assert sorted(file.name for file in output.iterdir()) == sorted(file.name for file in alone.iterdir()), die_at
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
