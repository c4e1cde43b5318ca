"""How a fresh A is drawn. B is always zero, so that a fresh adapter changes nothing.

Source: Hu et al. 2021, section 4.1: "a random Gaussian initialization for A and zero for B, so dW = BA is zero at the
beginning of training".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A ~ N(0, (1/r)^2), that is, a standard deviation of 1/r. shape: (r, ...). Returns float32 on the CPU."""
    return torch.empty(shape).normal_(0.0, 1.0 / shape[0], generator=generator)


def kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A ~ U(-b, b), b = 1/sqrt(fan_in), fan_in = the size of one row of A. shape: (r, ...). float32 on the CPU.

    Source: He et al. 2015, eq. 14 with a leaky slope of sqrt(5), which is what `nn.Linear` and Microsoft's loralib use.
    """
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


INITS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "gaussian": gaussian,
    "kaiming": kaiming,
}


def stable_hash(text: str) -> int:
    """63 bits that depend on the text alone (Python's own hash changes with the process)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def layer_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one layer, keyed by its name: adding a target does not change how the others start."""
    return torch.Generator().manual_seed(stable_hash(f"{seed}:{name}"))
