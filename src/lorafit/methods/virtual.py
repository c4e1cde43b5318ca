"""Virtual tokens: ids beyond the vocabulary that stand in front of every row, and an embedding that knows them.

Rows that begin with them are rows like any other: the engine computes what all begin with once, answers are generated
from prompts that begin with them, and positions follow. (PEFT puts keys and values into a cache instead.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.errors import ConfigError, MergeError
from lorafit.lora.adapted import Adapted, SharedState


class Slots:
    """Which of the tokens of the present pass are virtual: shaped like its ids, a number for those, below 0 else."""

    def __init__(self) -> None:
        self.now: Tensor | None = None

    def put(self, rows: Tensor, y: Tensor) -> Tensor:
        """`y` with rows of virtual tokens in the place of its own. rows: (tokens, width). y: (..., width)."""
        if self.now is None or not bool((self.now >= 0).any()):
            return y
        slots = self.now
        return torch.where((slots >= 0)[..., None], F.embedding(slots.clamp(min=0), rows).to(y.dtype), y)


class Virtual(Adapted):
    """What every module of a virtual-token method does alike: it is on or off, and no weight can hold it."""

    def set_scale(self, scale: float) -> None:
        """On at 1, off at 0. Raises ConfigError between and beyond: half a token is nothing."""
        if scale not in (0, 1):
            raise ConfigError(
                f"--scale {scale:g} is given, and virtual tokens are there or not", "Give 1, or 0 for the base model"
            )
        super().set_scale(scale)

    @property
    def why_not_merged(self) -> str:
        """What a token says is no weight."""
        return "virtual tokens are read by the model, and no weight of it can hold them"

    def merge(self) -> None:
        """Raises MergeError."""
        raise MergeError(
            self.why_not_merged, "Use the run as it is, or train with --method lora for a model without overhead"
        )

    def unmerge(self) -> None:
        """Nothing was merged."""


class VirtualEmbedding(Virtual):
    """An embedding that also knows `tokens` ids beyond those of its base.

    rows: (tokens, width) float32, what they mean; None where other modules say that, and they begin as zeros.
    """

    rows: nn.Parameter | None

    def __init__(self, base: nn.Module, *, name: str, tokens: int, rows: Tensor | None, shared: SharedState) -> None:
        super().__init__(base, name=name, shared=shared, tied_to=None)
        self.known, self.tokens, self.slots = int(cast(int, base.num_embeddings)), tokens, Slots()
        self.register_parameter("rows", None if rows is None else nn.Parameter(rows))

    @property
    def lead(self) -> list[int]:
        """The virtual tokens' ids; none while they are off."""
        return list(range(self.known, self.known + self.tokens)) if self.is_active else []

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...). Returns (..., width)."""
        if not self.is_active:
            self.slots.now = None
            return cast(Tensor, self.base(ids))
        self.slots.now = ids - self.known
        y = cast(Tensor, self.base(ids.clamp(max=self.known - 1)))
        rows = self.rows if self.rows is not None else y.new_zeros(self.tokens, y.shape[-1])
        return self.slots.put(rows, y)


def lead_of(model: nn.Module) -> list[int]:
    """The ids that every row and prompt begins with; none for most models."""
    found = getattr(model, "_lorafit_lead", None)
    return found.lead if isinstance(found, VirtualEmbedding) else []


def virtual_embedding(model: nn.Module, tokens: int, rows: Tensor | None) -> tuple[str, VirtualEmbedding]:
    """The model's embedding with virtual tokens, and its name. Remembers it on the model."""
    base: nn.Module = model.get_input_embeddings()  # type: ignore[operator]  # a method of every transformers model
    name = next(name for name, module in model.named_modules() if module is base)
    made = VirtualEmbedding(base, name=name, tokens=tokens, rows=rows, shared=SharedState())
    object.__setattr__(model, "_lorafit_lead", made)  # not a second place for its parameters
    return name, made


def first_ids(wanted: Sequence[int], tokens: int, vocabulary: int, seed: int) -> list[int]:
    """As many ids as there are virtual tokens: those wanted, again and again; without any, drawn by the seed."""
    if wanted:
        return [wanted[number % len(wanted)] for number in range(tokens)]
    drawn: list[int] = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn
