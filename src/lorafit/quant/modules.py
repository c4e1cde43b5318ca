"""Layers whose weight stays in fewer bits: decoded in each forward pass, and again in the backward pass.

The engine has faster products for them; these are what they are held against.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.quant.blocks import Blocks
from lorafit.quant.stored import Stored

# Rows of a weight that are decoded together: more than most layers have, less than most vocabularies.
ROWS_AT_ONCE = 1 << 14


class Quantized(nn.Module):
    """A module with one frozen weight in fewer bits. dtype: in which it is decoded.

    stored: the weight. dense: another in its place, where one was written; None else.
    """

    dense: Tensor | None

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.dtype = stored, dtype
        self.register_buffer("dense", None, persistent=False)
        self.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of any module (`.to`, `.half()`): what is stored stays as it is, what it is decoded into changes."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.stored = self.stored.moved(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return self

    @property
    def weight(self) -> Tensor:
        """The weight in force, decoded anew each time: (rows, width)."""
        return self.stored.decode(self.dtype) if self.dense is None else self.dense

    def write(self, W: Tensor) -> None:
        """Use another weight from now on: (rows, width). What the blocks hold is not kept a second time."""
        W = W.detach().to(self.dtype)
        self.dense = None if torch.equal(W, self.stored.decode(self.dtype)) else W.clone()


def number_count(model: nn.Module) -> int:
    """All parameters of a model, those in blocks among them; what is shared counts once."""
    stored = {m.stored.data.data_ptr(): prod(m.stored.shape) for m in model.modules() if isinstance(m, Quantized)}
    return sum(p.numel() for p in model.parameters()) + sum(stored.values())


class QuantizedLinear(Quantized):
    """y = x W^T + bias. in_features, out_features as in nn.Linear. bias: (out_features,) or None."""

    bias: nn.Parameter | None

    def __init__(self, stored: Stored, dtype: torch.dtype, bias: nn.Parameter | None = None) -> None:
        super().__init__(stored, dtype)
        self.out_features, self.in_features = stored.shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features). Returns (..., out_features)."""
        if self.dense is not None:
            return F.linear(x, self.dense, self.bias)
        y: Tensor = _Product.apply(x, self.stored, self.dtype)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={self.stored.name}"


class QuantizedEmbedding(Quantized):
    """Rows of W by token id. num_embeddings, embedding_dim as in nn.Embedding."""

    stored: Blocks

    def __init__(self, blocks: Blocks, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(blocks, dtype)
        self.num_embeddings, self.embedding_dim = blocks.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...). Returns (..., embedding_dim)."""
        return self.stored.rows(ids, self.dtype) if self.dense is None else F.embedding(ids, self.dense)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}, stored={self.stored.name}"


class _Product(torch.autograd.Function):
    """x W^T, with W decoded again for the gradient instead of kept; an output head a part of its rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Stored, dtype: torch.dtype) -> Tensor:
        ctx.stored, ctx.dtype = stored, dtype
        parts = [F.linear(x, W.to(x.dtype)) for _, W in stored.decoded_parts(ROWS_AT_ONCE, dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        parts = ctx.stored.decoded_parts(ROWS_AT_ONCE, ctx.dtype)
        rows, W = next(parts)
        gx = g[..., rows] @ W.to(g.dtype)
        for rows, W in parts:
            gx += g[..., rows] @ W.to(g.dtype)
        return gx, None, None
