"""The registry of variants: what an update of a weight can be. A new one is one file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from lorafit.lora.base import Kind
from lorafit.lora.dora import DoRA
from lorafit.lora.plain import Plain

if TYPE_CHECKING:
    from lorafit.lora.layer import LoRALayer


class Variant(Protocol):
    """Three operations; everything else (scale, merging, dropout, ties) is written once in `layer.py`.

    works_transposed: the update of W^T can be written with the factors transposed, so that a tied head can share it.
    """

    works_transposed: bool

    def init(self, base: Kind, lora_A: Tensor, lora_B: Tensor, scaling: float) -> dict[str, Tensor]:
        """Trainable tensors besides A and B, by name, for a fresh adapter."""
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
}
