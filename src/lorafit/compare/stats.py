"""How sure a figure is: bootstrap over the test rows, with the spread between seeds on top.

A figure is a ratio of sums over rows (nats over tokens, right answers over rows), averaged over seeds. Rows are drawn
with replacement RESAMPLES times, the same draws for every method, so that a difference is one of the same rows. Two or
three seeds are too few to be drawn from; what they add is s / sqrt(seeds) times Student's t. They are too few to know
s by as well: it is taken from all methods together, or from the method's own seeds where those lie further apart. A
method whose seeds lie too far apart for that to be chance, one that is not stable, has a spread of its own.
Source: Efron and Tibshirani 1993, chapter 13; Student 1908; Cochran 1941; Satterthwaite 1946.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
# Draws that are made at once: bounds the memory for many rows.
CHUNK = 500
SEED = 20_240
T_DRAWS = 200_000  # enough for a quantile of Student's t to a percent, without a library of distributions
# How rarely the largest of the methods' variances may be called outlying where all are alike.
OUTLYING = 0.01


@dataclass(frozen=True)
class Spread:
    """How far the seeds of a method lie apart. variance: of one seed's figure. freedom: degrees of; 0: not known."""

    variance: float = 0.0
    freedom: int = 0


@dataclass(frozen=True)
class Scores:
    """What a method reached on each row. sums: (rows, seeds), such as nats; weights: (rows,), such as tokens.

    spread: of the seeds of all methods that are alike in that.
    """

    sums: NDArray[np.float64]
    weights: NDArray[np.float64]
    spread: Spread = field(default_factory=Spread)

    @property
    def seeds(self) -> int:
        """How many runs there were."""
        return int(self.sums.shape[1])

    @property
    def value(self) -> float:
        """The figure: the mean over seeds."""
        return float(self.sums.mean(1).sum() / self.weights.sum())

    @property
    def own_variance(self) -> float:
        """Of its own seeds' figures; 0 for one seed, which cannot tell."""
        return float((self.sums.sum(0) / self.weights.sum()).var(ddof=1)) if self.seeds > 1 else 0.0

    @property
    def seed_variance(self) -> float:
        """Of its value, by another draw of seeds; 0 where no method has several."""
        return max(self.own_variance, self.spread.variance) / self.seeds


def pooled(methods: Sequence[Scores]) -> list[Scores]:
    """The same scores, each with the spread of all: the mean of their variances, weighed by seeds - 1.

    Those that are not stable have their own, and are no part of the others'.
    """
    several = [n for n, one in enumerate(methods) if np.isfinite(one.sums).all() and one.seeds > 1]
    alike = list(several)
    while (unstable := _outlying([methods[n] for n in alike])) is not None:
        del alike[unstable]
    common = Spread(_mean_variance([methods[n] for n in alike]), sum(methods[n].seeds - 1 for n in alike))
    own = {n: Spread(methods[n].own_variance, methods[n].seeds - 1) for n in several if n not in alike}
    return [replace(one, spread=own.get(n, common)) for n, one in enumerate(methods)]


def _mean_variance(methods: Sequence[Scores]) -> float:
    return sum(one.own_variance * (one.seeds - 1) for one in methods) / max(1, sum(one.seeds - 1 for one in methods))


def _outlying(methods: Sequence[Scores]) -> int | None:
    """The method whose seeds lie further apart than chance explains, the furthest of them; None where none does.

    Of two methods neither is the odd one. Source: Cochran 1941, as Fisher's F of the largest variance over the mean of
    the others.
    """
    if len(methods) < 3:
        return None
    largest = max(range(len(methods)), key=lambda n: methods[n].own_variance)
    others = [one for n, one in enumerate(methods) if n != largest]
    freedom = sum(one.seeds - 1 for one in others)
    limit = _mean_variance(others) * _f_quantile(1 - OUTLYING / len(methods), methods[largest].seeds - 1, freedom)
    return largest if methods[largest].own_variance > limit else None


@cache
def _f_quantile(level: float, above: int, below: int) -> float:
    """Of Fisher's F with so many degrees of freedom above and below the line."""
    return float(np.quantile(np.random.default_rng(SEED + 3).f(above, below, T_DRAWS), level))


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that holds it with LEVEL."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is real."""
        return self.low > 0 or self.high < 0


def estimate(scores: Scores, least: float = -np.inf, most: float = np.inf) -> Estimate:
    """A figure with its interval, which is cut off at what is possible. Not finite where a score is not.

    most: 1 for a share of rows.
    """
    if not np.isfinite(scores.sums).all():
        return Estimate(scores.value, np.nan, np.nan)
    found = _interval(scores.value, scores.sums.mean(1), scores.weights, scores.seed_variance, _freedom(scores))
    low, high = found.low, found.high
    if most == 1 and found.value in (0, 1):
        # Rows that are all alike tell nothing by being drawn again: the rule of three (Hanley and Lippman-Hand 1983).
        low, high = min(low, found.value - 3 / len(scores.sums)), max(high, found.value + 3 / len(scores.sums))
    return Estimate(found.value, max(low, least), min(high, most))


def difference(a: Scores, b: Scores) -> Estimate:
    """What a has more than b on the same rows, each averaged over its seeds.

    A score without seeds of its own, such as the untuned base's, adds nothing to the spread.
    """
    if not (np.isfinite(a.sums).all() and np.isfinite(b.sums).all()):
        return Estimate(a.value - b.value, np.nan, np.nan)
    sums = a.sums.mean(1) - b.sums.mean(1)
    return _interval(float(sums.sum() / a.weights.sum()), sums, a.weights, *_of_both(a, b))


def _freedom(scores: Scores) -> int:
    return max(scores.spread.freedom, scores.seeds - 1)


def _of_both(a: Scores, b: Scores) -> tuple[float, float]:
    """The variance that seeds give a difference, and its degrees of freedom.

    Source: Satterthwaite 1946 for two spreads known apart; of one spread there is no more to know than its own.
    """
    variance, most = a.seed_variance + b.seed_variance, max(_freedom(a), _freedom(b))
    if a.spread == b.spread or not (a.seed_variance and b.seed_variance):
        return variance, most
    return variance, variance**2 / (a.seed_variance**2 / _freedom(a) + b.seed_variance**2 / _freedom(b))


def _interval(
    value: float, sums: NDArray[np.float64], weights: NDArray[np.float64], seed_variance: float, freedom: float
) -> Estimate:
    drawn = value + (_resampled(sums, weights) - value) * _widened(len(sums))
    if seed_variance > 0:
        drawn = drawn + np.random.default_rng(SEED + 1).standard_t(freedom, RESAMPLES) * np.sqrt(seed_variance)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


@cache
def _widened(rows: int) -> float:
    """By what few rows widen an interval: a bootstrap of n rows is too narrow by the root of 1 - 1/n, and has no t."""
    if rows < 2:
        return 1.0
    chance, ends = np.random.default_rng(SEED + 2), (1 + LEVEL) / 2
    ratio = np.quantile(chance.standard_t(rows - 1, T_DRAWS), ends) / np.quantile(chance.standard_normal(T_DRAWS), ends)
    return float(max(1.0, ratio) * np.sqrt(rows / (rows - 1)))


def _resampled(sums: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ratio of sums for rows drawn with replacement: (RESAMPLES,). The draws depend on the number of rows alone."""
    chance, rows = np.random.default_rng(SEED), len(sums)
    found = []
    for first in range(0, RESAMPLES, CHUNK):
        drawn = chance.integers(rows, size=(min(CHUNK, RESAMPLES - first), rows))
        found.append(sums[drawn].sum(1) / weights[drawn].sum(1))
    return np.concatenate(found)
