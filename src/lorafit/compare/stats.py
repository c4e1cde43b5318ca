"""How sure a figure is: bootstrap over the test rows, with the spread between seeds on top.

A figure is a ratio of sums over rows (nats over tokens, right answers over rows), averaged over seeds. Rows are drawn
with replacement RESAMPLES times, the same draws for every method, so that a difference is one of the same rows. Two or
three seeds are too few to be drawn from; what they add is the spread of their means, s / sqrt(seeds), times Student's t
with seeds - 1 degrees of freedom. Source: Efron and Tibshirani 1993, chapter 13; Student 1908.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
# Draws that are made at once: bounds the memory for many rows.
CHUNK = 500
SEED = 20_240


@dataclass(frozen=True)
class Scores:
    """What a method reached on each row. sums: (rows, seeds), such as nats; weights: (rows,), such as tokens."""

    sums: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def seeds(self) -> int:
        """How many runs there were."""
        return int(self.sums.shape[1])

    @property
    def value(self) -> float:
        """The figure: the mean over seeds."""
        return float(self.sums.mean(1).sum() / self.weights.sum())


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
    """A figure with its interval, which is cut off at what is possible. Not finite where a score is not."""
    if not np.isfinite(scores.sums).all():
        return Estimate(scores.value, np.nan, np.nan)
    drawn = _resampled(scores.sums.mean(1), scores.weights) + _between_seeds(scores)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(scores.value, float(max(low, least)), float(min(high, most)))


def difference(a: Scores, b: Scores) -> Estimate:
    """What a has more than b on the same rows, seed by seed; of the first seeds that both have, where one has fewer.

    A score of one column, such as the untuned base's, which knows no seeds, stands against each of the other's.
    """
    seeds = min(a.seeds, b.seeds) if min(a.seeds, b.seeds) > 1 else max(a.seeds, b.seeds)
    columns = [one.sums[:, :seeds] if one.seeds > 1 else one.sums for one in (a, b)]
    return estimate(Scores(columns[0] - columns[1], a.weights))


def _resampled(sums: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ratio of sums for rows drawn with replacement: (RESAMPLES,). The draws depend on the number of rows alone."""
    chance, rows = np.random.default_rng(SEED), len(sums)
    found = []
    for first in range(0, RESAMPLES, CHUNK):
        drawn = chance.integers(rows, size=(min(CHUNK, RESAMPLES - first), rows))
        found.append(sums[drawn].sum(1) / weights[drawn].sum(1))
    return np.concatenate(found)


def _between_seeds(scores: Scores) -> NDArray[np.float64] | float:
    """What another draw of seeds would change: (RESAMPLES,), or 0 for one seed, which cannot tell."""
    if scores.seeds < 2:
        return 0.0
    means = scores.sums.sum(0) / scores.weights.sum()
    spread = means.std(ddof=1) / np.sqrt(scores.seeds)
    drawn: NDArray[np.float64] = np.random.default_rng(SEED + 1).standard_t(scores.seeds - 1, RESAMPLES) * spread
    return drawn
