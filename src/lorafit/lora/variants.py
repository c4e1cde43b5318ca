"""The registry of variants: what an update of a weight can be. A new one is one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lorafit.lora.base import Kind
from lorafit.lora.dora import DoRA
from lorafit.lora.frozen_a import FrozenA
from lorafit.lora.plain import Plain
from lorafit.lora.vera import VeRA

if TYPE_CHECKING:
    from lorafit.lora.layer import LoRALayer


class Variant(Protocol):
    """Three operations; everything else (scale, merging, dropout, ties) is written once in `layer.py`.

    works_transposed: the update of W^T can be written with the factors transposed, so that a tied head can share it.
    is_low_rank: the update is scaling * B A of `factors`, and nothing else. has_lengths: rows of W0 + scaling * B A are
    given the length `magnitude`, by a norm that has no gradient. frozen: tensors that are not trained.
    """

    works_transposed: bool
    is_low_rank: bool
    has_lengths: bool
    frozen: tuple[str, ...]

    def init(
        self, base: Kind, lora_A: Tensor, lora_B: Tensor, scaling: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Tensors besides A and B, by name, for a fresh adapter; B, which is 0, may be filled."""
        ...

    def factors(self, layer: LoRALayer) -> tuple[Tensor, Tensor]:
        """A and B as the update has them, made of what is trained."""
        ...

    def forward(self, layer: LoRALayer, x: Tensor, y: Tensor) -> Tensor:
        """What the update at scale 1 adds to the base's output y for the input x."""
        ...

    def merged_weight(self, layer: LoRALayer, W: Tensor) -> Tensor:
        """The updated weight at scale 1. W: (out_features, in_features) of the base, float32 or float64."""
        ...


VARIANTS: dict[str, Variant] = {
    "lora": Plain(),
    "dora": DoRA(),
    "lora-fa": FrozenA(),
    "vera": VeRA(),
}
