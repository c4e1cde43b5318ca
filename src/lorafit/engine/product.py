"""The two products of a frozen weight: y = x W^T and its input's gradient g W. W never changes, so it is prepared once.

| precision | the product | W is kept as |
|---|---|---|
| fp32 | oneDNN on weights packed for it; exact, and faster than the BLAS that torch calls | packed, both ways round |
| bf16, fp16 | torch's own, which is oneDNN and needs no packing | as stored |
| int8 | int8 x int8 with int32 sums: rows of x, and rows of W, each with their own scale | int8, once for both ways |

The int8 scheme is that of SwitchBack (Wortsman et al. 2023, algorithm 1) without its third product: a frozen W has no
gradient. g W sums over the rows of W, so their scales are multiplied into g before it is quantized.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.engine import kernels

# Rows multiplied at a time in int8: the int32 sums of one block stay in the cache until they are scaled.
INT8_ROWS = 256


class Product(Protocol):
    """forward: x (n, in) -> x W^T (n, out). backward: g (n, out) -> g W (n, in). In the type of their argument."""

    def forward(self, x: Tensor) -> Tensor:
        """X W^T."""

    def backward(self, g: Tensor) -> Tensor:
        """G W."""


class Dense:
    """torch's own products. W: (out, in), any strides."""

    def __init__(self, W: Tensor) -> None:
        self.W = W

    def forward(self, x: Tensor) -> Tensor:
        """X W^T."""
        return F.linear(x, self.W)

    def backward(self, g: Tensor) -> Tensor:
        """G W."""
        return g @ self.W


class Packed:
    """oneDNN's fp32 products on packed weights. W: (out, in) float32 on a CPU. rows: of a usual x."""

    def __init__(self, W: Tensor, rows: int) -> None:
        self.W, self.rows = W, rows
        self.packed = torch.ops.mkldnn._reorder_linear_weight(W.contiguous(), rows)
        self.transposed: Tensor | None = None  # evaluation never needs it

    def forward(self, x: Tensor) -> Tensor:
        """X W^T."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return y

    def backward(self, g: Tensor) -> Tensor:
        """G W."""
        if self.transposed is None:
            self.transposed = torch.ops.mkldnn._reorder_linear_weight(self.W.T.contiguous(), self.rows)
        gx: Tensor = torch.ops.mkldnn._linear_pointwise(g, self.transposed, None, "none", [], "")
        return gx


class Int8:
    """Products in int8. W: (out, in), any floating type."""

    def __init__(self, W: Tensor) -> None:
        self.q, self.scales = kernels.of(W).quantize_rows(W.contiguous(), None)

    def forward(self, x: Tensor) -> Tensor:
        """X W^T, within `forward_bound`."""
        y = x.new_empty(len(x), len(self.q))
        for rows in _blocks(len(x)):
            q, scales = kernels.of(x).quantize_rows(x[rows], None)
            kernels.of(x).dequantize_(torch._int_mm(q, self.q.T), scales, self.scales, y[rows], False)
        return y

    def backward(self, g: Tensor) -> Tensor:
        """G W."""
        gx = g.new_empty(len(g), self.q.shape[1])
        for rows in _blocks(len(g)):
            q, scales = kernels.of(g).quantize_rows(g[rows], self.scales)
            kernels.of(g).dequantize_(torch._int_mm(q, self.q), scales, None, gx[rows], False)
        return gx


def _blocks(count: int) -> list[slice]:
    return [slice(first, min(first + INT8_ROWS, count)) for first in range(0, count, INT8_ROWS)]
