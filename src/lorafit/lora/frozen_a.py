"""LoRA-FA: A stays as it was drawn, and B alone is trained. Source: Zhang et al. 2023, LoRA-FA, section 3.1."""

from __future__ import annotations

from lorafit.lora.plain import Plain


class FrozenA(Plain):
    """W' = W0 + scaling * B A with A fixed: half of the moments, and a smaller space for the same rank."""

    frozen: tuple[str, ...] = ("lora_A",)
