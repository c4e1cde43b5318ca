"""GPUs as their makers describe them: memory, and dense products a second. Nothing of this is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorafit.errors import ConfigError, did_you_mean, listed

# The share of its rate that training reaches, as it is often told of LoRA in 16 bits on one GPU.
ASSUMED_MFU = 0.40
T = 10**12


@dataclass(frozen=True)
class Gpu:
    """memory_bytes: what it has. flop_per_s: of products without sparsity, by precision, sums in float32."""

    name: str
    memory_bytes: int
    flop_per_s: Mapping[str, float]


def _gpu(name: str, gigabytes: int, half: float, single: float) -> Gpu:
    return Gpu(name, gigabytes * 10**9, {"bf16": half * T, "fp32": single * T})


# Source: NVIDIA's datasheets and architecture whitepapers. T4 and V100 have fp16 in the place of bf16.
GPUS = {
    "t4": _gpu("NVIDIA T4", 16, 65, 8.1),
    "v100": _gpu("NVIDIA V100", 32, 125, 15.7),
    "a10": _gpu("NVIDIA A10", 24, 125, 31.2),
    "l4": _gpu("NVIDIA L4", 24, 121, 30.3),
    "l40s": _gpu("NVIDIA L40S", 48, 362, 91.6),
    "a100": _gpu("NVIDIA A100", 80, 312, 19.5),
    "h100": _gpu("NVIDIA H100 SXM", 80, 989, 67),
    "rtx-3090": _gpu("NVIDIA RTX 3090", 24, 71, 35.6),
    "rtx-4090": _gpu("NVIDIA RTX 4090", 24, 165, 82.6),
}


def gpu_of(name: str) -> Gpu:
    """By its name. Raises ConfigError for one that is not known."""
    found = GPUS.get(name.lower())
    if found is None:
        hint = did_you_mean(name, GPUS) or f"Known: {listed(GPUS)}"
        raise ConfigError(f"--gpu {name!r} is not known", hint)
    return found
