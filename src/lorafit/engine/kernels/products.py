"""Matrix products in C++ (`products.cpp`): of a frozen weight in int8, and the narrow ones of its low-rank update.

Activations are bfloat16 on a CPU, factors float32. All dimensions but the number of rows are multiples of LANES. An
*operand* is a matrix laid out for the products, opaque here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafit.engine import workspace
from lorafit.engine.kernels.build import library

LANES, PANEL = 16, 64
P, N = c_void_p, c_int64
ARGUMENTS: dict[str, tuple[type, ...]] = {
    "pack_rows": (P, P, P, P, N, N),
    "pack_columns": (P, P, P, N, N),
    "int8_product": (P, N, P, P, P, P, N, N, P, P, N, P, N, P, P, N, P, N),
    "update_down": (P, N, N, N, P, N, N, P, P, P),
    "update_down_backward": (P, N, N, N, P, N, N, P, P, P),
    "update_gradients": (P, N, N, N, P, N, P, P, N, P, N, P, P),
    "add_low_rank": (P, N, P, P, N, P, N, N, N),
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


class _Factor(ctypes.Structure):
    _fields_ = [("at", _Span), ("A", c_void_p), ("B", c_void_p), ("rank", c_int64), ("scale", c_float)]


@dataclass(frozen=True)
class Spans:
    """Whose columns of y take which ranks of h: for each, (first column, columns, first rank, ranks), padded ranks."""

    parts: tuple[tuple[int, int, int, int], ...]

    @functools.cached_property
    def array(self) -> Any:
        """As C reads it. A part's operand begins where the ones before it end."""
        offsets = [sum(columns * ranks for _, columns, _, ranks in self.parts[:i]) for i in range(len(self.parts))]
        return (_Span * len(self.parts))(*[_Span(*part, at) for part, at in zip(self.parts, offsets, strict=True)])

    @functools.cached_property
    def cells(self) -> int:
        """Of the operand of all parts together."""
        return sum(columns * ranks for _, columns, _, ranks in self.parts)

    @functools.cached_property
    def ranks(self) -> int:
        """Of all parts together: the width of h."""
        return sum(ranks for _, _, _, ranks in self.parts)


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


class Factors:
    """The factors of layers that share an input, in turn A: (rank, width) and B: (columns, rank), float32."""

    def __init__(self, tensors: Sequence[Tensor], scalings: tuple[float, ...], spans: Spans) -> None:
        self.tensors = [
            t if t.dtype == torch.float32 and t.is_contiguous() else t.float().contiguous() for t in tensors
        ]
        self.width, self.spans = tensors[0].shape[1], spans
        self.is_silent = not any(scalings)
        pointers = tuple(t.data_ptr() for t in self.tensors)
        self.array = _factors(pointers, tuple(len(A) for A in tensors[::2]), scalings, spans)
        self.head = (ctypes.addressof(self.array), len(spans.parts), self.width, spans.ranks)

    def down(self, x: Tensor) -> tuple[Tensor, LowRank | None]:
        """(h, h B^T to be added), h = x A^T: (n, ranks). The sum is None where every scaling is 0."""
        n, ranks = x.shape[0], self.spans.ranks
        h = x.new_empty(n, ranks)
        up = None if self.is_silent else x.new_empty(self.spans.cells)
        _function("update_down")(
            *(*self.head, x.data_ptr(), x.stride(0), n, workspace.scratch("down", 2 * ranks * self.width)),
            *(None if up is None else up.data_ptr(), h.data_ptr()),
        )
        return h, None if up is None else LowRank(h, up, self.spans)

    def down_backward(self, g: Tensor) -> tuple[Tensor, LowRank]:
        """(gh, gh A to be added), gh = g B: (n, ranks)."""
        n, ranks = g.shape[0], self.spans.ranks
        gh, up = g.new_empty(n, ranks), g.new_empty(ranks * self.width)
        down = workspace.scratch("down", 2 * self.spans.cells)
        _function("update_down_backward")(
            *(*self.head, g.data_ptr(), g.stride(0), n, down, up.data_ptr(), gh.data_ptr())
        )
        return gh, LowRank(gh, up, _whole(self.width, ranks))

    def gradients(self, x: Tensor, h: Tensor, g: Tensor, gh: Tensor) -> list[Tensor]:
        """Those of the factors, float32."""
        n = x.shape[0]
        found = [torch.empty_like(t) for t in self.tensors]
        pairs = workspace.scratch("pairs", 4 * (n + 1) * self.spans.ranks)
        pointers = (c_void_p * len(found))(*[t.data_ptr() for t in found])
        _function("update_gradients")(
            *(*self.head, x.data_ptr(), x.stride(0), h.data_ptr(), g.data_ptr(), g.stride(0), gh.data_ptr(), n),
            *(pairs, ctypes.addressof(pointers)),
        )
        return found


@functools.lru_cache(maxsize=4096)
def _factors(pointers: tuple[int, ...], ranks: tuple[int, ...], scalings: tuple[float, ...], spans: Spans) -> Any:
    """As C reads them. The optimizer writes in place, so every step asks for the same."""
    rows = zip(spans.array, pointers[::2], pointers[1::2], ranks, scalings, strict=True)
    return (_Factor * len(ranks))(*[_Factor(*row) for row in rows])


@functools.lru_cache(maxsize=256)
def _whole(width: int, ranks: int) -> Spans:
    return Spans(((0, width, 0, ranks),))


@dataclass(frozen=True, eq=False)
class Int8Operand:
    """A matrix in int8 with a scale for each of its `columns`. smooth: what rows are multiplied with first, or None."""

    packed: Tensor
    scales: Tensor
    columns: int
    smooth: Tensor | None


def int8_operand(W: Tensor, transposed: bool, smooth: Tensor | None = None) -> Int8Operand:
    """The operand of x (W / smooth)^T, or of g W where transposed. W: (out, in) bfloat16."""
    W = W.contiguous()
    out, width = W.shape
    columns, depth = (width, out) if transposed else (out, width)
    panels = -(-columns // PANEL)
    packed = workspace.lasting(W, panels * PANEL * depth, dtype=torch.uint8)
    scales = workspace.lasting(W, panels * PANEL, dtype=torch.float32)
    if columns % PANEL:  # what fills up the last panel
        packed[(panels - 1) * PANEL * depth :] = 0
        scales[columns:] = 0
    if transposed:
        _function("pack_columns")(W.data_ptr(), packed.data_ptr(), scales.data_ptr(), out, width)
        return Int8Operand(packed, scales, columns, None)
    pointer = None if smooth is None else smooth.data_ptr()
    _function("pack_rows")(W.data_ptr(), pointer, packed.data_ptr(), scales.data_ptr(), out, width)
    return Int8Operand(packed, scales, columns, None if smooth is None else 1 / smooth)


def int8_product(x: Tensor, operand: Int8Operand, update: LowRank | None) -> Tensor:
    """The product x W^T in int8, with a scale for each row of x, plus the update: (n, columns).

    x: (n, depth) bfloat16; rows may be apart.
    """
    x = _rows(x)
    n, depth = x.shape
    y = workspace.rows(x, n, operand.columns)
    low_rank = (None, 0, None, None, 0)
    if update is not None:
        parts = update.spans
        low_rank = (  # type: ignore[assignment]  # None above
            *(update.h.data_ptr(), update.h.shape[1], update.operand.data_ptr()),
            *(ctypes.addressof(parts.array), len(parts.parts)),
        )
    _function("int8_product")(
        *(x.data_ptr(), x.stride(0), None if operand.smooth is None else operand.smooth.data_ptr()),
        *(workspace.scratch("q", n * depth), workspace.scratch("scales", 4 * n), workspace.scratch("offsets", 4 * n)),
        *(n, depth),
        *(operand.packed.data_ptr(), operand.scales.data_ptr(), operand.columns),
        *(*low_rank, y.data_ptr(), y.stride(0)),
    )
    return y
