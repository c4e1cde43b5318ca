"""Runs whose ranks were trained nested: the first components of the update are an adapter of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lorafit.data.store import Encoded
from lorafit.engine.engine import Engine
from lorafit.errors import ConfigError, NumericsError
from lorafit.infer.evaluate import mean_loss
from lorafit.lora.inject import cut_to
from lorafit.rundir import RunDir


def losses(
    engine: Engine, held_out: Sequence[Encoded] | None, ranks: Sequence[int], micro_tokens: int
) -> list[dict[str, Any]]:
    """Of each rank r: loss, nats per supervised token of the held-out rows, and rows.

    The loss is None where there are no rows, and where it is not a finite number.
    """
    rows = held_out or ()
    engine.model.eval()
    return [{"r": r, "loss": _loss(engine, rows, r, micro_tokens) if rows else None, "rows": len(rows)} for r in ranks]


def _loss(engine: Engine, rows: Sequence[Encoded], r: int, micro_tokens: int) -> float | None:
    try:
        with cut_to(engine.model, r):
            return mean_loss(engine, rows, micro_tokens, lambda _: None)
    except NumericsError:  # the other ranks, and the run, are good all the same
        return None


@contextmanager
def using_rank(model: nn.Module, target: str, r: int | None) -> Iterator[None]:
    """Use the first r components of the update that was opened from `target`; all of them where r is None.

    Raises ConfigError where they were not trained to be used alone.
    """
    if r is None:
        yield
        return
    found = RunDir(target).losses_by_rank()
    if found is None:
        raise ConfigError(
            f"--r {r} is given, and {target} is no run whose ranks were trained nested",
            f"Bring it to that rank first: lorafit shrink {target} --r {r} -o DIR",
        )
    if r > found[-1]["r"]:
        raise ConfigError(f"--r {r} is given, and {target} is of rank {found[-1]['r']}", "Lower --r, or leave it out")
    with cut_to(model, r):
        yield
