"""Runs whose ranks were trained nested: the first components of the update are an adapter of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lorafit.data.store import Encoded
from lorafit.engine.engine import Engine
from lorafit.errors import ConfigError
from lorafit.infer.evaluate import mean_loss
from lorafit.lora.inject import cut_to
from lorafit.rundir import RunDir


def losses(
    engine: Engine, held_out: Sequence[Encoded] | None, ranks: Sequence[int], micro_tokens: int
) -> list[dict[str, Any]]:
    """Of each rank r: loss, nats per supervised token of the held-out rows, and rows; None and 0 where there are none.

    Raises NumericsError for a loss that is not finite.
    """
    rows, found = held_out or (), []
    engine.model.eval()
    for r in ranks:
        with cut_to(engine.model, r):
            loss = mean_loss(engine, rows, micro_tokens, lambda _: None) if rows else None
        found.append({"r": r, "loss": loss, "rows": len(rows)})
    return found


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
