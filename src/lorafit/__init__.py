"""Fine-tune models by low-rank adaptation (LoRA) on the machine you have."""

from __future__ import annotations

__version__ = "0.1.0"
