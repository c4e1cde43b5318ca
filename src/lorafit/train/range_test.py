"""`--lr auto`: the learning rate, found on the run's own rows by steps at a rising rate until it is too high.

A range test (Smith 2017, Cyclical learning rates, section 3.3) that costs less than SHARE of the run. The loss is that
of rows which are the same after every step and are no part of any: between fresh rows it differs by more than between
rates. It falls, and where it comes back above what it was before the first step the rate is several times too high: how
far that carries is in docs/design/learning-rate.md. Everything is put back, bit by bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafit.data.batching import step_rows
from lorafit.data.pack import micro_batches
from lorafit.engine.batch import Batch
from lorafit.engine.tally import TALLY
from lorafit.methods.labels import PREFIX as HEAD
from lorafit.train import loss_scale
from lorafit.train.checkpoint import Progress
from lorafit.train.loop import Work, accumulate_gradients, optimizer_of
from lorafit.train.optim import clip_gradients, set_rate

# Of the run's tokens, what the test may compute; a pass forward alone is a third of a step.
SHARE, FORWARD = 0.09, 1 / 3
# Rates that are tried: multiples of the usual one, each so many times the one before.
LOWEST, HIGHEST, RATIO = 1 / 16, 32.0, 1.7
STEPS = 1 + math.ceil(math.log(HIGHEST / LOWEST, RATIO))
# Rows whose loss is looked at, for each row of a step, and at most.
WATCHED, MOST_WATCHED = 4, 32
# Above so many times the loss before the first step a rate is too high: it rises in its last digits at any rate.
ABOVE = 1.05
TINY = 1e-12  # in the place of a loss of 0
# What that rate is divided by: docs/log.md has what it rests on.
TOO_HIGH = 4.0


@dataclass(frozen=True)
class RangeTest:
    """What was tried and found. rates: of each step, rising. losses: nats a token over the watched rows after each;
    shorter than `rates` where the test was stopped, as it was over. untrained: the same before the first.

    rows: of each step. share: of the run's tokens, what this took. lr: the rate to take.
    """

    lr: float
    rates: list[float]
    losses: list[float]
    untrained: float
    rows: int
    share: float
    seconds: float

    @property
    def told(self) -> str:
        """What follows `learning rate`."""
        where = too_high(self.rates, self.losses, self.untrained)
        return (
            f"{self.lr:g}, by a range test of {len(self.losses)} steps ({self.seconds:.0f} s, "
            f"{self.share:.0%} of the run's tokens): its loss comes above where it began at {where:.2g}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For run.json, in which a loss that is no number is null."""
        return asdict(self) | {"losses": [loss if math.isfinite(loss) else None for loss in self.losses]}


def find(work: Work, usual: float, scratch: Path) -> RangeTest | None:
    """Try rising rates on the run's first rows, and put everything back. None where the run is too short for that.

    usual: the rate from which those to be tried are taken. scratch: a directory for a copy of what is trained, which in
    memory would be one more than training needs.
    """
    plan = _plan(work)
    if plan is None:
        return None
    started, flop = time.perf_counter(), TALLY.flop
    scratch.mkdir(parents=True, exist_ok=True)
    kept = scratch / "before_range_test.safetensors"
    save_file({name: value.contiguous() for name, value in work.method.state(work.model).items()}, kept)
    rates = [usual * LOWEST * RATIO**step for step in range(STEPS)]
    try:
        untrained = _loss(work, plan.watched)
        losses = _rising(work, plan, rates, untrained)
    finally:
        work.method.load_state(work.model, load_file(kept))
        kept.unlink()
        TALLY.flop = flop
    lr = float(f"{too_high(rates, losses, untrained) / TOO_HIGH:.2g}")
    return RangeTest(lr, rates, losses, untrained, plan.rows, plan.share, time.perf_counter() - started)


def too_high(rates: Sequence[float], losses: Sequence[float], untrained: float) -> float:
    """The rate, between two of those tried, at which the loss comes above what it was; the last one if it never did."""
    over = [max(loss, TINY) / max(ABOVE * untrained, TINY) for loss in losses]  # a loss of nan stays one
    step = next((step for step, share in enumerate(over) if not share < 1), None)
    if not step or not math.isfinite(over[step]):
        return rates[len(over) - 1 if step is None else step]
    # Straight between two points, over the logarithms of both.
    way = math.log(over[step - 1]) / math.log(over[step - 1] / over[step])
    return float(rates[step] * RATIO ** (way - 1))


@dataclass(frozen=True)
class _Plan:
    """Batches of each step, and of the rows that are watched. share: of the run's tokens, what all of it computes."""

    steps: list[list[Batch]]
    watched: list[Batch]
    rows: int
    share: float


def _plan(work: Work) -> _Plan | None:
    """As many rows a step as SHARE of the run allows; None where that is less than one."""
    whole = work.total_steps * _tokens(_batches(work, _first(work, work.config.batch_size)))
    rows = work.config.batch_size
    while rows:
        watched = min(WATCHED * rows, MOST_WATCHED)
        first = _first(work, watched + STEPS * rows)
        steps = [_batches(work, first[at : at + rows]) for at in range(watched, len(first), rows)]
        seen = _batches(work, first[:watched])
        share = (sum(map(_tokens, steps)) + FORWARD * (STEPS + 1) * _tokens(seen)) / whole
        if share <= SHARE:
            return _Plan(steps, seen, rows, share)
        rows //= 2
    return None


def _first(work: Work, count: int) -> list[int]:
    """The rows that the run begins with; of a short epoch the next one's follow."""
    order: list[int] = []
    step = 0
    while len(order) < count:
        epoch, index = divmod(step, work.steps_per_epoch)
        order += step_rows(len(work.rows), work.config.batch_size, work.config.order_seed, epoch, index)
        step += 1
    return order[:count]


def _batches(work: Work, rows: Sequence[int]) -> list[Batch]:
    return micro_batches(work.rows, rows, work.micro_tokens, work.engine.packing)


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch.computed_tokens for batch in batches)


@torch.no_grad()
def _loss(work: Work, batches: Sequence[Batch]) -> float:
    work.engine.model.eval()
    return sum(float(work.engine.loss(batch)) for batch in batches) / sum(batch.supervised_tokens for batch in batches)


def _rising(work: Work, plan: _Plan, rates: Sequence[float], untrained: float) -> list[float]:
    """The loss of the watched rows after a step at each rate, up to the first that is too high."""
    parameters, optimizer = optimizer_of(work)
    progress, losses = Progress(), list[float]()
    loss_scale.begin(progress, work.engine.dtype)
    for batches, lr in zip(plan.steps, rates, strict=True):
        accumulate = partial(accumulate_gradients, work, progress, batches)
        loss = loss_scale.scaled(progress, parameters.values(), accumulate)
        norm = clip_gradients(list(parameters.values()), work.config.clip or math.inf)
        if math.isfinite(loss) and math.isfinite(norm):
            _hold_head(work, parameters, optimizer, lr)
            set_rate(optimizer, lr)
            optimizer.step()
            losses.append(_loss(work, plan.watched))
        else:
            losses.append(math.inf)
        optimizer.zero_grad(set_to_none=True)
        work.engine.after_step()
        progress.step += 1
        if not losses[-1] < ABOVE * untrained:
            break
    return losses


def _hold_head(work: Work, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let a head of labels learn at its own rate, whatever is tried for what stands below it."""
    head = {id(p) for name, p in parameters.items() if name.startswith(f"{HEAD}.")}
    for group in optimizer.param_groups:
        if work.config.method != "head" and head.issuperset(map(id, group["params"])):
            group["factor"] = work.config.head_rate / lr
