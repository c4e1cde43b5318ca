"""Updated weights whose rows have a length of their own (DoRA): y = c x V^T, V = W0 + s B A, c = m / |V| row by row.

c is a factor of each output, so the layer stays what it is without it, and V is never made:

    |v|^2 = |w|^2 + s b . (2 W0 A^T + s B (A A^T))        for each row w of W0, b of B

|w|^2 never changes, and W0 A^T is a product with as many rows as the rank. The norm is held constant in the gradient:
gm = sum over tokens of g z / |V| = sum of g u / m, with z = x V^T and u = c z; all else takes c g for g.
Source: Liu et al. 2024 (DoRA), eq. 5, and section 4.3 for the detached norm.

Where the three terms cancel, the rounding e of W0 A^T shows: it puts |v|^2 off by up to 2 e |w| |s b A|, with e = 2^-7
in bfloat16 (A and the product are rounded), 2^-24 sqrt(in) in float32, and in int8 the error of its products. For a row
that its update has not shortened that is a relative e |s b A| / |w| of c at most. What falls below eps |w|^2 cannot be
told, eps being the type's, and is held there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorafit.engine.update import Span

# m and |V| are held above this, in size: so that u / m is z / |V| where m crosses zero, and c of a row of zeros is 1.
# A weight times 2^-60 changes no output in any type.
LEAST = 2.0**-60
# Rows of a weight whose norms are taken together: in float32 they stay in the cache.
ROWS_AT_ONCE = 256


class Lengths(NamedTuple):
    """For all outputs of a group, (sum of outs,), 1 where a row has no length of its own.

    gain: c times the strength of the update. m: the lengths, held away from zero. rest: what of the frozen product is
    added besides, 1 less the strength; None where that is nothing.
    """

    gain: Tensor
    m: Tensor
    rest: Tensor | None


@dataclass(frozen=True, eq=False)
class Lengthened:
    """A layer of a group whose rows have lengths m, (out,); at least float32. strength: its scale, not 0."""

    span: Span
    A: Tensor
    B: Tensor
    m: Tensor
    strength: float


def row_squares(weights: Iterable[Tensor]) -> Tensor:
    """|w|^2 of every row of matrices one below the other, (rows,) float64. Its root is the norm in float32."""
    norms = [
        torch.linalg.vector_norm(part.to(torch.promote_types(part.dtype, torch.float32)), dim=1)
        for W in weights
        for part in torch.split(W, ROWS_AT_ONCE)
    ]
    return torch.cat(norms).double() ** 2


def lengths(squares: Tensor, product: Tensor, layers: Sequence[Lengthened], eps: float) -> Lengths:
    """What outputs are multiplied with. squares: |w|^2 of all rows of W0. product: A W0^T, the A's of `layers` stacked.

    product: (sum of ranks, sum of outs). eps: of the type in which it was computed.
    """
    gain, m = (torch.ones_like(squares, dtype=layers[0].m.dtype) for _ in range(2))
    rest = torch.zeros_like(gain) if any(layer.strength != 1 for layer in layers) else None
    for layer in layers:
        columns = layer.span.columns
        norm = _norms(squares[columns], product[layer.span.ranks, columns], layer, eps)
        m[columns] = torch.where(layer.m.abs() < LEAST, torch.copysign(layer.m.new_tensor(LEAST), layer.m), layer.m)
        gain[columns] = m[columns] / norm * layer.strength
        if rest is not None:
            rest[columns] = 1 - layer.strength
    return Lengths(gain, m, rest)


def _norms(squares: Tensor, AW: Tensor, layer: Lengthened, eps: float) -> Tensor:
    """|V| of each row: (out,). AW: A W0^T, (r, out)."""
    A, B, s = layer.A, layer.B, layer.span.scaling
    both = torch.addmm(2 * AW.T.to(B.dtype), B, A @ A.T, alpha=s)
    found = squares + s * torch.linalg.vecdot(B, both).double()
    return torch.maximum(found, eps * squares).sqrt().to(B.dtype).clamp_min(LEAST)
