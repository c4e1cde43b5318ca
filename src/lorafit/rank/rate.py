"""The learning rate that goes with a rank."""

from __future__ import annotations

import math

from lorafit.config import RATES, LoRAConfig


def rate_of(r: int) -> float:
    """A peak rate for LoRA of rank r with alpha = 2r: the usual one at the usual rank, and as 1 / sqrt(r) from there.

    Of updates whose numbers have all moved by d the products B A differ as r d^2 where components agree. See
    docs/rank.md for how far it is from the best ones.
    """
    usual = int(LoRAConfig.model_fields["r"].default)
    return float(f"{RATES['lora'] * math.sqrt(usual / r):.2g}")
