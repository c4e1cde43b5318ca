"""Frozen linear layers with their low-rank updates, several that share one input at a time.

y_i = x W_i^T + b_i + scaling_i (x A_i^T) B_i^T. A frozen W has no gradient, so nothing is saved for it: only
x, and the r-wide h = x A^T. Where no earlier layer is adapted, x has no gradient either and g W is not computed.
Source of the update: Hu et al. 2021, eq. 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.engine.elementwise import Recipe, recipe_of
from lorafit.engine.product import Product
from lorafit.engine.tally import TALLY

# Up to this sum of ranks the updates of a group are one product, with zeros between their blocks.
LARGEST_BLOCK_RANK = 64


@dataclass(frozen=True, eq=False)
class Factors:
    """The update of one layer, asked anew each time. A: (r, in) and B: (out, r), float32, or views of the parameters.

    scaling: that of the layer times its scale.
    """

    A: Callable[[], Tensor]
    B: Callable[[], Tensor]
    scaling: Callable[[], float]


class FrozenLinears:
    """Linear layers that are called one after the other with the same input: one product serves all of them.

    product: of their weights stacked, (sum of outs, in). outs: rows of each. biases, factors: of each, or None.
    The first that is called computes all outputs; each takes its own, once.
    """

    def __init__(
        self, product: Product, outs: list[int], biases: list[Tensor | None], factors: list[Factors | None]
    ) -> None:
        self.product, self.outs, self.factors = product, outs, factors
        self.bias = _stacked_bias(biases, outs)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Output of layer `index`: (..., out), a view whose rows may be apart. x: (..., in)."""
        if self._input is not x or self._outputs[index] is None:
            self._input, self._outputs = x, list(self._compute(x))
        y = self._outputs[index]
        assert y is not None, "just computed"
        self._outputs[index] = None
        if not any(output is not None for output in self._outputs):
            self._input = None  # or the last input would live until the next call
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        tensors = [t for f in self.factors if f is not None for t in (f.A(), f.B())]
        flat = x.reshape(-1, x.shape[-1])
        outputs: tuple[Tensor, ...] = _Apply.apply(flat, self, recipe_of(x), *tensors)  # type: ignore[no-untyped-call]
        return outputs


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: FrozenLinears, recipe: Recipe | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        y = group.product.forward(x)
        TALLY.add(2 * len(x) * x.shape[1] * y.shape[1])
        if group.bias is not None:
            y += group.bias
        h, update = None, None
        if factors:
            update = _Update(group, factors, x.dtype)
            h = x @ update.A.T
            for part in update.parts:
                y[:, part.columns].addmm_(h[:, part.ranks], part.B.T)
            TALLY.add(2 * len(x) * sum(factor.numel() for factor in factors))
        ctx.group, ctx.update = group, update
        # What x is made from, by `again`, is kept anyway.
        ctx.again = recipe.function if recipe else _as_it_is
        kept = recipe.tensors if recipe else (x,)
        ctx.inputs = len(kept) if factors else 0
        ctx.save_for_backward(*kept[: ctx.inputs], h, *factors)
        ctx.set_materialize_grads(False)
        return torch.split(y, group.outs, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, h, factors = _parted(ctx.saved_tensors, ctx.inputs)
        group: FrozenLinears = ctx.group
        g = _side_by_side(gradients, group.outs)
        gx = group.product.backward(g) if ctx.needs_input_grad[0] else None
        TALLY.add(2 * gx.numel() * g.shape[1] if gx is not None else 0)
        if not factors:
            return gx, None, None
        x = ctx.again(*inputs)
        update: _Update = ctx.update
        ctx.update = None  # autograd lets go of saved tensors by itself, of this it does not
        gh, gBs = torch.empty_like(h), []
        for part in update.parts:
            torch.mm(g[:, part.columns], part.B, out=gh[:, part.ranks])
            gBs += part.split(g[:, part.columns].T @ h[:, part.ranks])
        gA = gh.T @ x
        if gx is not None:
            gx.addmm_(gh, update.A)
        TALLY.add(2 * len(g) * sum(2 * B.numel() + (1 if gx is None else 2) * A.numel() for A, B in _pairs(factors)))
        gAs = torch.split(gA, [len(A) for A, _ in _pairs(factors)])
        return gx, None, None, *(t.to(factors[0].dtype) for pair in zip(gAs, gBs, strict=True) for t in pair)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _parted(saved: tuple[Tensor, ...], inputs: int) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
    return saved[:inputs], saved[inputs], saved[inputs + 1 :]


def _pairs(factors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(factors[::2], factors[1::2], strict=True)


@dataclass(frozen=True)
class _Span:
    """One adapted layer of a group: its columns of y, its columns of h = x A^T, and its scaling."""

    columns: slice
    ranks: slice
    scaling: float


@dataclass(frozen=True)
class _Part:
    """Adapted layers whose update is one product h[:, ranks] B^T, written to y[:, columns]. B is scaled."""

    spans: list[_Span]
    columns: slice
    ranks: slice
    B: Tensor

    def split(self, gB: Tensor) -> list[Tensor]:
        """The gradient of B of each layer, from that of the whole without its scaling."""
        return [
            gB[_within(span.columns, self.columns), _within(span.ranks, self.ranks)] * span.scaling
            for span in self.spans
        ]


class _Update:
    """The factors of a group as few matrices: A (sum of ranks, in), and B block by block on a diagonal.

    Skinny products are bound by memory: reading g once for all layers is worth the zeros between the blocks, as long as
    the ranks are small. parts is empty where every scaling is 0, so that y stays bitwise the base's.
    """

    def __init__(self, group: FrozenLinears, factors: Sequence[Tensor], dtype: torch.dtype) -> None:
        As = list(factors[::2])
        self.A = (As[0] if len(As) == 1 else torch.cat(As)).to(dtype)
        spans = list(_spans(group, factors))
        together = [spans] if len(self.A) <= LARGEST_BLOCK_RANK else [[span] for span in spans]
        some = any(span.scaling for span in spans)
        numbers = {id(span): number for number, span in enumerate(spans)}
        self.parts = [
            _part(part, [factors[2 * numbers[id(span)] + 1] for span in part], dtype) for part in together if some
        ]


def _spans(group: FrozenLinears, factors: Sequence[Tensor]) -> Iterator[_Span]:
    column = rank = number = 0
    for out, adapted in zip(group.outs, group.factors, strict=True):
        if adapted is not None:
            r = len(factors[2 * number])
            yield _Span(slice(column, column + out), slice(rank, rank + r), adapted.scaling())
            rank, number = rank + r, number + 1
        column += out


def _part(spans: list[_Span], Bs: list[Tensor], dtype: torch.dtype) -> _Part:
    columns = slice(spans[0].columns.start, spans[-1].columns.stop)
    ranks = slice(spans[0].ranks.start, spans[-1].ranks.stop)
    if len(spans) == 1:
        return _Part(spans, columns, ranks, (Bs[0] * spans[0].scaling).to(dtype))
    whole = Bs[0].new_zeros(columns.stop - columns.start, ranks.stop - ranks.start, dtype=dtype)
    for span, B in zip(spans, Bs, strict=True):
        whole[_within(span.columns, columns), _within(span.ranks, ranks)] = B * span.scaling
    return _Part(spans, columns, ranks, whole)


def _within(inner: slice, outer: slice) -> slice:
    return slice(inner.start - outer.start, inner.stop - outer.start)


def _side_by_side(gradients: tuple[Tensor | None, ...], outs: list[int]) -> Tensor:
    """Gradients of the outputs as one matrix (n, sum of outs); without a copy where they lie in memory like that."""
    if len(gradients) == 1 and gradients[0] is not None:
        return gradients[0] if gradients[0].stride(-1) == 1 else gradients[0].contiguous()
    some = next(g for g in gradients if g is not None)
    if all(g is not None and _follows(some, g, sum(outs), sum(outs[:i])) for i, g in enumerate(gradients)):
        return some.as_strided((len(some), sum(outs)), (sum(outs), 1))
    whole = [g if g is not None else some.new_zeros(len(some), out) for g, out in zip(gradients, outs, strict=True)]
    return torch.cat(whole, dim=1)


def _follows(first: Tensor, g: Tensor, width: int, offset: int) -> bool:
    return (
        g.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and g.stride() == (width, 1)
        and g.storage_offset() == first.storage_offset() + offset
    )


def _stacked_bias(biases: list[Tensor | None], outs: list[int]) -> Tensor | None:
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(out) if b is None else b.detach() for b, out in zip(biases, outs, strict=True)])


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of the module itself is trained."""
    return not any(p.requires_grad for p in module.parameters(recurse=False))
