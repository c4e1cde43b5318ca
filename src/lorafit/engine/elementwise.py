"""Norms, rotary embeddings and gated activations as single passes over memory, forward and backward.

What a norm or a gated activation gives is the input of a linear layer, whose factor A needs it again in the backward
pass. It is cheaper to compute it twice than to keep it: these outputs carry a recipe, and only what it is made from,
which is kept anyway, stays in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lorafit.engine import kernels

RECIPE = "_lorafit_recipe"


@dataclass(frozen=True)
class Recipe:
    """How to compute a tensor again: function(*tensors), as (n, width). The tensors are to be saved by autograd."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def recipe_of(x: Tensor) -> Recipe | None:
    """How to compute x again; None where it is not known."""
    return getattr(x, RECIPE, None)


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    """Weight * x / rms(x), the weight frozen. x: (..., width). weight: (width,) float32. See `plain.rms_norm`."""
    y = cast(Tensor, _RMSNorm.apply(x, weight, eps, round_first))  # type: ignore[no-untyped-call]
    flat = x.detach().reshape(-1, x.shape[-1])
    setattr(y, RECIPE, Recipe(lambda f: kernels.of(f).rms_norm(f, weight, eps, round_first)[0], (flat,)))
    return y


def rotate(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding. q, k: (1, heads, tokens, dim). cosine, sine: (1, tokens, dim). Tokens come out outermost."""
    return cast(tuple[Tensor, Tensor], _Rotary.apply(q, k, cosine, sine))  # type: ignore[no-untyped-call]


def gated(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """act(gate) * up. (..., width) each; rows may be apart. kind: `plain.SILU` or `plain.GELU_TANH`."""
    y = cast(Tensor, _Gated.apply(gate, up, kind))  # type: ignore[no-untyped-call]
    parts = gate.detach().flatten(0, -2), up.detach().flatten(0, -2)
    setattr(y, RECIPE, Recipe(lambda a, b: kernels.of(a).gated(a, b, kind), parts))
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, inverse = kernels.of(flat).rms_norm(flat, weight, eps, round_first)
        ctx.save_for_backward(flat, weight, inverse)
        return y.view(x.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        gx = kernels.of(x).rms_norm_backward(gy.reshape(x.shape), x, weight, inverse)
        return gx.view(gy.shape), None, None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine)
        return _turn(q, cosine, sine, inverse=False), _turn(k, cosine, sine, inverse=False)

    @staticmethod
    def backward(ctx: Any, gq: Tensor, gk: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        return _turn(gq, cosine, sine, inverse=True), _turn(gk, cosine, sine, inverse=True), None, None


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> Tensor:
    by_token = x[0].transpose(0, 1)
    return cast(Tensor, kernels.of(x).rotary(by_token, cosine[0], sine[0], inverse)).transpose(0, 1)[None]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: int) -> Tensor:
        shape = gate.shape
        gate, up = gate.flatten(0, -2), up.flatten(0, -2)
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return kernels.of(gate).gated(gate, up, kind).view(shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        both = kernels.of(gate).gated_backward(gy.flatten(0, -2), gate, up, ctx.kind)
        # Two views of one matrix: the product behind gate and up takes it whole.
        g_gate, g_up = both.view(*gy.shape[:-1], -1).split(gate.shape[-1], dim=-1)
        return g_gate, g_up, None
