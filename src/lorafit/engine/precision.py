"""Which type the frozen base computes in.

On a CPU without native bf16 it is far slower than fp32: measure, never assume.
"""

from __future__ import annotations

import time

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# bf16 rounds to 8 bits of mantissa: it must pay for that with time.
BF16_MUST_BE_FASTER_BY = 1.3


def choose(precision: str) -> str:
    """`fp32` or `bf16` as asked; for `auto`, bf16 if its matrix products are at least 1.3 times as fast here."""
    if precision != "auto":
        return precision
    return "bf16" if _product_s("fp32") > BF16_MUST_BE_FASTER_BY * _product_s("bf16") else "fp32"


def _product_s(precision: str) -> float:
    """Seconds, the best of five, for x W^T with x (512, 576) and W (1536, 576)."""
    x = torch.ones(512, 576, dtype=DTYPES[precision])
    weight = torch.ones(1536, 576, dtype=DTYPES[precision])
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return best
