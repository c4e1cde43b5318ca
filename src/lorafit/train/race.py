"""`--lr auto`: the learning rate, found by a race over the run's own first steps.

Each of a few rates trains the first steps of the run, all from one beginning, with the same rows and on the run's own
schedule. The one that loses least on the rows of the next steps goes on from where it is, so that a race costs little
more than the steps of the others: less than SHARE of the run. Source: successive halving (Jamieson and Talwalkar 2016),
of one round. What else was tried is in docs/log.md.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from safetensors.torch import load_file, save_file

from lorafit import files
from lorafit.data.batching import step_rows
from lorafit.data.pack import micro_batches
from lorafit.errors import Interrupted, NumericsError
from lorafit.train import checkpoint
from lorafit.train.checkpoint import Checkpoint
from lorafit.train.loop import Loop, Work, train_one_step
from lorafit.train.reporting import StepReport
from lorafit.train.signals import StopRequest, stop_on_signals

# Rates that race, as multiples of the usual one, the smallest first.
FACTORS = (0.5, 1.6)
# Of the run's steps, what a race may take beyond the winner's own, with a pass forward as a third of one.
SHARE, FORWARD = 0.1, 1 / 3
# With fewer steps a rate that is too high is in front more often than not: docs/log.md, "A race".
FEWEST = 5
# Rows that rates are judged by: those of one step for so many of the race.
STEPS_FOR_ONE_AHEAD = 5


@dataclass(frozen=True)
class Race:
    """lr: that of the winner. rates: those that raced. losses: of each, nats per supervised token of each step's rows.

    ahead: of each the same of the next steps' rows, by which it is judged. A rate whose loss was not finite has fewer
    losses than the others, and None ahead. share: of the run's steps, what the race took beyond the winner's own.
    seconds: the same of the clock.
    """

    lr: float
    rates: list[float]
    losses: list[list[float]]
    ahead: list[float | None]
    share: float
    seconds: float

    @property
    def told(self) -> str:
        """What follows `learning rate`."""
        steps = max(map(len, self.losses))
        each = ", ".join(
            f"{lr:g} {'failed' if loss is None else f'loses {loss:.4f}'}"
            for lr, loss in zip(self.rates, self.ahead, strict=True)
        )
        return f"{self.lr:g}: after {steps} steps, on the rows to come, {each} ({self.seconds:.0f} s)"

    def as_dict(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)


@dataclass(frozen=True)
class Begun:
    """What the run goes on from: its state after the race, as the winner left it, and what was told of its steps."""

    state: Checkpoint
    steps: list[StepReport]


def steps_of(work: Work) -> int:
    """Steps of each rate: less than SHARE of the run, and none after which the run has something else to do."""
    first = min(work.steps_per_epoch, work.config.eval_every or work.total_steps)
    return _steps_of(work.total_steps, first)


def share(whole: int, first: int) -> float:
    """Of a run of so many steps, what a race takes beyond the winner's own; 0 where it is too short for one.

    first: the step after which the run has something else to do.
    """
    count = _steps_of(whole, first)
    return _steps_lost(count) / whole if count >= FEWEST else 0.0


def _steps_of(whole: int, first: int) -> int:
    most = min(whole, first - 1)
    return next((count for count in range(most, 0, -1) if _steps_lost(count) < SHARE * whole), 0)


def _steps_lost(count: int) -> float:
    """What a race of so many steps costs, in steps of the run."""
    return (len(FACTORS) - 1) * count + len(FACTORS) * FORWARD * _steps_ahead(count)


def _steps_ahead(count: int) -> int:
    return max(1, count // STEPS_FOR_ONE_AHEAD)


def why_not(work: Work) -> str | None:
    """Why there is no race, if there is none."""
    count, every, epoch = steps_of(work), work.config.eval_every, work.steps_per_epoch
    first = f"evaluated after {every}" if every and every < epoch else f"{epoch} an epoch"
    short = f"{work.total_steps} steps, {first}, leave {count} for a race, which takes {FEWEST}"
    return short if count < FEWEST else None


def run(work: Work, usual: float, scratch: Path, console: Console) -> tuple[Race, Begun] | None:
    """Let rates around the usual one race. None where the run is too short for that, or no rate came to the end.

    scratch: a directory for what each has trained, which in memory would be more than training needs. The model is left
    as it was, bit by bit. Raises Interrupted where it is stopped, RunDirError where `scratch` cannot be written.
    """
    if why_not(work):
        return None
    started, count = time.perf_counter(), steps_of(work)
    beginning = scratch / "before_the_race.safetensors"
    with files.explained(beginning):
        scratch.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in work.method.state(work.model).items()}, beginning)
    rates = [float(f"{factor * usual:.2g}") for factor in FACTORS]
    runners = list[_Runner]()
    try:
        with _Told(console, rates, count) as told, stop_on_signals() as stop:
            for lr in rates:
                work.method.load_state(work.model, load_file(beginning))
                to_beat = min((runner.loss for runner in runners), default=math.inf)
                runners.append(_run(work, lr, count, scratch / "best", to_beat, told, stop))
    finally:
        work.method.load_state(work.model, load_file(beginning))
        beginning.unlink()
    best = min(runners, key=lambda runner: runner.loss)
    state = checkpoint.newest(scratch / "best")[0]
    if state is None:
        return None
    shutil.rmtree(scratch / "best")
    race = Race(
        lr=best.lr,
        rates=rates,
        losses=[[step.loss for step in runner.steps] for runner in runners],
        ahead=[runner.loss if math.isfinite(runner.loss) else None for runner in runners],
        share=_steps_lost(count) / work.total_steps,
        seconds=time.perf_counter() - started - state.progress.train_s,
    )
    return race, Begun(state, best.steps)


@dataclass(frozen=True)
class _Runner:
    """steps: those that went well. loss: what the rate is judged by, infinite where a step went wrong."""

    lr: float
    steps: list[StepReport]
    loss: float


def _run(work: Work, lr: float, count: int, best: Path, to_beat: float, told: _Told, stop: StopRequest) -> _Runner:
    """The first steps of the run at one rate; where that loses less than `to_beat`, its state is left in `best`.

    Raises Interrupted: a race begins again when the run is resumed.
    """

    def save(state: Checkpoint) -> None:
        shutil.rmtree(best, ignore_errors=True)  # a state is several times what is trained: never two of them
        checkpoint.write(best, state)

    loop = Loop(replace(work, config=work.config.model_copy(update={"lr": lr})), None, save)
    told.begin()
    try:
        while loop.progress.step < count and len(told.steps) == loop.progress.step:
            train_one_step(loop, told)
            if stop.signal:
                what = f"stopped by signal {stop.signal} in the race of learning rates, of which nothing is kept"
                raise Interrupted(what, "Run the same command again to begin it anew", stop.signal)
    except NumericsError:  # what it says, the run says too where no rate does better
        return _Runner(lr, told.steps, math.inf)
    loss = _loss_ahead(work, count) if len(told.steps) == count else math.inf
    if loss < to_beat:
        loop.save()
    return _Runner(lr, told.steps, loss if math.isfinite(loss) else math.inf)


@torch.no_grad()
def _loss_ahead(work: Work, count: int) -> float:
    """Nats per supervised token, without dropout, of the rows that the run sees next in its first epoch."""
    size, seed, epoch = work.config.batch_size, work.config.order_seed, work.steps_per_epoch
    for last in range(min(count + _steps_ahead(count), epoch), epoch + 1):  # further where none of them has a loss
        rows = [row for step in range(count, last) for row in step_rows(len(work.rows), size, seed, 0, step)]
        batches = micro_batches(work.rows, rows, work.micro_tokens, work.engine.packing)
        supervised = sum(batch.supervised_tokens for batch in batches)
        if supervised:
            work.engine.model.eval()
            return sum(float(work.engine.loss(batch)) for batch in batches) / supervised
    return math.inf


class _Told:
    """What the steps of a race tell: a bar over those of all rates, on a terminal, and those of the one that runs."""

    def __init__(self, console: Console, rates: Sequence[float], count: int) -> None:
        self.steps: list[StepReport] = []
        self._console = console
        every = " and ".join(f"{rate:g}" for rate in rates)
        console.print(f"learning rates {every} race over the first {count} steps", highlight=False)
        columns = TextColumn("race of rates"), BarColumn(bar_width=24), MofNCompleteColumn()
        self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("race", total=count * len(rates))

    def __enter__(self) -> _Told:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self) -> None:
        """The next rate starts."""
        self.steps = []

    def step(self, report: StepReport) -> None:
        """An optimizer step has ended."""
        if report.applied:
            self.steps.append(report)
        self._bar.advance(self._task)

    def evaluated(self, step: int, loss: float, better: bool) -> None:
        """There are no evaluations in a race."""

    def note(self, step: int, message: str) -> None:
        """Something that must not be silent."""
        self._console.print(f"in the race of rates: {message}", style="yellow", highlight=False)
