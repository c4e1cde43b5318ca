"""(IA)3: learned factors on keys, values and the MLP's inner activations; all weights stay frozen.

Source: Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning,
section 3.3: l_k * K, l_v * V and l_ff * gamma(W1 x), all starting at 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafit.config import MethodConfig
from lorafit.errors import MergeError
from lorafit.lora.adapted import Adapted, SharedState
from lorafit.lora.base import Kind, make_kind
from lorafit.methods import wrapped
from lorafit.methods.method import Attached
from lorafit.methods.places import chosen
from lorafit.model.sublayers import KEYS_AND_VALUES, MLP_ENDS
from lorafit.units import format_count


class Rescaled(Adapted):
    """A linear layer with a factor for each output, or for each input: y = f * base(x), or base(f * x).

    factor: (out_features,) or (in_features,), float32. At scale s it is 1 + s (factor - 1).
    """

    factor: nn.Parameter

    def __init__(self, base: nn.Module, *, name: str, of_inputs: bool) -> None:
        super().__init__(base, name=name, shared=SharedState(), tied_to=None)
        self.kind: Kind = make_kind(base)
        self.of_inputs = of_inputs
        self.changes = ("weight", "bias") if self.kind.bias is not None and not of_inputs else ("weight",)
        self.bias_before: Tensor | None = None
        width = self.kind.in_features if of_inputs else self.kind.out_features
        like = self.kind.like
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.register_parameter("factor", nn.Parameter(torch.ones(width, dtype=dtype, device=like.device)))

    def in_force(self) -> Tensor:
        """The factors at the present scale."""
        return self.factor if self.scale == 1 else 1 + self.scale * (self.factor - 1)

    def forward(self, x: Tensor) -> Tensor:
        """The layer of rescaled inputs, or its rescaled output, bias included."""
        if not self.is_active:
            return self.base(x)  # type: ignore[no-any-return]  # a module's call is untyped
        factor = self.in_force().to(x.dtype)
        return self.base(x * factor) if self.of_inputs else self.base(x) * factor  # type: ignore[no-any-return]

    @torch.no_grad()
    def merge(self) -> None:
        """W' = W diag(f), or diag(f) W and f * bias. Twice is once. Raises MergeError if that is not finite."""
        if self.merged:
            return
        W, factor = self.kind.read_weight(), self.in_force()
        merged = W.to(factor.dtype) * (factor if self.of_inputs else factor[:, None])
        if not merged.isfinite().all():
            raise MergeError(f"merging {self.name} gives weights that are not finite", "Lower the scale")
        self.shared.original = self.kind.weight.detach().to("cpu", copy=True)
        self.kind.write_weight(merged)
        bias = self.kind.bias
        if bias is not None and not self.of_inputs:
            self.bias_before = bias.detach().clone()
            bias.copy_(bias.to(factor.dtype) * factor)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put weight and bias back, bitwise."""
        if self.shared.original is not None:
            self.kind.write_weight(self.kind.as_matrix(self.shared.original))
            self.shared.original = None
        if self.bias_before is not None and self.kind.bias is not None:
            self.kind.bias.copy_(self.bias_before)
            self.bias_before = None

    def forget_original(self) -> None:
        """Weight and bias."""
        super().forget_original()
        self.bias_before = None


def attach(model: nn.Module, config: MethodConfig) -> Attached:
    """Factors on keys, values and MLPs. A layer of --targets that ends an MLP has them on its inputs."""
    names = chosen(model, config, (*KEYS_AND_VALUES, *MLP_ENDS))
    inner = set(chosen(model, config.model_copy(update={"targets": "all-linear"}), MLP_ENDS))
    made = {n: Rescaled(model.get_submodule(n), name=n, of_inputs=n in inner) for n in names}
    return wrapped.attached(model, made, f"factors on {format_count(len(names))} layers")


METHOD = wrapped.method(attach)
