"""A first estimate of a run's peak memory, in parts, from shapes alone.

Counted: the runtime, frozen weights, the adapter with its gradients and moments, activations kept for the backward
pass, and the logits of one micro-batch. The figures per token are those of a decoder with gated MLPs and attention that
keeps no score matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.config import TrainConfig
from lorafit.model.spec import ModelSpec
from lorafit.units import MIB, bytes_of, format_bytes

# Python, torch, transformers and their libraries, mapped: measured with VmHWM after the imports.
RUNTIME_BYTES = 520 * MIB
# fp32: value, gradient, two moments, the best so far, the copy that a checkpoint writes (with its moments).
ADAPTER_COPIES = 8


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak, by part; `peak_bytes` is their sum."""

    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def describe(self) -> str:
        """One line: the peak and its parts."""
        parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in self.parts.items())
        return f"{format_bytes(self.peak_bytes)} ({parts})"


def estimate(spec: ModelSpec, config: TrainConfig, dtype: str, tokens: int, supervised: int) -> MemoryEstimate:
    """The peak of training with `tokens` in the largest micro-batch, `supervised` of them in the loss.

    dtype: fp32 or bf16, the type of the frozen base.
    """
    adapter = adapter_params(spec, config.r)
    return MemoryEstimate(
        {
            "runtime": RUNTIME_BYTES,
            "weights": bytes_of(spec.parameters, dtype),
            "adapter": ADAPTER_COPIES * bytes_of(adapter, "fp32"),
            "activations": activation_bytes(spec, config, dtype, tokens),
            "logits": supervised * spec.vocab * (3 * 4 + 2),
        }
    )


def activation_bytes(spec: ModelSpec, config: TrainConfig, dtype: str, tokens: int) -> int:
    """What one micro-batch keeps for its backward pass.

    Per token and layer: the two norms' inputs in fp32 and their outputs, q, k, v and the attention's output, the gate,
    its activation, up and their product, the outputs that are added to the residual, and seven adapters' r-wide
    products.
    """
    attention = spec.heads * spec.head_dim + 2 * spec.kv_heads * spec.head_dim
    wide = 6 * spec.hidden + 3 * attention + 5 * spec.intermediate + 7 * config.r
    norms = 4 * spec.hidden * 4
    return tokens * spec.layers * (bytes_of(wide, dtype) + norms)


def adapter_params(spec: ModelSpec, r: int) -> int:
    """Numbers in a LoRA over every two-dimensional weight of the blocks: r (in + out) each."""
    return sum(
        r * sum(shape)
        for name, shape in spec.tensors.items()
        if len(shape) == 2
        and "embed" not in name
        and "lm_head" not in name
        and name not in ("token_embd.weight", "output.weight")
    )
