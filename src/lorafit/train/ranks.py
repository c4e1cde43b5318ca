"""Ranks that go by a schedule: which components of the update each row of a step trains.

nested: the first b components of the update are to be good by themselves for b = 1, 2, 4, ..., r. Of every step's rows
one half sees the whole update and the other half its first b components, b in turn. Sources: Valipour et al. 2023,
DyLoRA, section 3 (a rank is drawn for each step); Yu and Huang 2019, section 3.1 (the largest is always among those of
a step); Kusupati et al. 2022, Matryoshka, eq. 1 (the sum of all ranks' losses, which this is an estimate of).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ladder(r: int) -> list[int]:
    """1, 2, 4, ... below r, and r."""
    return [2**k for k in range((r - 1).bit_length())] + [r]


def shares(r: int, seed: int, step: int, rows: Sequence[int]) -> list[tuple[int | None, list[int]]]:
    """(rank, its rows) of a step; None is the whole update, of rank r. Depends on the arguments alone.

    Over as many steps as there are lower ranks each of them has one, in an order of the seed and of those steps. A
    step of one row goes to the whole update and to a lower rank by turns.
    """
    lower: Sequence[int] = ladder(r)[:-1]
    if not lower:
        return [(None, list(rows))]
    turn, place = divmod(step, len(lower))
    drawn = np.random.Philox(key=np.array([seed, turn], dtype=np.uint64)).random_raw(len(lower))
    both = (None, [row for at, row in enumerate(rows, step) if at % 2 == 0]), (
        lower[int(np.argsort(drawn, kind="stable")[place])],
        [row for at, row in enumerate(rows, step) if at % 2 == 1],
    )
    return [share for share in both if share[1]]
