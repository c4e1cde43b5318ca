"""Bottleneck adapters: small networks beside or behind a block's sublayers; what they compute cannot be merged.

- `houlsby`: behind attention and behind the MLP. Houlsby et al. 2019, section 2.1, figure 2.
- `pfeiffer`: behind the MLP. Pfeiffer et al. 2021, AdapterFusion, section 3.2.
- `parallel`: beside the MLP, on its input, times 4. He et al. 2022, Towards a Unified View, sections 3.3 and 4.6.
- `compacter`: as `houlsby`, with weights that are sums of Kronecker products, of which one factor is shared by all
  layers. Karimi Mahabadi et al. 2021, Compacter, section 4.

The second weight and its bias start at 0, so that a fresh adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.config import MethodConfig
from lorafit.errors import ConfigError, MergeError
from lorafit.lora.adapted import Adapted, SharedState
from lorafit.lora.init import layer_generator
from lorafit.methods import wrapped
from lorafit.methods.method import Attached
from lorafit.methods.places import chosen, modules_named
from lorafit.model.sublayers import ATTENTION_ENDS, MLP_ENDS, MLPS
from lorafit.units import format_count

# Source: He et al. 2022, section 4.6: a fixed scaling of 4 worked best for parallel adapters.
PARALLEL_SCALING = 4.0
# How many Kronecker products are summed. Source: Karimi Mahabadi et al. 2021, section 5: n = 4.
KRONECKER = 4
# Of the first weight. Source: Houlsby et al. 2019, section 3.1 (a normal with a standard deviation of 0.01).
FIRST_STD = 0.01


class Weights(Protocol):
    """How the two matrices of a bottleneck are held: those to train by name, and the matrices made of them."""

    def make(self, width: int, inner: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh tensors for a model of `width` and a bottleneck of `inner`; the second matrix is 0."""
        ...

    def matrices(self, layer: Bottleneck) -> tuple[Tensor, Tensor]:
        """(inner, width) and (width, inner)."""
        ...


class Dense:
    """Two matrices as they are."""

    def make(self, width: int, inner: int, generator: torch.Generator) -> dict[str, Tensor]:
        """down: (inner, width), up: (width, inner)."""
        down = torch.empty(inner, width).normal_(0.0, FIRST_STD, generator=generator)
        return {"down": down, "up": torch.zeros(width, inner)}

    def matrices(self, layer: Bottleneck) -> tuple[Tensor, Tensor]:
        """As they are."""
        return cast(Tensor, layer.down), cast(Tensor, layer.up)


class Kronecker:
    """W = sum over i of A_i (x) s_i t_i^T, A_i shared by all adapters of the model. Source: Compacter, eq. 5 and 6.

    rules: {"down_rule", "up_rule"} (n, n, n) each, held by the first adapter.
    """

    def __init__(self, rules: dict[str, Tensor]) -> None:
        self.rules = rules

    def make(self, width: int, inner: int, generator: torch.Generator) -> dict[str, Tensor]:
        """S and t of each matrix: (n, rows / n, 1) and (n, 1, columns / n). The second's t is 0."""
        if width % KRONECKER or inner % KRONECKER:
            raise ConfigError(
                f"--variant compacter cuts widths into {KRONECKER} parts; the model's is {width}, --bottleneck {inner}",
                f"Give --bottleneck as a multiple of {KRONECKER}"
                + ("" if width % KRONECKER == 0 else ", or another variant"),
            )
        rows, columns = inner // KRONECKER, width // KRONECKER
        # Glorot's deviation for each factor, as the authors' code has it.
        std = (2.0 / (rows + columns)) ** 0.5

        def drawn(*shape: int) -> Tensor:
            return torch.empty(shape).normal_(0.0, std, generator=generator)

        return {
            "down_s": drawn(KRONECKER, rows, 1),
            "down_t": drawn(KRONECKER, 1, columns),
            "up_s": drawn(KRONECKER, columns, 1),
            "up_t": torch.zeros(KRONECKER, 1, rows),
        }

    def matrices(self, layer: Bottleneck) -> tuple[Tensor, Tensor]:
        """The sums, made anew in every pass."""
        return self._sum("down", layer), self._sum("up", layer)

    def _sum(self, which: str, layer: Bottleneck) -> Tensor:
        inner = getattr(layer, f"{which}_s") @ getattr(layer, f"{which}_t")
        rule = self.rules[f"{which}_rule"]
        rows, columns = inner.shape[1], inner.shape[2]
        return torch.einsum("iab,icd->acbd", rule, inner).reshape(len(rule) * rows, len(rule) * columns)


class Bottleneck(Adapted):
    """y + s * c * (up act(down x + b) + b'), x the base's output y, or its input where it stands beside.

    Trained, float32: what `Weights` holds, down_bias (inner,), up_bias (width,). scaling: c.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        name: str,
        weights: Weights,
        parameters: dict[str, nn.Parameter],
        beside: bool,
    ) -> None:
        super().__init__(base, name=name, shared=SharedState(), tied_to=None)
        self.weights, self.beside = weights, beside
        self.scaling = PARALLEL_SCALING if beside else 1.0
        for key, parameter in parameters.items():
            self.register_parameter(key, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, and the bottleneck's beside or behind it."""
        y = cast(Tensor, self.base(x))
        return y + self.branch(x if self.beside else y).to(y.dtype) if self.is_active else y

    def branch(self, x: Tensor) -> Tensor:
        """The bottleneck at the present scale. x: (..., width)."""
        down, up = self.weights.matrices(self)
        b, c = cast(Tensor, self.down_bias), cast(Tensor, self.up_bias)
        inner = F.gelu(F.linear(x, down.to(x.dtype), b.to(x.dtype)))
        factor = self.scaling * self.scale
        return factor * F.linear(inner, up.to(x.dtype), c.to(x.dtype))

    @property
    def why_not_merged(self) -> str:
        """A network of its own does what no weight does."""
        return "bottleneck adapters are networks of their own, which no weight of the base can hold"

    def merge(self) -> None:
        """Raises MergeError."""
        raise MergeError(
            self.why_not_merged, "Use the run as it is, or train with --method lora for a model without overhead"
        )

    def unmerge(self) -> None:
        """Nothing was merged."""

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"inner={len(cast(Tensor, self.down_bias))}, scale={self.scale:g}"


@dataclass(frozen=True)
class Form:
    """A variant: which modules it is put behind, or beside."""

    places: Callable[[nn.Module, MethodConfig], list[str]]
    beside: bool = False
    shares: bool = False


FORMS: dict[str, Form] = {
    "houlsby": Form(lambda model, config: chosen(model, config, (*ATTENTION_ENDS, *MLP_ENDS))),
    "pfeiffer": Form(lambda model, config: chosen(model, config, MLP_ENDS)),
    "parallel": Form(lambda model, config: modules_named(model, config, MLPS), beside=True),
    "compacter": Form(lambda model, config: chosen(model, config, (*ATTENTION_ENDS, *MLP_ENDS)), shares=True),
}


def attach(model: nn.Module, config: MethodConfig) -> Attached:
    """Bottlenecks of width --bottleneck. Raises TargetError where the model has no layers of the usual names."""
    form = FORMS[config.variant]
    rules = _rules(config) if form.shares else {}
    weights: Weights = Kronecker(cast("dict[str, Tensor]", rules)) if form.shares else Dense()
    made: dict[str, Adapted] = {}
    for name in form.places(model, config):
        base = model.get_submodule(name)
        width, like = _width(base), next(p for p in model.parameters() if p.is_floating_point())
        tensors = weights.make(width, config.bottleneck, layer_generator(config.seed, name))
        tensors |= {"down_bias": torch.zeros(config.bottleneck), "up_bias": torch.zeros(width)}
        dtype = torch.promote_types(like.dtype, torch.float32)
        own = {key: nn.Parameter(value.to(like.device, dtype)) for key, value in tensors.items()}
        if not made:  # what all share is the first one's
            own |= rules
        made[name] = Bottleneck(base, name=name, weights=weights, parameters=own, beside=form.beside)
    where = "beside" if form.beside else "behind"
    summary = f"{config.variant} adapters of width {config.bottleneck} {where} {format_count(len(made))} layers"
    return wrapped.attached(model, made, summary)


def _rules(config: MethodConfig) -> dict[str, nn.Parameter]:
    def drawn(name: str) -> nn.Parameter:
        generator = layer_generator(config.seed, name)
        return nn.Parameter(torch.empty(KRONECKER, KRONECKER, KRONECKER).normal_(0.0, 0.1, generator=generator))

    return {"down_rule": drawn("down_rule"), "up_rule": drawn("up_rule")}


def _width(base: nn.Module) -> int:
    """What a sublayer gives: the outputs of its last linear layer."""
    widths = [
        int(getattr(module, "out_features", 0) or getattr(module, "nf", 0))
        for module in base.modules()
        if hasattr(module, "out_features") or hasattr(module, "nf")
    ]
    return widths[-1]


METHOD = wrapped.method(attach)
