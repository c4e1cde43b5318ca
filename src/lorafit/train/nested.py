"""Ranks that are trained nested: which components of the update each row of a step trains, and how fast.

The first b components of the update are to be good by themselves for b = 1, 2, 4, ..., r. Of every step's rows
a third each sees the whole update, its first component, and its first b, b in turn. Sources: Valipour et al. 2023,
DyLoRA, algorithm 1 (a rank is drawn for each step); Yu and Huang 2019, the sandwich rule (the largest and the smallest
are always among those of a step); Kusupati et al. 2022, Matryoshka, eq. 1 (the sum over all ranks of their losses).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lorafit.config import TrainConfig
from lorafit.errors import ConfigError
from lorafit.methods.spectral import MOVING

CAN_BE_CUT = ("lora", "lora-fa")


def ladder(r: int) -> list[int]:
    """1, 2, 4, ... below r, and r."""
    return [2**k for k in range((r - 1).bit_length())] + [r]


def ranks(config: TrainConfig) -> list[int]:
    """The ranks that a run of these settings trains to be used alone, the whole update's last; none by default."""
    return ladder(max([config.r, *config.rank_pattern.values()])) if config.rank_schedule == "nested" else []


def check(config: TrainConfig, labelled: bool) -> None:
    """Refuse nested ranks where their first components are no adapter by themselves. Raises ConfigError.

    labelled: whether a head of labels is trained.
    """
    if not ranks(config):
        return
    reasons = {
        f"--method {config.method}, which has no rank": config.method != "lora",
        f"--variant {config.variant}, of whose update the first components are none": config.variant not in CAN_BE_CUT,
        f"--init {config.init}, whose update is saved together with what W0 gave up": config.init in MOVING,
        "--add-tokens, and an adapter with tokens of its own cannot be cut": bool(config.add_tokens),
        "rows with labels, and an adapter with a head of labels cannot be cut": labelled,
        "--lr auto, which finds the rate of a whole update": config.lr == "auto",
        "rank 1, below which there is none": ranks(config) == [1],
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason:
        raise ConfigError(f"--rank-schedule {config.rank_schedule} is given with {reason}", "Leave one of the two out")


def shares_of(config: TrainConfig, step: int, rows: list[int]) -> list[tuple[int | None, list[int]]]:
    """(rank, its rows) of a step, by the schedule of the settings; None is the whole update."""
    found = ranks(config)
    return shares(found, config.seed, step, rows) if found else [(None, rows)]


def shares(ladder: Sequence[int], seed: int, step: int, rows: Sequence[int]) -> list[tuple[int | None, list[int]]]:
    """(rank, its rows) of a step of a nested run. Depends on the arguments alone.

    A third of the rows each for the whole update, for rank 1 and for a rank between; over as many steps as there are
    such ranks each has one, in an order of the seed and of those steps. A step of fewer rows takes turns.
    """
    between = ladder[1:-1]
    drawn: list[int | None] = [None, ladder[0]]
    if between:
        turn, place = divmod(step, len(between))
        keys = np.random.Philox(key=np.array([seed, turn], dtype=np.uint64)).random_raw(len(between))
        drawn.append(between[int(np.argsort(keys, kind="stable")[place])])
    own = [[row for at, row in enumerate(rows, step) if at % len(drawn) == number] for number in range(len(drawn))]
    return [(r, some) for r, some in zip(drawn, own, strict=True) if some]


@contextmanager
def slower_by_rank(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Component k of each update moves 1 / sqrt(k) as far as the optimizer's step in here takes it.

    Of two updates whose numbers have all moved by the same amount d the products B A differ as r d^2 where the
    components agree, so that a good rate falls as 1 / sqrt(r) with the rank. So each component has the rate that suits
    the smallest rank it is a part of.
    """
    with torch.no_grad():
        before = {name: parameter.clone() for name, parameter in parameters.items()}
        yield
        for name, parameter in parameters.items():
            axis = 0 if name.endswith(".lora_A") else 1
            shape = [-1 if at == axis else 1 for at in range(parameter.dim())]
            k = torch.arange(1, parameter.shape[axis] + 1, dtype=parameter.dtype, device=parameter.device)
            parameter.lerp_(before[name], 1 - k.rsqrt().view(shape))
