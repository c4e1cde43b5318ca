"""The update itself, dW = scaling * B A, written in the slowest and most obvious way: the oracle of everything faster.

Source: Hu et al. 2021 (LoRA), section 4.1, eq. 3; Kalajdzievski 2023 (rsLoRA), eq. 4 for alpha/sqrt(r).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lorafit.errors import ConfigError, RankError, did_you_mean, listed

SCALING: dict[str, Callable[[int, float], float]] = {
    "alpha/r": lambda r, alpha: alpha / r,
    "alpha/sqrt(r)": lambda r, alpha: alpha / math.sqrt(r),
}


def scaling(r: int, alpha: float, rule: str) -> float:
    """The factor of B A in the update, by the rule's name in `SCALING`.

    Raises RankError if r < 1, ConfigError if alpha is not a finite number above 0 or the rule is unknown.
    Source: Hu et al. 2021, section 4.1 ("alpha/r"); Kalajdzievski 2023, eq. 4 ("alpha/sqrt(r)", rsLoRA).
    """
    check_rank(r)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha must be a finite number above 0, got {alpha!r}", "Twice the rank is a usual choice")
    if rule not in SCALING:
        hint = did_you_mean(rule, SCALING) or "Choose one of them"
        raise ConfigError(f"scaling rule {rule!r} is not known; there are {listed(SCALING)}", hint)
    return SCALING[rule](r, alpha)


def check_rank(r: int) -> None:
    """Raises RankError if r is not a whole number of at least 1."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise RankError(f"r must be a whole number of at least 1, got {r!r}", "8 or 16 is a usual start")


def delta_weight(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The update dW = scaling * B A, computed in float32 (in float64 if a factor is float64).

    lora_A: (r, in) or (r, in / groups, *kernel). lora_B: (out, r) or (out, r, 1, ...). Trailing dimensions are
    flattened. Returns (out, in_flat). Source: Hu et al. 2021, eq. 3.
    """
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    return scaling * (lora_B.flatten(1).to(dtype) @ lora_A.flatten(1).to(dtype))
