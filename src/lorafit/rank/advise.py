"""From the held-out loss of every rank to the smallest that is as good as the best, as far as the rows can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class AtRank:
    """loss: nats per supervised token of the held-out rows. gap: what it has more than the best rank's.

    se: the standard error of that gap, of the same rows at both ranks; 0 for the best itself. loss_se: of the loss.
    """

    r: int
    loss: float
    loss_se: float
    gap: float
    se: float

    @property
    def is_as_good(self) -> bool:
        """Within one standard error of the best: the rule of Breiman et al. 1984, section 3.4.3, of paired rows."""
        return self.gap <= self.se


@dataclass(frozen=True)
class Advice:
    """curve: ranks in ascending order. r: the smallest that is as good as the best. reason: why, in a sentence."""

    curve: tuple[AtRank, ...]
    r: int
    reason: str


def advise(nats: Mapping[int, Sequence[float]], tokens: Sequence[int]) -> Advice:
    """The smallest rank whose loss is within one standard error of the best.

    nats: of each rank its loss on each held-out row, added up over the row's tokens. tokens: supervised ones of each
    row. A rank whose loss is not finite is never advised.
    """
    weights = np.array(tokens, dtype=np.float64)
    rows = {r: np.array(nats[r], dtype=np.float64) for r in sorted(nats)}
    losses = {r: float(own.sum() / weights.sum()) for r, own in rows.items()}
    best = min(losses, key=lambda r: (losses[r] if math.isfinite(losses[r]) else math.inf, r))
    curve = tuple(
        AtRank(
            r=r,
            loss=losses[r],
            loss_se=standard_error(own, weights),
            gap=losses[r] - losses[best],
            se=0.0 if r == best else standard_error(own - rows[best], weights),
        )
        for r, own in rows.items()
    )
    chosen = next(one for one in curve if one.is_as_good)
    return Advice(curve, chosen.r, _reason(curve, chosen, best))


def standard_error(sums: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Of the ratio sums / weights over rows, by its linear expansion. Source: Cochran 1977, eq. 6.13. Infinite for one.

    sums, weights: (rows,).
    """
    rows = len(sums)
    if rows < 2:
        return math.inf
    left = sums - sums.sum() / weights.sum() * weights
    return float(math.sqrt(rows / (rows - 1) * np.square(left).sum()) / weights.sum())


def _reason(curve: Sequence[AtRank], chosen: AtRank, best: int) -> str:
    alike = [one.r for one in curve if one.is_as_good]
    lowest, highest = curve[0], curve[-1]
    if chosen.r == lowest.r and len(alike) > 1:
        return f"these rows cannot tell r = {alike[0]} from r = {alike[-1]}: the smallest is enough"
    if chosen.r == best == highest.r:
        return (
            f"the loss still falls at r = {best}, the highest that was tried: these rows may need more, or more of them"
        )
    if chosen.r == lowest.r:
        return "it has the lowest loss, and is the smallest that was tried"
    below = next(one for one in reversed(curve) if one.r < chosen.r)
    errors = f" ({below.gap / below.se:.1f} standard errors)" if below.se else ""
    more = f"r = {below.r} loses {below.gap:.3g} nats a token{errors}"
    if chosen.r == best:
        return f"it has the lowest loss, and {more}"
    return f"its loss is within one standard error of the lowest, which is that of r = {best}; {more}"
