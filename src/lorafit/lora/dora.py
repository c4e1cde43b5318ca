"""DoRA: the weight's rows keep a learned length m, and LoRA turns their direction.

W' = m * (W0 + scaling * B A) / ||W0 + scaling * B A||, row by row, with the norm held constant in the gradient.
Source: Liu et al. 2024 (DoRA), eq. 5, and section 4.3 for the detached norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafit.lora.base import Kind
from lorafit.lora.update import delta_weight

if TYPE_CHECKING:
    from lorafit.lora.layer import LoRALayer

# Rows of a weight whose first norms are taken together: float32 copies of all of them would leave holes in the heap.
ROWS_AT_ONCE = 256


def row_norm(W: Tensor) -> Tensor:
    """||W|| of each row. W: (out, in). Returns (out,), never zero: a row of zeros stays zero instead of NaN."""
    norm: Tensor = torch.linalg.vector_norm(W, dim=1)
    return norm.clamp_min(torch.finfo(W.dtype).tiny)


class DoRA:
    """W' = m * V / ||V||, V = W0 + scaling * B A. The extra tensor `magnitude` m is (out_features,)."""

    works_transposed = False  # a norm per row of W is not a norm per row of W^T
    is_low_rank = False
    has_lengths = True
    frozen: tuple[str, ...] = ()

    def init(
        self, base: Kind, lora_A: Tensor, lora_B: Tensor, scaling: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The magnitude ||V|| row by row, so that W' = W0 at the start."""
        parts = zip(torch.split(base.read_weight(), ROWS_AT_ONCE), torch.split(lora_B, ROWS_AT_ONCE), strict=True)
        norms = [row_norm(W.to(lora_A.dtype) + delta_weight(lora_A, B, scaling)) for W, B in parts]
        return {"magnitude": torch.cat(norms)}

    def factors(self, layer: LoRALayer) -> tuple[Tensor, Tensor]:
        """A and B themselves."""
        return layer.lora_A, layer.lora_B

    def forward(self, layer: LoRALayer, x: Tensor, y: Tensor) -> Tensor:
        """(g - 1) * (y - bias) + g * scaling * B A x, g = m / ||V||: what the update adds to y; the bias is not scaled.

        x may carry dropout; y never does, so that dropout thins the update and not the frozen weight.
        """
        g = self._gain(layer, layer.original_matrix())
        bias = layer.kind.bias
        linear = y if bias is None else y - layer.kind.per_output(bias)
        minus_one = layer.kind.per_output(g - 1).to(y.dtype)
        return minus_one * linear + layer.kind.per_output(g).to(y.dtype) * layer.low_rank(x)

    def merged_weight(self, layer: LoRALayer, W: Tensor) -> Tensor:
        """The weight m * V / ||V||. W: (out_features, in_features), float32 or float64."""
        return self._gain(layer, W)[:, None] * (W + layer.delta_weight().to(W.dtype))

    def _gain(self, layer: LoRALayer, W: Tensor) -> Tensor:
        magnitude: Tensor = layer.magnitude
        with torch.no_grad():
            delta = layer.delta_weight()
            norm = row_norm(W.to(delta.dtype) + delta)
        return magnitude / norm
