"""Frozen linear layers with their low-rank updates, several that share one input at a time.

y_i = x W_i^T + b_i + scaling_i (x A_i^T) B_i^T. A frozen W has no gradient, so nothing is saved for it: only
x, and the r-wide h = x A^T. Where no earlier layer is adapted, x has no gradient either and g W is not computed.
Source of the update: Hu et al. 2021, eq. 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.engine.product import Product
from lorafit.engine.tally import TALLY


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
        outputs: tuple[Tensor, ...] = _Apply.apply(x.reshape(-1, x.shape[-1]), self, *tensors)  # type: ignore[no-untyped-call]
        return outputs


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: FrozenLinears, *factors: Tensor) -> tuple[Tensor, ...]:
        y = group.product.forward(x)
        TALLY.add(2 * len(x) * x.shape[1] * y.shape[1])
        if group.bias is not None:
            y += group.bias
        Bs = [B.to(x.dtype) for B in factors[1::2]]
        h = x @ _down(factors, x.dtype).T if factors else None
        for part, where, r, scaling in _adapted(group, Bs):
            if scaling == 0:
                continue  # bitwise the base
            assert h is not None
            TALLY.add(2 * len(x) * Bs[part].shape[1] * (x.shape[1] + Bs[part].shape[0]))
            y[:, where].addmm_(h[:, r], Bs[part].T, alpha=scaling)
        ctx.group = group
        ctx.save_for_backward(x if factors else None, h, *factors)
        ctx.set_materialize_grads(False)
        return torch.split(y, group.outs, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, *factors = ctx.saved_tensors
        group: FrozenLinears = ctx.group
        g = _side_by_side(gradients, group.outs)
        gx = group.product.backward(g) if ctx.needs_input_grad[0] else None
        TALLY.add(2 * gx.numel() * g.shape[1] if gx is not None else 0)
        if not factors:
            return gx, None
        A, Bs = _down(factors, x.dtype), [B.to(x.dtype) for B in factors[1::2]]
        gh, gBs = torch.empty_like(h), []
        for part, where, r, scaling in _adapted(group, Bs):
            torch.mul(g[:, where] @ Bs[part], scaling, out=gh[:, r])
            out, rank = Bs[part].shape
            TALLY.add(2 * len(g) * rank * (2 * out + (1 if gx is None else 2) * x.shape[1]))
            gBs.append((g[:, where].T @ h[:, r]).to(factors[2 * part + 1].dtype).mul_(scaling))
        gA = (gh.T @ x).to(factors[0].dtype)
        if gx is not None:
            gx.addmm_(gh, A)
        gAs = torch.split(gA, [len(A) for A in factors[::2]])
        return gx, None, *(t for pair in zip(gAs, gBs, strict=True) for t in pair)


def _down(factors: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> Tensor:
    """All A of a group, one above the other: (sum of ranks, in)."""
    A = list(factors[::2])
    return (A[0] if len(A) == 1 else torch.cat(A)).to(dtype)


def _adapted(group: FrozenLinears, Bs: list[Tensor]) -> list[tuple[int, slice, slice, float]]:
    """For each adapted layer of the group: its number among them, its columns of y, its columns of h, its scaling."""
    found: list[tuple[int, slice, slice, float]] = []
    column = rank = 0
    for out, factors in zip(group.outs, group.factors, strict=True):
        if factors is not None:
            r, scaling = Bs[len(found)].shape[1], factors.scaling()
            found.append((len(found), slice(column, column + out), slice(rank, rank + r), scaling))
            rank += r
        column += out
    return found


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
