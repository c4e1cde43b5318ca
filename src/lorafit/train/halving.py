"""All ranks below a run's from that one run: its update is halved, trained on for a little, halved again, down to 1.

Halving takes the nearest update of half the rank, weight by weight (Eckart and Young 1936); what that loses, a few
steps bring back, as after pruning (Han et al. 2015, section 3.4). Each rank begins at what the one above it became, so
that none has to make good more than one halving.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lorafit.config import RATES, TrainConfig
from lorafit.data.batching import step_rows
from lorafit.data.pack import micro_batches
from lorafit.errors import ConfigError, Interrupted, NumericsError
from lorafit.lora.inject import owners
from lorafit.lora.truncate import truncate
from lorafit.methods.spectral import MOVING
from lorafit.train.loop import Work, fit
from lorafit.train.reporting import StepReport
from lorafit.train.signals import StopRequest, stop_on_signals

NAME = "halving"  # of --rank-schedule
CAN_BE_HALVED = ("lora", "lora-fa")
# Of the tokens that the run has computed, what steps after halving compute; rank b has a share in b ** -FALL of it, up
# to HEALED: above, halving loses next to nothing, and a few steps do more harm than good.
SHARE, FALL, HEALED = 0.4, 0.5, 8
# What rank b learns at: so many times the geometric mean of --lr and the usual rate, over b. Where a set lets rank 64
# learn at a high rate, what is left of it after halving does not stand as much.
RATE = 0.7
# Rows of a step, as a part of --batch-size: there are few rows for each rank, and more steps use them better.
PART_OF_BATCH = 2
# Steps that are looked at to know how many tokens one computes.
LOOKED_AT = 8
# Whether steps helped is told by every fourth of the held-out pieces, or by more of them where these would be too few:
# a whole evaluation would cost a good part of what the steps do, only to know whether to keep them.
GLANCE, GLANCED_AT = 4, 32


def ladder(r: int) -> list[int]:
    """1, 2, 4, ... below r, and r."""
    return [2**k for k in range((r - 1).bit_length())] + [r]


def check(config: TrainConfig, labelled: bool) -> None:
    """Refuse to halve what is no product of two factors alone. Raises ConfigError.

    labelled: whether a head of labels is trained.
    """
    if config.rank_schedule != NAME:
        return
    reasons = {
        f"--method {config.method}, which has no rank": config.method != "lora",
        f"--variant {config.variant}, whose update is more than two factors": config.variant not in CAN_BE_HALVED,
        f"--init {config.init}, whose update is saved together with what W0 gave up": config.init in MOVING,
        "--add-tokens, and tokens have no rank": bool(config.add_tokens),
        "rows with labels, and a head of labels has no rank": labelled,
        "rank 1, below which there is none": max([config.r, *config.rank_pattern.values()]) == 1,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason:
        raise ConfigError(f"--rank-schedule {config.rank_schedule} is given with {reason}", "Leave one of the two out")


@dataclass(frozen=True)
class Healing:
    """What is done after the update was brought to rank r: so many steps of batch_size rows, at lr falling to 0."""

    r: int
    steps: int
    batch_size: int
    lr: float


def plan(config: TrainConfig, most: int, run: int, step: float) -> list[Healing]:
    """What each rank below the run's own is trained on, from the largest.

    most: the largest rank of a layer. run: tokens that it has computed. step: tokens that a step of `batch_size_of`
    rows computes. The smaller the rank, the more a halving has lost, and the more steps there are for it, at a higher
    rate.
    """
    below, batch_size = ladder(most)[-2::-1], batch_size_of(config)
    lr = RATE * math.sqrt(config.peak_rate * RATES["lora"])
    shares = {r: r**-FALL if r <= HEALED else 0.0 for r in below}
    whole = SHARE * run / step / sum(shares.values()) if shares else 0.0
    return [Healing(r, round(whole * share), batch_size, float(f"{lr / r:.3g}")) for r, share in shares.items()]


def batch_size_of(config: TrainConfig) -> int:
    """Rows of a step after halving."""
    return max(1, config.batch_size // PART_OF_BATCH)


@dataclass(frozen=True)
class HeldOut:
    """What the model as it is loses on held-out pieces, (pieces,) each: nats, tokens with a loss, likeliest ones."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    likeliest: NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return float(self.nats.sum() / self.tokens.sum())


def at_a_glance(count: int) -> list[int]:
    """Which of so many held-out pieces are measured to know whether steps helped."""
    return list(range(0, count, max(1, min(GLANCE, count // GLANCED_AT))))


class Held:
    """Measures the model as it is on the held-out pieces: on all of them, or at a glance on every few.

    Of the evaluations during the run it keeps the best, which is of the update that the run leaves.
    measure: of pieces by their numbers. count: how many there are; where there are none, nothing is measured.
    """

    def __init__(self, measure: Callable[[Sequence[int]], HeldOut], count: int) -> None:
        self._measure, self.count = measure, count
        self._least: HeldOut | None = None
        self.at_a_glance = at_a_glance(count)
        self.others = sorted({*range(count)} - {*self.at_a_glance})

    def loss(self) -> float:
        """Nats per supervised token, on all of them, during the run."""
        one = self._measure(range(self.count))
        if self._least is None or one.loss < self._least.loss:
            self._least = one
        return one.loss

    def trained(self, loss: float | None) -> HeldOut | None:
        """On all of them, of the update as the run leaves it, whose loss this was: the run's best.

        A resumed run may have found it before it was stopped; then it is measured again.
        """
        return self._least if self._least and self._least.loss == loss else self.whole()

    def glance(self) -> HeldOut | None:
        """On a part of the pieces."""
        return self._measure(self.at_a_glance) if self.count else None

    def whole(self, glance: HeldOut | None = None) -> HeldOut | None:
        """On all of them. glance: what is known of a part of them already, of the model as it is now."""
        if glance is None:
            return self._measure(range(self.count)) if self.count else None
        if not self.others:
            return glance
        places = np.argsort([*self.at_a_glance, *self.others])
        columns = zip(vars(glance).values(), vars(self._measure(self.others)).values(), strict=True)
        return HeldOut(*[np.concatenate(both)[places] for both in columns])


def evaluations(r: int, count: int) -> float:
    """How often all of so many held-out pieces are measured after the run, at ranks below r.

    Once at each, and once more at a glance where steps follow.
    """
    glance = len(at_a_glance(count)) / count if count else 0.0
    return sum(1 + glance * (rank <= HEALED) for rank in ladder(r)[:-1])


def _loss(one: HeldOut | None) -> float | None:
    """None also where it is not finite."""
    return one.loss if one and math.isfinite(one.loss) else None


def halve(
    work: Work, computed: int, loss: float | None, held: Held, save: Callable[[int], None], console: Console
) -> tuple[dict[str, Any], dict[int, HeldOut]]:
    """Bring the update that was trained to each rank below, one after the other. The model is left at rank 1.

    computed: tokens, by the run until now. loss: of the update as it is, None where it was not evaluated. save: called
    with each rank while the model has it. Returns `by_rank`, from the smallest rank: r, steps and lr of its own
    training, whether that helped (what is saved is the update as it was halved where it did not), and the held-out loss
    of what is saved (both None without such rows, the latter also where it is not finite); and `halving_s`, without
    evaluations. And what each rank loses on each held-out piece, where there are any. Raises Interrupted: it begins
    again when the run is resumed.
    """
    most = max(layer.r for layer in owners(work.model).values())
    healings, took = plan(work.config, most, computed, _tokens_of_a_step(work)), 0.0
    measured = {most: held.trained(loss)}
    known = _loss(measured[most]) if loss is None else loss
    found: list[dict[str, Any]] = [{"r": most, "steps": None, "lr": None, "helped": None, "loss": known}]
    with stop_on_signals() as stop, _Told(console, sum(healing.steps for healing in healings)) as told:
        for healing in healings:
            started = time.perf_counter()
            truncate(work.model, healing.r, work.config.scaling_rule)
            took += time.perf_counter() - started
            helped, kept, heal_s = _heal_and_save(work, healing, held, partial(save, healing.r), stop, told)
            took, measured[healing.r] = took + heal_s, kept
            own = {"steps": healing.steps, "lr": healing.lr, "helped": helped if kept else None, "loss": _loss(kept)}
            found.append({"r": healing.r, **own})
            told.rank(found[-1])
            if stop.signal:
                raise interrupted(stop.signal)
    pieces = {r: one for r, one in sorted(measured.items()) if one}
    return {"by_rank": found[::-1], "halving_s": took}, pieces


def _tokens_of_a_step(work: Work) -> float:
    """How many a step after halving computes in the mean: what its rows begin with in common counts once."""
    rows, size, seed = work.rows, batch_size_of(work.config), work.config.order_seed
    count = min(LOOKED_AT, -(-len(rows) // size))
    steps = [step_rows(len(rows), size, seed, 0, number) for number in range(count)]
    batches = [batch for own in steps for batch in micro_batches(rows, own, work.micro_tokens, work.engine.packing)]
    return sum(batch.computed_tokens for batch in batches) / count


def _heal_and_save(
    work: Work, healing: Healing, held: Held, save: Callable[[], None], stop: StopRequest, told: _Told
) -> tuple[bool, HeldOut | None, float]:
    """Save what was cut or what steps make of it, whichever is better at a glance.

    Returns whether that is the latter, what it loses, and the seconds of the steps. The model goes on with the latter
    in any case: also where it is no better at this rank, halving it loses less.
    """
    if not healing.steps:
        save()
        return False, held.whole(), 0.0
    cut, before = held.glance(), work.method.state(work.model)
    started = time.perf_counter()
    failed = _heal(work, healing, stop, told)
    took = time.perf_counter() - started
    if failed:
        told.note(0, f"rank {healing.r} stays as it was cut: {failed}")
    elif _is_better(healed := held.glance(), cut):
        save()
        return True, held.whole(healed), took
    after = before if failed else work.method.state(work.model)
    work.method.load_state(work.model, before)
    save()
    kept = held.whole(cut)
    work.method.load_state(work.model, after)
    return False, kept, took


def _is_better(healed: HeldOut | None, cut: HeldOut | None) -> bool:
    """Whether it loses no more, or nothing is known; a loss that is not finite never is better."""
    if healed is None or cut is None:
        return True
    return _loss(healed) is not None and (_loss(cut) is None or healed.loss <= cut.loss)


def _heal(work: Work, healing: Healing, stop: StopRequest, told: _Told) -> str | None:
    """Train on for a few steps. Returns why that failed, if it did."""
    # No warm-up, as nothing starts anew; another seed, so that these are not the rows that the run began with.
    own: dict[str, Any] = {"max_steps": healing.steps, "batch_size": healing.batch_size, "lr": healing.lr}
    own |= {"warmup": 0.0, "schedule": "linear", "seed": work.config.seed ^ healing.r}
    short = replace(work, config=work.config.model_copy(update=own), evaluate=None)
    try:
        fit(short, None, lambda state: None, stop, told)
    except NumericsError as error:
        return error.what
    except Interrupted as error:
        raise interrupted(error.signal_number) from None
    return None


def interrupted(signal_number: int) -> Interrupted:
    """What to raise once the run is saved and not all ranks below are."""
    return Interrupted(
        f"stopped by signal {signal_number} while the ranks below were trained; the run itself is saved",
        "Run the same command with --resume to go on",
        signal_number,
    )


class _Told:
    """A bar over all steps on a terminal, and a line for each rank."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        columns = TextColumn("ranks below"), BarColumn(bar_width=24), MofNCompleteColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("ranks", total=steps)

    def __enter__(self) -> _Told:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, report: StepReport) -> None:
        """An optimizer step has ended."""
        self._bar.advance(self._task)

    def evaluated(self, step: int, loss: float, better: bool) -> None:
        """There are no evaluations between steps."""

    def note(self, step: int, message: str) -> None:
        """Something that must not be silent."""
        self._console.print(message, style="yellow", highlight=False)

    def rank(self, found: dict[str, Any]) -> None:
        """One is done."""
        told = f"halved to rank {found['r']}"
        steps = "1 step" if found["steps"] == 1 else f"{found['steps']} steps"
        steps = f"{steps} at {found['lr']:g}" if found["steps"] else ""
        if found["helped"] is not None:
            told += ": held-out loss " + ("not finite" if found["loss"] is None else f"{found['loss']:.4f}")
        if steps:
            told += f" after {steps}" if found["helped"] is not False else f", as {steps} did not help"
        self._console.print(told, highlight=False)
