"""LoRA itself: W' = W0 + scaling * B A. Source: Hu et al. 2021, eq. 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorafit.lora.base import Kind

if TYPE_CHECKING:
    from lorafit.lora.layer import LoRALayer


class Plain:
    """W' = W0 + scaling * B A."""

    works_transposed = True  # (B A)^T = A^T B^T: a tied head uses the same factors, transposed
    is_low_rank = True
    has_lengths = False
    frozen: tuple[str, ...] = ()

    def init(
        self, base: Kind, lora_A: Tensor, lora_B: Tensor, scaling: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """No tensors besides A and B."""
        return {}

    def factors(self, layer: LoRALayer) -> tuple[Tensor, Tensor]:
        """A and B themselves."""
        return layer.lora_A, layer.lora_B

    def forward(self, layer: LoRALayer, x: Tensor, y: Tensor) -> Tensor:
        """What the update adds to the base's output: scaling * B A x. x: the base's input. y: its output."""
        return layer.low_rank(x)

    def merged_weight(self, layer: LoRALayer, W: Tensor) -> Tensor:
        """W + scaling * B A. W: (out_features, in_features), float32 or float64."""
        return W + layer.delta_weight().to(W.dtype)
