"""VeRA: random factors that stay, and two vectors that scale them. Source: Kopiczko et al. 2024, VeRA, eq. 2.

W' = W0 + scaling * diag(b) B diag(d) A. The paper shares one pair of random matrices among all layers, so as not to
store them; here each layer draws its own by its name, and what is saved is the product's factors as plain LoRA.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lorafit.lora.base import Kind
from lorafit.lora.plain import Plain

if TYPE_CHECKING:
    from lorafit.lora.layer import LoRALayer

# Where d starts. Source: Kopiczko et al. 2024, section 3.2 and table 9.
FIRST_D = 0.1


class VeRA(Plain):
    """The extra tensors are scale_d (r,), and scale_b (out_features,), which starts at 0."""

    frozen: tuple[str, ...] = ("lora_A", "lora_B")

    def init(
        self, base: Kind, lora_A: Tensor, lora_B: Tensor, scaling: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Fills B as He et al. 2015 do, with fan_in r."""
        drawn = nn.init.kaiming_uniform_(torch.empty(len(lora_B), lora_A.shape[0]), a=math.sqrt(5), generator=generator)
        lora_B.copy_(drawn.view(lora_B.shape))
        return {
            "scale_d": torch.full_like(lora_A.flatten(1)[:, 0], FIRST_D),
            "scale_b": torch.zeros_like(lora_B.flatten(1)[:, 0]),
        }

    def factors(self, layer: LoRALayer) -> tuple[Tensor, Tensor]:
        """diag(d) A and diag(b) B."""
        d, b = cast(Tensor, layer.scale_d), cast(Tensor, layer.scale_b)
        A, B = layer.lora_A, layer.lora_B
        return d.view(-1, *[1] * (A.dim() - 1)) * A, b.view(-1, *[1] * (B.dim() - 1)) * B
