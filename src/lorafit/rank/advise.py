"""From the held-out loss of every rank to the smallest that is as good as the best, as far as the rows can tell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Of the best rank's loss, what another may lose more and still be as good. Neighbours of one chain are nearly the same
# function: the standard error of their difference is far below that between two runs, and finds what nobody would pay
# twice the parameters for.
LEAST = 0.01


@dataclass(frozen=True)
class AtRank:
    """loss: nats per supervised token of the held-out rows. gap: what it has more than the best rank's.

    se: the standard error of that gap, of the same rows at both ranks; 0 for the best itself. loss_se: of the loss.
    as_good: whether the gap is no more than one standard error or LEAST, and that of every rank up to the best as well.
    """

    r: int
    loss: float
    loss_se: float
    gap: float
    se: float
    as_good: bool


@dataclass(frozen=True)
class Advice:
    """curve: ranks in ascending order. r: the smallest that is as good as the best. reason: why, in a sentence."""

    curve: tuple[AtRank, ...]
    r: int
    reason: str


def advise(nats: Mapping[int, Sequence[float]], tokens: Sequence[int]) -> Advice:
    """The smallest rank that is as good as the best.

    That is the rule of one standard error (Breiman et al. 1984, section 3.4.3), of paired rows, with a least difference
    that counts. A rank beyond one that is worse is not as good, whatever its own rows say: its error is only wider.

    nats: of each rank its loss on each held-out row, added up over the row's tokens. tokens: supervised ones of each
    row. A rank whose loss is not finite is never advised.
    """
    weights = np.array(tokens, dtype=np.float64)
    rows = {r: np.array(nats[r], dtype=np.float64) for r in sorted(nats)}
    losses = {r: float(own.sum() / weights.sum()) for r, own in rows.items()}
    best = min(losses, key=lambda r: (losses[r] if math.isfinite(losses[r]) else math.inf, r))
    errors = {r: 0.0 if r == best else standard_error(own - rows[best], weights) for r, own in rows.items()}
    alike = _alike(losses, errors, best)
    curve = tuple(
        AtRank(
            r=r,
            loss=losses[r],
            loss_se=standard_error(own, weights),
            gap=losses[r] - losses[best],
            se=errors[r],
            as_good=r in alike,
        )
        for r, own in rows.items()
    )
    return Advice(curve, min(alike), _reason(curve, best))


def _alike(losses: dict[int, float], errors: Mapping[int, float], best: int) -> set[int]:
    """Ranks as good as the best, with no worse one between. losses: from the smallest rank."""
    within = {r for r in losses if losses[r] - losses[best] <= max(errors[r], LEAST * losses[best])}
    below = itertools.takewhile(within.__contains__, [r for r in reversed(losses) if r <= best])
    above = itertools.takewhile(within.__contains__, [r for r in losses if r >= best])
    return {*below, *above}


def standard_error(sums: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Of the ratio sums / weights over rows, by its linear expansion. Source: Cochran 1977, eq. 6.13. Infinite for one.

    sums, weights: (rows,).
    """
    rows = len(sums)
    if rows < 2:
        return math.inf
    left = sums - sums.sum() / weights.sum() * weights
    return float(math.sqrt(rows / (rows - 1) * np.square(left).sum()) / weights.sum())


def _reason(curve: Sequence[AtRank], best: int) -> str:
    alike = [one for one in curve if one.as_good]
    chosen, lowest, highest = alike[0], curve[0].r, curve[-1].r
    if chosen.r == lowest and len(alike) > 1:
        if all(one.gap <= one.se for one in alike):
            return f"these rows cannot tell r = {chosen.r} from r = {alike[-1].r}: the smallest is enough"
        return f"no rank loses {LEAST:.0%} less than r = {chosen.r}: the smallest is enough"
    if chosen.r == best == highest:
        return (
            f"the loss still falls at r = {best}, the highest that was tried: these rows may need more, or less where "
            "lower ranks are trained by themselves (--verify)"
        )
    if chosen.r == lowest:
        return "it has the lowest loss, and is the smallest that was tried"
    below = next(one for one in reversed(curve) if one.r < chosen.r)
    errors = f" ({below.gap / below.se:.1f} standard errors)" if below.se else ""
    more = f"r = {below.r} loses {below.gap:.3g} nats a token{errors}"
    if chosen.r == best:
        return f"it has the lowest loss, and {more}"
    how = "within one standard error" if chosen.gap <= chosen.se else f"within {LEAST:.0%}"
    return f"its loss is {how} of the lowest, which is that of r = {best}; {more}"
