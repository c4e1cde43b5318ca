"""What every adapted module has in common: a base below it, a strength, and merging that can be undone."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorafit.errors import ConfigError


@dataclass
class SharedState:
    """What all modules that share one weight have in common: they are scaled, merged and unmerged together.

    original: what merging overwrote, as it was before; None while unmerged.
    """

    scale: float = 1.0
    original: Tensor | None = None


class Adapted(nn.Module):
    """A base module and what is trained beside it. The weight in force is W0 + s * (merged - W0), s the scale.

    Attributes: base, name, shared, tied_to (the name of the module that owns the trained tensors, None for an owner).
    All else is looked up on the base, so that a model that reads `lm_head.weight` or `embed_tokens.embedding_dim` still
    finds it; `weight` is the base's own. changes: the base's parameters that merging changes.
    """

    changes: tuple[str, ...] = ("weight",)

    def __init__(self, base: nn.Module, *, name: str, shared: SharedState, tied_to: str | None) -> None:
        super().__init__()
        self.training = base.training  # a fresh module trains, and would drop inputs in a model that does not
        self.base, self.name, self.shared, self.tied_to = base, name, shared, tied_to

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the update now."""
        return self.shared.original is not None

    @property
    def scale(self) -> float:
        """The strength s of the update: 0 is the base, 1 the tuned model."""
        return self.shared.scale

    @property
    def is_active(self) -> bool:
        """Whether something is computed beside the base: not at scale 0, and not while merged."""
        return not self.merged and self.scale != 0

    def set_scale(self, scale: float) -> None:
        """Set the strength: 0 is the base model, 1 the tuned one, above 1 emphasises, below 0 negates.

        A merged module is merged again from its original weight. Raises ConfigError if scale is not finite.
        """
        if not math.isfinite(scale):
            raise ConfigError(f"scale must be a finite number, got {scale!r}", "0 is the base model, 1 the tuned one")
        merged = self.merged
        self.unmerge()
        self.shared.scale = float(scale)
        if merged:
            self.merge()

    @property
    def why_not_merged(self) -> str | None:
        """Why no weight of the base can hold this, as a sentence without its end; None where one can."""
        return None

    @abstractmethod
    def merge(self) -> None:
        """Write the update into the base's weight, for all modules that share it. Twice is once."""

    @abstractmethod
    def unmerge(self) -> None:
        """Put the original weight back, bitwise: it was kept, not subtracted. What is not merged stays as it is."""

    def forget_original(self) -> None:
        """Let what merging wrote stay for good."""
        self.shared.original = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)
