"""Full fine-tuning: the model's own parameters are trained; with --layers, those of some blocks alone.

Nothing is put beside them, so a scale needs what they were before: that is kept where a run is loaded to be used, and
not while it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorafit.config import MethodConfig
from lorafit.errors import AdapterError, ConfigError, TargetError, listed
from lorafit.lora.targets import select_layers
from lorafit.methods.labels import label_head
from lorafit.methods.method import Attached, Method
from lorafit.methods.wrapped import begins_at_once, nothing_before
from lorafit.quant.modules import Quantized, number_count
from lorafit.units import format_count


@dataclass
class _Trained:
    """Names of the parameters that are trained; what they were before, and became, where a state was loaded."""

    names: list[str]
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0


def attach(model: nn.Module, config: MethodConfig) -> Attached:
    """Let parameters train: all, or those of --layers. Raises TargetError over weights in fewer bits."""
    if any(isinstance(module, Quantized) for module in model.modules()):
        raise TargetError("weights that stay in fewer bits cannot be trained themselves", "Leave out --base-storage")
    head = {id(parameter) for parameter in getattr(label_head(model), "parameters", list)()}
    owners = {name: p for name, p in model.named_parameters() if id(p) not in head}
    names = select_layers(model, list(owners), config.layers)
    model.requires_grad_(False)
    for name in names:
        owners[name].requires_grad_(True)
    model._lorafit_trained = _Trained(names)  # type: ignore[assignment]  # not a module or tensor
    count = sum(owners[name].numel() for name in names)
    where = "all parameters" if config.layers is None else f"parameters of layers {config.layers}"
    return Attached(count, number_count(model), f"{where} ({format_count(len(names))} tensors)", [])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    owners = dict(model.named_parameters())
    return {name: owners[name] for name in _trained(model).names}


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of them on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in trainable(model).items()}


@torch.no_grad()
def load_state(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Put them in, all or nothing. Raises AdapterError, with the tensor's name, if one does not fit."""
    own = trainable(model)
    missing, extra = [n for n in own if n not in given], [n for n in given if n not in own]
    if missing or extra:
        raise AdapterError(
            f"the parameters do not fit: {len(missing)} are missing, {len(extra)} have no place: "
            f"{listed(missing + extra, 3)}",
            "Is it the model that they were trained on?",
        )
    for name, parameter in own.items():
        if given[name].shape != parameter.shape:
            raise AdapterError(
                f"{name} has shape {tuple(given[name].shape)}, the model wants {tuple(parameter.shape)}",
                "Is it the model that they were trained on?",
            )
        if not given[name].isfinite().all():
            raise AdapterError(f"{name} holds values that are not finite", "Save the run again, or train it again")
    for name, parameter in own.items():
        parameter.copy_(given[name])


def keep_before(model: nn.Module) -> None:
    """Remember what the parameters are now, so that a scale can go back to it; before `load_state`."""
    _trained(model).before = {name: p.detach().clone() for name, p in trainable(model).items()}


@torch.no_grad()
def set_scale(model: nn.Module, scale: float) -> None:
    """W = W0 + s (W' - W0). Raises ConfigError where W0 was not kept."""
    kept = _trained(model)
    if scale == kept.scale:
        return
    if not kept.before:
        raise ConfigError("the weights before training were not kept", "Load the run to scale it")
    own = trainable(model)
    if not kept.after:
        kept.after = {name: p.detach().clone() for name, p in own.items()}
    for name, parameter in own.items():
        first, last = kept.before[name], kept.after[name]
        wide = torch.promote_types(first.dtype, torch.float32)
        parameter.copy_(
            torch.lerp(first.to(wide), last.to(wide), scale) if scale not in (0, 1) else (first, last)[int(scale)]
        )
    kept.scale = scale


def nothing(model: nn.Module) -> None:
    """The weights are the model's own: they are merged already."""


def forget(model: nn.Module) -> None:
    """Forget what they were before."""
    del model._lorafit_trained


def trained(model: nn.Module) -> _Trained | None:
    """What is known of a model whose own parameters are trained; None for any other."""
    found = getattr(model, "_lorafit_trained", None)
    return found if isinstance(found, _Trained) else None


def _trained(model: nn.Module) -> _Trained:
    found = trained(model)
    if found is None:
        raise TargetError("the model's parameters are not trained themselves", "Call attach(model, config) first")
    return found


METHOD = Method(
    attach=attach,
    start=begins_at_once,
    trainable=trainable,
    state=state,
    load_state=load_state,
    before_forward=nothing_before,
    finish=lambda model, config: config,
    set_scale=set_scale,
    merge=nothing,
    unmerge=nothing,
    forget=forget,
)
