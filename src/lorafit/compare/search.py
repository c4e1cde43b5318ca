"""Which learning rate next: a few around the method's usual one, further out where the best is at the edge."""

from __future__ import annotations

import math
from collections.abc import Mapping

# One step of the search in either direction, and how many steps out from the usual rate it may go.
STEP, FURTHEST = 4.0, 3
# So many rates are tried first whatever their losses.
FIRST = 3


def next_factor(tried: Mapping[float, float], most: int) -> float | None:
    """What to multiply the usual rate by in the next trial; None when the search is over.

    tried: factor -> loss, infinite where training failed. most: trials in all. First 1, 1/4 and 4; then on in the
    direction of the best until it lies between two others; then halfway between the best and its better neighbour.
    """
    if len(tried) >= most:
        return None
    for first in (1.0, 1 / STEP, STEP):
        if first not in tried:
            return first
    best = min(tried, key=lambda factor: tried[factor])
    for outer, is_edge in ((best / STEP, best == min(tried)), (best * STEP, best == max(tried))):
        if is_edge and abs(math.log(outer, STEP)) <= FURTHEST:
            return outer
    neighbours = [factor for factor in (best / STEP, best * STEP) if math.isfinite(tried.get(factor, math.inf))]
    if not neighbours:
        return None
    halfway = math.sqrt(best * min(neighbours, key=lambda factor: tried[factor]))
    return halfway if not any(math.isclose(halfway, factor) for factor in tried) else None


def sure_factors(tried: Mapping[float, float], most: int) -> list[float]:
    """What will be tried next whatever comes out of it: the first ones together, later ones one by one."""
    known, sure = dict(tried), list[float]()
    while (factor := next_factor(known, most)) is not None and (not sure or len(known) < FIRST):
        sure.append(factor)
        known[factor] = math.inf
    return sure
