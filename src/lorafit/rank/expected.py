"""What the one run of all ranks will take, by the pace of the look, which runs the same steps on the same machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from lorafit.config import RankConfig
from lorafit.train import halving, race


class Pace:
    """When things were done. Called after each."""

    def __init__(self) -> None:
        self._at = [time.perf_counter()]

    def __call__(self) -> None:
        """One more is done."""
        self._at.append(time.perf_counter())

    @property
    def usual(self) -> float:
        """Seconds of one call: the median, as the first allocates what the others find there."""
        return float(np.median(np.diff(self._at)))


@dataclass(frozen=True)
class Expected:
    """Seconds. load: until the first step. train: the steps of the largest rank. race: of the rates that lose.

    lower: of all ranks below, without evaluations. evaluations: of the held-out rows, all of them.
    """

    load: float
    train: float
    race: float
    lower: float
    evaluations: float


def expect(config: RankConfig, most: int, rows: int, held_out: int, load: float, step: float, row: float) -> Expected:
    """What a run will take that trains to its last epoch.

    most: the largest rank. rows, held_out: pieces to train on and to measure. load, step, row: seconds until the first
    step, of a training step of `batch_size` rows, and of one held-out piece.
    """
    per_epoch = -(-rows // config.batch_size)
    steps = config.max_steps or per_epoch * config.epochs
    train = steps * step
    times = -(-steps // per_epoch) + halving.evaluations(most, held_out)
    return Expected(
        load=load,
        train=train,
        race=train * race.share(steps, per_epoch) if config.lr == "auto" else 0.0,
        lower=train * halving.SHARE if most > 1 else 0.0,
        evaluations=times * held_out * row,
    )
