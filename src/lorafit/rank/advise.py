"""From the held-out loss of every rank to the smallest that is as good as the best, as far as the rows can tell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorafit.errors import NumericsError

# Of the best rank's loss, what another may lose more and still be as good where rows tell every difference: half of the
# 1% that the advice may cost, as the curve of one run is off as well.
LEAST = 0.005


@dataclass(frozen=True)
class AtRank:
    """loss: nats per supervised token of the held-out rows. gap: what it has more than the best rank's.

    se: the standard error of that gap, of the same rows at both ranks; 0 for the best itself. loss_se: of the loss.
    as_good: whether the gap, and that of every rank up to the best, is no more than what can be told or than LEAST.
    """

    r: int
    loss: float
    loss_se: float
    gap: float
    se: float
    as_good: bool


@dataclass(frozen=True)
class Advice:
    """curve: ranks in ascending order. r: the smallest that is as good as the best. reason: why, in a sentence.

    error: the standard error of the difference between two trainings, nats per token; see `error_between_trainings`.
    """

    curve: tuple[AtRank, ...]
    r: int
    reason: str
    error: float


def advise(nats: Mapping[int, Sequence[float]], tokens: Sequence[int]) -> Advice:
    """The smallest rank that is as good as the best.

    That is the rule of one standard error (Breiman et al. 1984, section 3.4.3), of paired rows, with a least difference
    that counts. A rank beyond one that is worse is not as good.

    nats: of each rank its loss on each held-out row, added up over the row's tokens. tokens: supervised ones of each
    row. A rank whose loss is not finite is never advised. Raises NumericsError where there is no other.
    """
    weights = np.array(tokens, dtype=np.float64)
    rows = {r: np.array(nats[r], dtype=np.float64) for r in sorted(nats)}
    losses = {r: float(own.sum() / weights.sum()) for r, own in rows.items()}
    best = min(losses, key=lambda r: (losses[r] if math.isfinite(losses[r]) else math.inf, r))
    if not math.isfinite(losses[best]):
        raise NumericsError("no rank has a finite loss on the held-out rows", "Begin anew with a lower --lr")
    errors = {r: 0.0 if r == best else standard_error(own - rows[best], weights) for r, own in rows.items()}
    error = error_between_trainings(losses, errors, best)
    alike = as_good_as(best, losses, error)
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
    return Advice(curve, min(alike), _reason(curve, best, error), error)


def error_between_trainings(losses: Mapping[int, float], errors: Mapping[int, float], best: int) -> float:
    """The standard error of the difference between two trainings, from ranks that were all made from one.

    Such neighbours are nearly one function, so that their difference has a far smaller error than that between two
    ranks that are each trained by themselves, which is what the advice is about. The rank that differs most from the
    best is about as far from it as one by itself would be (docs/log.md, "What trainings differ by"). An error grows
    with the losses, so that of a rank that is much worse is brought to the best one's by their geometric mean.
    errors: of each rank's difference from the best one.
    """
    others = [r for r in losses if r != best and math.isfinite(losses[r]) and losses[r] > 0]
    return max((errors[r] * math.sqrt(losses[best] / losses[r]) for r in others), default=0.0)


def as_good_as(best: int, losses: Mapping[int, float], error: float) -> set[int]:
    """Ranks that lose no more than the best one but for an error, or LEAST of it, with no worse one between."""
    margin = max(error, LEAST * losses[best])
    within = {r for r in losses if losses[r] - losses[best] <= margin}
    ranks = sorted(losses)
    below = itertools.takewhile(within.__contains__, [r for r in reversed(ranks) if r <= best])
    above = itertools.takewhile(within.__contains__, [r for r in ranks if r >= best])
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


def _reason(curve: Sequence[AtRank], best: int, error: float) -> str:
    alike = [one for one in curve if one.as_good]
    chosen, lowest, highest = alike[0], curve[0].r, curve[-1].r
    if chosen.r == lowest and len(alike) > 1:
        if all(one.gap <= error for one in alike):
            return f"these rows cannot tell r = {chosen.r} from r = {alike[-1].r}: the smallest is enough"
        return f"no rank loses {LEAST:.1%} less than r = {chosen.r}: the smallest is enough"
    if chosen.r == best == highest:
        return (
            f"the loss still falls at r = {best}, the highest that was tried: these rows may need more, or less where "
            "lower ranks are trained by themselves (--verify)"
        )
    if chosen.r == lowest:
        return "it has the lowest loss, and is the smallest that was tried"
    more = _told_of_worse(next(one for one in reversed(curve) if one.r < chosen.r), error)
    if chosen.r == best:
        return f"it has the lowest loss, and {more}"
    how = "within one standard error" if chosen.gap <= error else f"within {LEAST:.1%}"
    return f"its loss is {how} of the lowest, which is that of r = {best}; {more}"


def _told_of_worse(one: AtRank, error: float) -> str:
    if not math.isfinite(one.loss):
        return f"r = {one.r} has no finite loss"
    errors = f" ({one.gap / error:.1f} standard errors of what two trainings differ by)" if error else ""
    return f"r = {one.r} loses {one.gap:.3g} nats a token more than the best{errors}"
