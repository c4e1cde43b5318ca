"""Matrix products in C++ (`products.cpp`): of a frozen weight in int8, and the narrow ones of its low-rank update.

Activations are bfloat16 on a CPU, factors float32. All dimensions but the number of rows are multiples of LANES. An
*operand* is a matrix laid out for the products, opaque here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.engine import workspace
from lorafit.engine.kernels.build import library

LANES, PANEL = 16, 64
P, N, F = c_void_p, c_int64, c_float
ARGUMENTS: dict[str, tuple[type, ...]] = {
    "pack_rows_f32": (P, P, P, P, N, N),
    "pack_rows_bf16": (P, P, P, P, N, N),
    "pack_columns_f32": (P, P, P, N, N),
    "pack_columns_bf16": (P, P, P, N, N),
    "int8_product": (P, N, P, P, P, P, N, N, P, P, N, P, N, P, P, N, P, N),
    "pack_factor_rows": (P, N, N, N, N, F, P),
    "pack_factor_columns": (P, N, N, N, N, N, N, F, P),
    "narrow_product": (P, N, N, N, P, N, P, N),
    "add_low_rank": (P, N, P, P, N, P, N, N, N),
    "pair_rows": (P, N, N, P),
    "outer_sum": (P, N, N, N, P, N, N, N, F, P, N, N),
}


def padded(rank: int) -> int:
    """The next multiple of LANES."""
    return -(-rank // LANES) * LANES


@functools.cache
def has_int8() -> bool:
    """Whether this machine's int8 product is ours."""
    loaded = library()
    return loaded is not None and bool(loaded.int8_products())


@functools.cache
def has_low_rank() -> bool:
    """Whether this machine's low-rank products are ours."""
    loaded = library()
    return loaded is not None and bool(loaded.low_rank_products())


@functools.cache
def _function(name: str) -> Callable[..., None]:
    loaded = library()
    assert loaded is not None, "ask has_int8() or has_low_rank() first"
    function: Callable[..., None] = loaded[name]
    function.argtypes, function.restype = ARGUMENTS[name], None  # type: ignore[attr-defined]  # ctypes' own
    return function


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


class _Span(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("first_column", "columns", "first_rank", "ranks", "offset")]


@dataclass(frozen=True)
class Spans:
    """Whose columns of y take which ranks of h: for each, (first column, columns, first rank, ranks), padded ranks."""

    parts: tuple[tuple[int, int, int, int], ...]

    @functools.cached_property
    def array(self) -> Any:
        """As C reads it. A part's operand begins where the ones before it end."""
        offsets = [sum(columns * ranks for _, columns, _, ranks in self.parts[:i]) for i in range(len(self.parts))]
        return (_Span * len(self.parts))(*[_Span(*part, at) for part, at in zip(self.parts, offsets, strict=True)])

    @property
    def cells(self) -> int:
        """Of the operand of all parts together."""
        return sum(columns * ranks for _, columns, _, ranks in self.parts)


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank sum h B^T still to be added. h: (n, ranks) bfloat16, contiguous. operand: of the spans in turn."""

    h: Tensor
    operand: Tensor
    spans: Spans

    def add_to(self, y: Tensor) -> None:
        """Add h B^T to y. y: (n, out) bfloat16."""
        _function("add_low_rank")(
            *(self.h.data_ptr(), self.h.shape[1], self.operand.data_ptr(), ctypes.addressof(self.spans.array)),
            *(len(self.spans.parts), y.data_ptr(), y.stride(0), *y.shape),
        )


@dataclass(frozen=True, eq=False)
class Int8Operand:
    """A matrix in int8 with a scale for each of its `columns`. smooth: what rows are multiplied with first, or None."""

    packed: Tensor
    scales: Tensor
    columns: int
    smooth: Tensor | None


def int8_operand(W: Tensor, transposed: bool, smooth: Tensor | None = None) -> Int8Operand:
    """The operand of x (W / smooth)^T, or of g W where transposed. W: (out, in), float32 or bfloat16."""
    W = W.contiguous()
    out, width = W.shape
    columns, depth = (width, out) if transposed else (out, width)
    panels = -(-columns // PANEL)
    packed = workspace.lasting(W, panels * PANEL * depth, dtype=torch.uint8)
    scales = workspace.lasting(W, panels * PANEL, dtype=torch.float32)
    suffix = "f32" if W.dtype == torch.float32 else "bf16"
    if transposed:
        _function(f"pack_columns_{suffix}")(W.data_ptr(), packed.data_ptr(), scales.data_ptr(), out, width)
        return Int8Operand(packed, scales, columns, None)
    pointer = None if smooth is None else smooth.data_ptr()
    _function(f"pack_rows_{suffix}")(W.data_ptr(), pointer, packed.data_ptr(), scales.data_ptr(), out, width)
    return Int8Operand(packed, scales, columns, None if smooth is None else 1 / smooth)


def int8_product(x: Tensor, operand: Int8Operand, update: LowRank | None) -> Tensor:
    """The product x W^T in int8, with a scale for each row of x, plus the update: (n, columns).

    x: (n, depth) bfloat16; rows may be apart.
    """
    x = _rows(x)
    n, depth = x.shape
    y = workspace.rows(x, n, operand.columns)
    q = workspace.rows(x, n, depth, dtype=torch.int8)
    scales, offsets = x.new_empty(n, dtype=torch.float32), x.new_empty(n, dtype=torch.int32)
    low_rank = (None, 0, None, None, 0)
    if update is not None:
        parts = update.spans
        low_rank = (  # type: ignore[assignment]  # None above
            *(update.h.data_ptr(), update.h.shape[1], update.operand.data_ptr()),
            *(ctypes.addressof(parts.array), len(parts.parts)),
        )
    _function("int8_product")(
        *(x.data_ptr(), x.stride(0), None if operand.smooth is None else operand.smooth.data_ptr()),
        *(q.data_ptr(), scales.data_ptr(), offsets.data_ptr(), n, depth),
        *(operand.packed.data_ptr(), operand.scales.data_ptr(), operand.columns),
        *(*low_rank, y.data_ptr(), y.stride(0)),
    )
    return y


def pack_rows_(factor: Tensor, scale: float, operand: Tensor) -> None:
    """The operand whose columns are the rows of `factor` (columns, depth), each padded to LANES, times scale."""
    columns, depth = factor.shape
    _function("pack_factor_rows")(
        factor.data_ptr(), columns, depth, padded(columns), padded(depth), scale, operand.data_ptr()
    )


def pack_columns_(factor: Tensor, scale: float, operand: Tensor, first_depth: int, depth: int) -> None:
    """The operand whose columns are those of `factor`, written from `first_depth` on into one that is `depth` deep."""
    rows, columns = factor.shape
    _function("pack_factor_columns")(
        *(factor.data_ptr(), rows, columns, padded(rows), padded(columns), first_depth, depth, scale),
        operand.data_ptr(),
    )


def narrow_product_(x: Tensor, operand: Tensor, y: Tensor) -> None:
    """Y = x operand, for a y of few columns. x: (n, depth), y: (n, columns); rows may be apart."""
    _function("narrow_product")(
        *(x.data_ptr(), x.stride(0), *x.shape, operand.data_ptr(), y.shape[1], y.data_ptr(), y.stride(0))
    )


class Pairs:
    """The rows of a (n, ranks) matrix laid out for sums over n."""

    def __init__(self, a: Tensor) -> None:
        n, self.ranks = a.shape
        self.pairs = a.new_empty((n + 1) // 2 * 2, self.ranks)
        _function("pair_rows")(a.data_ptr(), n, self.ranks, self.pairs.data_ptr())

    def outer_sum(self, first: int, ranks: int, x: Tensor, scale: float, transposed: bool) -> Tensor:
        """Scale * a[:, first : first + ranks]^T x, float32: (ranks, width), or (width, ranks) where transposed."""
        n, width = x.shape
        out = x.new_empty(*((width, ranks) if transposed else (ranks, width)), dtype=torch.float32)
        strides = (1, ranks) if transposed else (width, 1)
        _function("outer_sum")(
            *(self.pairs.data_ptr(), self.ranks, first, ranks, x.data_ptr(), x.stride(0), n, width),
            *(scale, out.data_ptr(), *strides),
        )
        return out
