"""BitFit: biases alone are trained. Source: Ben Zaken et al. 2022, BitFit, section 3.

Where a model has none, as most decoders, every linear layer of its blocks gets one that starts at 0.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lorafit.config import MethodConfig
from lorafit.errors import MergeError
from lorafit.lora.adapted import Adapted, SharedState
from lorafit.lora.targets import select, select_layers
from lorafit.methods import wrapped
from lorafit.methods.method import Attached
from lorafit.units import format_count


class Shifted(Adapted):
    """A module whose output is shifted: y = base(x) + s * shift.

    shift: (out_features,), float32, what is added to the bias that there is. Adam does not see where a parameter
    started, so this trains as the bias itself would.
    """

    shift: nn.Parameter
    changes = ("bias",)

    def __init__(self, base: nn.Module, *, name: str, width: int) -> None:
        super().__init__(base, name=name, shared=SharedState(), tied_to=None)
        like = next(base.parameters(), torch.empty(0))
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.register_parameter("shift", nn.Parameter(torch.zeros(width, dtype=dtype, device=like.device)))

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, shifted."""
        y = cast(Tensor, self.base(x))
        return y + (self.scale * self.shift).to(y.dtype) if self.is_active else y

    @property
    def why_not_merged(self) -> str | None:
        """A bias that the model has not."""
        if getattr(self.base, "bias", None) is not None:
            return None
        return f"{self.name} has no bias in the model, so its trained one has no place there"

    @torch.no_grad()
    def merge(self) -> None:
        """Add the shift to the bias. Twice is once. Raises MergeError where there is none to add it to."""
        if self.merged:
            return
        if self.why_not_merged:
            raise MergeError(self.why_not_merged, "Use the run as it is; other tools could not hold it either")
        bias = cast(Tensor, self.base.bias)
        self.shared.original = bias.detach().to("cpu", copy=True)
        bias.copy_(bias.to(self.shift.dtype) + self.scale * self.shift)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the bias back, bitwise."""
        if self.shared.original is not None:
            cast(Tensor, self.base.bias).copy_(self.shared.original)
            self.shared.original = None


def attach(model: nn.Module, config: MethodConfig) -> Attached:
    """A shift for every bias of linear layers and layer norms; where a model has none, for every linear layer."""
    notes: list[str] = []
    linear = select(model, config.targets).names
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    names = [name for name in (*linear, *norms) if getattr(model.get_submodule(name), "bias", None) is not None]
    if not names:
        names = linear
        notes.append("the model has no biases: every linear layer gets one, which starts at 0 and cannot be merged")
    names = select_layers(model, names, config.layers)
    made = {name: _shifted(model.get_submodule(name), name) for name in names}
    return wrapped.attached(model, made, f"biases of {format_count(len(names))} layers", notes)


def _shifted(base: nn.Module, name: str) -> Shifted:
    bias = getattr(base, "bias", None)
    width = len(bias) if isinstance(bias, Tensor) else int(getattr(base, "out_features", 0) or getattr(base, "nf", 0))
    return Shifted(base, name=name, width=width)


METHOD = wrapped.method(attach)
