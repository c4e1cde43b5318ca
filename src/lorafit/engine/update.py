"""The low-rank updates of linear layers that share an input: h = x A^T, and h B^T added to the frozen product.

`Update` is torch's own products, for every type and device; `PackedUpdate` those of `kernels.products`, where it can.
Source of the gradients: Hu et al. 2021, eq. 3, by the chain rule: with gh = g B, gA = gh^T x, gB = g^T h, gx += gh A.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lorafit.engine.kernels import products

# Up to this sum of ranks the updates of a group are one product, with zeros between their blocks.
LARGEST_BLOCK_RANK = 64


class Addend(Protocol):
    """A low-rank sum still to be added: a product that can add it on its way does, without a pass over memory."""

    def add_to(self, y: Tensor) -> None:
        """Add it to y, (n, columns)."""


@dataclass(frozen=True)
class Span:
    """One adapted layer of a group: its columns of y, its columns of h = x A^T, and its scaling."""

    columns: slice
    ranks: slice
    scaling: float


def spans(outs: Sequence[int], ranks: Sequence[int | None], scalings: Sequence[float]) -> list[Span]:
    """The adapted layers of a group. outs: columns of every layer. ranks: None where it has no update."""
    found, column, rank = [], 0, 0
    for out, r, scaling in zip(outs, ranks, scalings, strict=True):
        if r is not None:
            found.append(Span(slice(column, column + out), slice(rank, rank + r), scaling))
            rank += r
        column += out
    return found


def make_update(found: list[Span], factors: Sequence[Tensor], x: Tensor) -> Update | PackedUpdate:
    """The update of an input like x. factors: A, B of each span in turn; A: (r, in), B: (out, r)."""
    served = x.dtype == torch.bfloat16 and x.device.type == "cpu" and products.has_low_rank()
    widths = [x.shape[1], *(number for span in found for number in (span.columns.start, span.columns.stop))]
    if served and all(width % products.LANES == 0 for width in widths):
        return PackedUpdate(found, factors)
    return Update(found, factors, x.dtype)


# --- in torch's products --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Adapted layers whose update is one product h[:, ranks] BT, added to y[:, columns]. BT, B^T, is scaled."""

    spans: list[Span]
    columns: slice
    ranks: slice
    BT: Tensor

    def split(self, gBT: Tensor) -> list[Tensor]:
        """The gradient of B of each layer, from that of the whole B^T without its scaling."""
        own = [gBT[_within(span.ranks, self.ranks), _within(span.columns, self.columns)] for span in self.spans]
        return [(one * span.scaling).T.contiguous() for one, span in zip(own, self.spans, strict=True)]


@dataclass(frozen=True, eq=False)
class _Sum:
    """The product h M for some columns of y at a time."""

    h: Tensor
    parts: list[tuple[slice, slice, Tensor]]

    def add_to(self, y: Tensor) -> None:
        for columns, ranks, M in self.parts:
            y[:, columns].addmm_(self.h[:, ranks], M)


class Update:
    """The factors of a group as few matrices: A (sum of ranks, in), and B block by block on a diagonal.

    Skinny products are bound by memory: reading g once for all layers is worth the zeros between the blocks, as long as
    the ranks are small. Where every scaling is 0 there is nothing to add, so that y stays bitwise the base's.

    What has a rank on one side is kept with the ranks as its rows: the BLAS behind torch writes few long rows several
    times as fast as many short ones.
    """

    def __init__(self, found: list[Span], factors: Sequence[Tensor], dtype: torch.dtype) -> None:
        As, Bs = list(factors[::2]), list(factors[1::2])
        self.A = (As[0] if len(As) == 1 else torch.cat(As)).to(dtype)
        together = [list(zip(found, Bs, strict=True))] if len(self.A) <= LARGEST_BLOCK_RANK else None
        if together is None:
            together = [[(span, B)] for span, B in zip(found, Bs, strict=True)]
        self.parts = [_part(part, dtype) for part in together]
        self.some = any(span.scaling for span in found)
        self.dtypes = [factor.dtype for factor in factors]

    def forward(self, x: Tensor) -> tuple[Tensor, Addend | None]:
        """(h, h B^T to be added to y), h = x A^T: (n, sum of ranks)."""
        h = (self.A @ x.T).T
        return h, _Sum(h, [(part.columns, part.ranks, part.BT) for part in self.parts]) if self.some else None

    def backward(self, g: Tensor) -> tuple[Tensor, Addend]:
        """(gh, gh A to be added to gx), gh = g B. g: (n, sum of outs)."""
        gh = g.new_empty(len(g), len(self.A))
        for part in self.parts:
            torch.mm(g[:, part.columns], part.BT.T, out=gh[:, part.ranks])
        return gh, _Sum(gh, [(slice(None), slice(None), self.A)])

    def gradients(self, x: Tensor, h: Tensor, g: Tensor, gh: Tensor) -> list[Tensor]:
        """Those of A, B of each layer in turn."""
        gAs = torch.split(gh.T @ x, [r.ranks.stop - r.ranks.start for part in self.parts for r in part.spans])
        gBs = [gB for part in self.parts for gB in part.split(h[:, part.ranks].T @ g[:, part.columns])]
        both = [gradient for pair in zip(gAs, gBs, strict=True) for gradient in pair]
        return [gradient.to(dtype) for gradient, dtype in zip(both, self.dtypes, strict=True)]


def _part(layers: list[tuple[Span, Tensor]], dtype: torch.dtype) -> _Part:
    found = [span for span, _ in layers]
    columns = slice(found[0].columns.start, found[-1].columns.stop)
    ranks = slice(found[0].ranks.start, found[-1].ranks.stop)
    if len(layers) == 1:
        return _Part(found, columns, ranks, (layers[0][1] * found[0].scaling).to(dtype).T.contiguous())
    whole = layers[0][1].new_zeros(ranks.stop - ranks.start, columns.stop - columns.start, dtype=dtype)
    for span, B in layers:
        whole[_within(span.ranks, ranks), _within(span.columns, columns)] = (B * span.scaling).T
    return _Part(found, columns, ranks, whole)


def _within(inner: slice, outer: slice) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)


# --- in our own -----------------------------------------------------------------------------------------------------


class PackedUpdate:
    """The same in bfloat16 by `kernels.products`: the ranks of every layer padded to 16, no zeros between layers."""

    def __init__(self, found: list[Span], factors: Sequence[Tensor]) -> None:
        columns = tuple((s.columns.start, s.columns.stop - s.columns.start) for s in found)
        self.layout = _layout(columns, tuple(len(A) for A in factors[::2]))
        self.factors = products.Factors(factors, tuple(span.scaling for span in found), self.layout)
        self.dtypes = [factor.dtype for factor in factors]

    def reads(self, factors: Sequence[Tensor]) -> bool:
        """Whether it reads these tensors themselves, and not copies of what they were."""
        return all(own is given for own, given in zip(self.factors.tensors, factors, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Addend | None]:
        """(h, h B^T to be added to y), h = x A^T: (n, sum of padded ranks)."""
        return self.factors.down(x)

    def backward(self, g: Tensor) -> tuple[Tensor, Addend]:
        """(gh, gh A to be added to gx), gh = g B. g: (n, sum of outs)."""
        return self.factors.down_backward(g)

    def gradients(self, x: Tensor, h: Tensor, g: Tensor, gh: Tensor) -> list[Tensor]:
        """Those of A, B of each layer in turn."""
        both = self.factors.gradients(x, h, g, gh)
        return [gradient.to(dtype) for gradient, dtype in zip(both, self.dtypes, strict=True)]


@functools.lru_cache(maxsize=256)
def _layout(columns: tuple[tuple[int, int], ...], ranks: tuple[int, ...]) -> products.Spans:
    firsts = [sum(map(products.padded, ranks[:i])) for i in range(len(ranks))]
    return products.Spans(
        tuple((*column, first, products.padded(r)) for column, first, r in zip(columns, firsts, ranks, strict=True))
    )
