"""How well numbers are predicted: squared and absolute errors, and how far predictions go along with what they are."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class NumbersMeasured:
    """loss: the mean squared error in deviations of the training rows' numbers; mse and mae in the numbers' own units.

    r2: the share of the rows' variance that predictions account for, below 0 where their mean would do better. pearson,
    spearman: None where all are the same. expected, got: of each row.
    """

    loss: float
    mse: float
    mae: float
    r2: float | None
    pearson: float | None
    spearman: float | None
    rows: int
    expected: tuple[float, ...]
    got: tuple[float, ...]
    seconds: float

    @property
    def summary(self) -> dict[str, float]:
        """What decides, by name."""
        found = {"mse": self.mse, "mae": self.mae, "r2": self.r2, "pearson": self.pearson, "spearman": self.spearman}
        return {name: value for name, value in found.items() if value is not None}


def judge_numbers(got: Values, expected: Values, loss: float, started: float) -> NumbersMeasured:
    """got, expected: (rows,), in their own units."""
    errors = got - expected
    spread = float(np.square(expected - expected.mean()).sum())
    return NumbersMeasured(
        loss=loss,
        mse=float(np.square(errors).mean()),
        mae=float(np.abs(errors).mean()),
        r2=1 - float(np.square(errors).sum()) / spread if spread else None,
        pearson=correlation(got, expected),
        spearman=correlation(ranks(got), ranks(expected)),
        rows=len(got),
        expected=tuple(expected.tolist()),
        got=tuple(got.tolist()),
        seconds=time.perf_counter() - started,
    )


def correlation(a: Values, b: Values) -> float | None:
    """Pearson's; None where either is the same everywhere."""
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else None


def ranks(values: Values) -> Values:
    """From 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Values = (last - (counts - 1) / 2)[which]
    return mean
