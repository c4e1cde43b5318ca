"""The two products of a frozen weight: y = x W^T and its input's gradient g W. W never changes, so it is prepared once.

| precision | the product | W is kept as |
|---|---|---|
| fp32 | oneDNN on weights packed for it; exact, and faster than the BLAS that torch calls | packed, both ways round |
| bf16, fp16 | torch's own, which is oneDNN and needs no packing | as stored |
| either, from fewer bits | the same, on W decoded for each product | GGUF blocks, nf4 or int8 |
| int8 | int8 x int8, int32 sums; a scale a row of x and g, and an output of W and W^T | int8, once for each way |

Where the processor has the instructions, int8 is a kernel of our own, which quantizes, scales and adds the low-rank
update in one pass (`PackedInt8`); elsewhere it is torch's product between passes of quantizing and scaling (`Int8`).

The int8 scheme is that of SwitchBack (Wortsman et al. 2023, algorithm 1), all in 8 bits: of its three products, the one
that needs more is the gradient of W, and a frozen W has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorafit.engine import kernels, workspace
from lorafit.engine.kernels import products
from lorafit.engine.update import Addend
from lorafit.quant.stored import Stored

# Rows multiplied at a time in int8: the int32 sums of one block stay in the cache until they are scaled.
INT8_ROWS = 256


class Product(Protocol):
    """forward: x (n, in) -> x W^T (n, out). backward: g (n, out) -> g W (n, in). In the type of their argument.

    update: what is to be added to the product, of the same shape. thin: A (r, in) -> A W^T (r, out), of a factor A.
    """

    def thin(self, A: Tensor) -> Tensor:
        """The product A W^T, where A is no activation but a few rows."""

    def forward(self, x: Tensor, update: Addend | None = None) -> Tensor:
        """The product x W^T, plus the update."""

    def backward(self, g: Tensor, update: Addend | None = None) -> Tensor:
        """The product g W, plus the update."""


def plus(y: Tensor, update: Addend | None) -> Tensor:
    """Add the update to y, in place."""
    if update is not None:
        update.add_to(y)
    return y


class Dense:
    """torch's own products. W: (out, in), any strides."""

    def __init__(self, W: Tensor) -> None:
        self.W = W

    def thin(self, A: Tensor) -> Tensor:
        """The product A W^T."""
        return torch.mm(A, self.W.T)

    def forward(self, x: Tensor, update: Addend | None = None) -> Tensor:
        """The product x W^T, plus the update."""
        return plus(torch.mm(x, self.W.T, out=workspace.rows(x, len(x), len(self.W))), update)

    def backward(self, g: Tensor, update: Addend | None = None) -> Tensor:
        """The product g W, plus the update."""
        return plus(torch.mm(g, self.W, out=workspace.rows(g, len(g), self.W.shape[1])), update)


class FromStored:
    """Products with a weight that is stored in fewer bits. W is decoded for each of them.

    parts: the rows of W, from the first on, each stored in its own way.
    """

    def __init__(self, parts: Sequence[Stored]) -> None:
        self.parts = tuple(parts)
        self.rows, self.width = sum(len(part.data) for part in self.parts), self.parts[0].width

    def thin(self, A: Tensor) -> Tensor:
        """The product A W^T."""
        return self.decoded(A).thin(A)

    def forward(self, x: Tensor, update: Addend | None = None) -> Tensor:
        """The product x W^T, plus the update."""
        return self.decoded(x).forward(x, update)

    def backward(self, g: Tensor, update: Addend | None = None) -> Tensor:
        """The product g W, plus the update."""
        return self.decoded(g).backward(g, update)

    def decoded(self, like: Tensor) -> Dense:
        """W in the type of `like`, in memory that the next product uses again."""
        W = workspace.block(like, self.rows, self.width)
        first = 0
        for part in self.parts:
            kernels.of(W).decode_(part, W[first : first + len(part.data)])
            first += len(part.data)
        return Dense(W)


class Packed:
    """oneDNN's fp32 products on packed weights. W: (out, in) float32 on a CPU. rows: of a usual x."""

    def __init__(self, W: Tensor, rows: int) -> None:
        self.rows = rows
        self.packed = torch.ops.mkldnn._reorder_linear_weight(W.contiguous(), rows)
        self.transposed: Tensor | None = None  # evaluation never needs it

    def thin(self, A: Tensor) -> Tensor:
        """The product A W^T."""
        return self.forward(A)

    def forward(self, x: Tensor, update: Addend | None = None) -> Tensor:
        """The product x W^T, plus the update."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return plus(y, update)

    def backward(self, g: Tensor, update: Addend | None = None) -> Tensor:
        """The product g W, plus the update."""
        if self.transposed is None:
            W = self.packed.to_dense()
            self.transposed = torch.ops.mkldnn._reorder_linear_weight(W.T.contiguous(), self.rows)
        gx: Tensor = torch.ops.mkldnn._linear_pointwise(g, self.transposed, None, "none", [], "")
        return plus(gx, update)


class Int8:
    """Products in int8. W: (out, in), any floating type. tops: (in,), the largest |x| seen in each column, or None.

    Columns of x that hold outliers would leave the others a few steps of int8. So x is divided by `smooth` and W
    multiplied with it, column by column, which changes nothing but the rounding (Xiao et al. 2023, SmoothQuant, eq. 4).
    """

    def __init__(self, W: Tensor, tops: Tensor | None) -> None:
        smooth = _smoothing(W, tops) if tops is not None else None
        self.inverse = None if smooth is None else 1 / smooth
        q, self.scales = kernels.of(W).quantize_rows(W.contiguous(), smooth)
        self.q = _lasting(q)
        self.W: Tensor | None = W  # until g W is asked for
        self.back: tuple[Tensor, Tensor] | None = None

    def thin(self, A: Tensor) -> Tensor:
        """The product A W^T."""
        return self.forward(A)

    def forward(self, x: Tensor, update: Addend | None = None) -> Tensor:
        """The product x W^T within int8's rounding, plus the update."""
        return plus(_multiply(x, self.inverse, self.q.T, self.scales), update)

    def backward(self, g: Tensor, update: Addend | None = None) -> Tensor:
        """The product g W within int8's rounding, plus the update."""
        if self.back is None:
            assert self.W is not None, "kept until now"
            back, scales = kernels.of(self.W).quantize_columns(self.W.contiguous())
            self.back, self.W = (_lasting(back), scales), None
        return plus(_multiply(g, None, *self.back), update)


class PackedInt8:
    """The same numbers by our own kernel. W: (out, in) bfloat16; both dimensions multiples of 16."""

    def __init__(self, W: Tensor, tops: Tensor | None) -> None:
        smooth = _smoothing(W, tops) if tops is not None else None
        self.operand = products.int8_operand(W, transposed=False, smooth=smooth)
        self.W: Tensor | None = W  # until g W is asked for
        self.transposed: products.Int8Operand | None = None

    def thin(self, A: Tensor) -> Tensor:
        """The product A W^T."""
        return self.forward(A)

    def forward(self, x: Tensor, update: Addend | None = None) -> Tensor:
        """The product x W^T within int8's rounding, plus the update."""
        return _packed_int8(x, self.operand, update)

    def backward(self, g: Tensor, update: Addend | None = None) -> Tensor:
        """The product g W within int8's rounding, plus the update."""
        if self.transposed is None:
            assert self.W is not None, "kept until now"
            self.transposed, self.W = products.int8_operand(self.W, transposed=True), None
        return _packed_int8(g, self.transposed, update)


def _packed_int8(x: Tensor, operand: products.Int8Operand, update: Addend | None) -> Tensor:
    if isinstance(update, products.LowRank):
        return products.int8_product(x, operand, update)
    return plus(products.int8_product(x, operand, None), update)


def make_int8(W: Tensor, tops: Tensor | None) -> Int8 | PackedInt8:
    """The fastest int8 product that this machine has for activations in the type of W. tops: see `Int8`."""
    fits = W.dtype == torch.bfloat16 and W.device.type == "cpu" and all(size % products.LANES == 0 for size in W.shape)
    return PackedInt8(W, tops) if fits and products.has_int8() else Int8(W, tops)


def _lasting(q: Tensor) -> Tensor:
    return workspace.lasting(q, *q.shape, dtype=torch.int8).copy_(q)


SMOOTHING = 0.7  # the share of the difficulty that moves from x to W; 0.5 in the paper, measured better here


def _smoothing(W: Tensor, tops: Tensor) -> Tensor:
    """A factor for each column: tops^a / max|W|^(1-a), held away from zero where a column was never used."""
    sizes = torch.abs(W, out=workspace.block(W, *W.shape))  # in memory that was used before
    largest = sizes.amax(0).float().clamp_min(1e-6)
    tops = tops.float().clamp_min(float(tops.max()) * 1e-4 + 1e-12)
    return tops**SMOOTHING / largest ** (1 - SMOOTHING)


def _multiply(x: Tensor, columns: Tensor | None, q: Tensor, scales: Tensor) -> Tensor:
    """(x * columns) @ (q * scales). x: (n, k). columns: (k,). q: (k, m) int8. scales: (m,). Returns (n, m) like x."""
    y = workspace.rows(x, len(x), q.shape[1])
    for rows in _blocks(len(x)):
        q_x, scales_x = kernels.of(x).quantize_rows(x[rows], columns)
        kernels.of(x).dequantize_(torch._int_mm(q_x, q), scales_x, scales, y[rows], False)
    return y


def _blocks(count: int) -> list[slice]:
    """About INT8_ROWS rows each, all of one size but the last: a short block wastes most of a product's setting up."""
    blocks = max(1, round(count / INT8_ROWS))
    size = max(1, -(-count // blocks))
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
