"""Prefix tuning: keys and values of virtual tokens are trained in every layer, and nothing else.

- `p-tuning-v2`: keys and values themselves are trained; they start as those of real tokens. Liu et al. 2022, P-Tuning
  v2, section 3.3.
- `reparametrised`: a small network gives them and is trained; at the end it is dropped, and they alone remain. Li and
  Liang 2021, section 4.3.

They take the place of what `k_proj` and `v_proj` give for the virtual tokens, before keys are rotated. Rotation by a
fixed position is orthogonal, so this reaches the same keys as training them rotated, as PEFT does.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.config import MethodConfig
from lorafit.errors import TargetError
from lorafit.lora.adapted import Adapted, SharedState
from lorafit.lora.init import layer_generator
from lorafit.lora.inject import adapted_modules
from lorafit.methods import wrapped
from lorafit.methods.method import Attached, Beginning
from lorafit.methods.places import chosen
from lorafit.methods.virtual import Slots, Virtual, VirtualEmbedding, first_ids, virtual_embedding
from lorafit.model.sublayers import FUSED, SEPARATE
from lorafit.units import format_count

# Of the network's weights, and of keys and values that no real token gave. Source: GPT-2's, which Li and Liang tuned.
STD = 0.02


class PrefixPart(Virtual):
    """A linear layer whose output for virtual tokens is trained: keys, values, or both behind the queries.

    first: which output is the first one of them. Trained, float32: rows (tokens, width), or while they are
    reparametrised second (width, hidden) and second_bias (width,), which `network` is put through.
    """

    rows: nn.Parameter | None

    def __init__(self, base: nn.Module, *, name: str, slots: Slots, shared: SharedState, first: int) -> None:
        super().__init__(base, name=name, shared=shared, tied_to=None)
        self.slots, self.first = slots, first
        self.width = int(getattr(base, "out_features", 0) or getattr(base, "nf", 0)) - first
        self.network: list[PrefixPart] = []  # the part that holds what all share; not a module of this one
        self.register_parameter("rows", None)

    def values(self) -> Tensor:
        """Keys or values of the virtual tokens: (tokens, width) float32. Source: Li and Liang 2021, eq. 5."""
        if self.rows is not None:
            return self.rows
        shared = self.network[0]
        table, inner, inner_bias = (cast(Tensor, getattr(shared, key)) for key in ("table", "inner", "inner_bias"))
        hidden = torch.tanh(F.linear(table, inner, inner_bias))
        return F.linear(hidden, cast(Tensor, self.second), cast(Tensor, self.second_bias))

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, with its own for virtual tokens."""
        y = cast(Tensor, self.base(x))
        if not self.is_active:
            return y
        if not self.first:
            return self.slots.put(self.values(), y)
        return torch.cat([y[..., : self.first], self.slots.put(self.values(), y[..., self.first :])], dim=-1)


def attach(model: nn.Module, config: MethodConfig) -> Attached:
    """Virtual tokens in front, and their keys and values in the blocks of --layers."""
    names = chosen(model, config, (*SEPARATE, *FUSED))
    name, embedding = virtual_embedding(model, config.virtual_tokens, None)
    made: dict[str, Adapted] = {name: embedding}
    for part in names:
        base = model.get_submodule(part)
        made[part] = PrefixPart(
            base, name=part, slots=embedding.slots, shared=embedding.shared, first=_first(model, part)
        )
    parts = [module for module in made.values() if isinstance(module, PrefixPart)]
    _fill(parts, config, int(model.config.get_text_config().hidden_size))  # type: ignore[union-attr, operator]
    summary = f"keys and values of {config.virtual_tokens} virtual tokens in {format_count(len(parts))} layers"
    return wrapped.attached(model, made, summary)


def _first(model: nn.Module, name: str) -> int:
    """Where keys begin among the outputs of a layer: after the queries, where it gives those too."""
    leaf = name.rpartition(".")[2]
    if leaf not in FUSED:
        return 0
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    first: int = config.num_attention_heads * dim
    base = model.get_submodule(name)
    width = int(getattr(base, "out_features", 0) or getattr(base, "nf", 0))
    if width != first + 2 * kv_heads * dim:
        raise TargetError(f"{name} gives {width} numbers, not queries, keys and values", "Use --method prompt")
    return first


def _fill(parts: list[PrefixPart], config: MethodConfig, hidden: int) -> None:
    """Fresh parameters, drawn part by part, so that leaving one out does not change the others."""

    def drawn(part: PrefixPart, key: str, *shape: int) -> None:
        generator = layer_generator(config.seed, f"{part.name}.{key}")
        value = (
            torch.zeros(shape) if key.endswith("bias") else torch.empty(shape).normal_(0.0, STD, generator=generator)
        )
        part.register_parameter(key, nn.Parameter(value))

    for part in parts:
        if config.variant == "p-tuning-v2":
            drawn(part, "rows", config.virtual_tokens, part.width)
            continue
        if part is parts[0]:
            drawn(part, "table", config.virtual_tokens, hidden)
            drawn(part, "inner", hidden, hidden)
            drawn(part, "inner_bias", hidden)
        drawn(part, "second", part.width, hidden)
        drawn(part, "second_bias", part.width)
        part.network = [parts[0]]


def start(model: nn.Module, beginning: Beginning) -> list[str]:
    """Let keys and values start as those of real tokens. Source: Li and Liang 2021, section 7.4."""
    parts = [module for module in adapted_modules(model).values() if isinstance(module, PrefixPart)]
    if parts[0].rows is None:
        return ["keys and values start as a random network gives them"]
    embedding = next(module for module in model.modules() if isinstance(module, VirtualEmbedding))
    ids = first_ids(beginning.first_ids, embedding.tokens, embedding.known, beginning.config.seed)
    seen: dict[nn.Module, Tensor] = {}
    handles = [
        part.base.register_forward_hook(lambda module, given, y, part=part: seen.update({part: y})) for part in parts
    ]
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            for part in parts:
                cast(Tensor, part.rows).copy_(seen[part][0, :, part.first :])
    finally:
        for handle in handles:
            handle.remove()
    return [f"keys and values start as those of {beginning.told}"]


def finish(model: nn.Module, config: MethodConfig) -> MethodConfig:
    """Drop the network: what it gives remains."""
    parts = [module for module in adapted_modules(model).values() if isinstance(module, PrefixPart)]
    values = [part.values().detach().clone() for part in parts]
    for part, rows in zip(parts, values, strict=True):
        for key in [key for key, _ in part.named_parameters(recurse=False)]:
            part.register_parameter(key, None)
        part.register_parameter("rows", nn.Parameter(rows))
    return config.model_copy(update={"variant": "p-tuning-v2"})


METHOD = wrapped.method(attach, start, finish)
