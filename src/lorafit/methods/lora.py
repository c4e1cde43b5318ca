"""Low-rank adaptation: W0 frozen, dW = scaling * B A trained. Source: Hu et al. 2021, eq. 3."""

from __future__ import annotations

import dataclasses
import re

from torch import Tensor, nn

from lorafit.config import LoRAConfig, MethodConfig
from lorafit.errors import ConfigError, did_you_mean, listed
from lorafit.lora import gates, inject
from lorafit.lora.init import INITS
from lorafit.methods import rounding, spectral, wrapped
from lorafit.methods.method import Attached, Beginning
from lorafit.units import format_count


def attach(model: nn.Module, config: LoRAConfig) -> Attached:
    """Freeze the model and adapt what `config` names. Raises TargetError, RankError or ConfigError."""
    known = (*INITS, *rounding.INITS, *spectral.STARTS)
    if config.init not in known:
        hint = did_you_mean(config.init, known) or "Choose one of them"
        raise ConfigError(f"--init {config.init!r} is not known; there are {listed(known)}", hint)
    report = inject.attach(
        model,
        r=config.r,
        alpha=config.alpha,
        targets=config.targets,
        variant=config.variant,
        rule=config.scaling_rule,
        init=config.init if config.init in INITS else "gaussian",  # until `start`
        dropout=config.dropout,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        layers=config.layers,
        seed=config.seed,
    )
    ranks = sorted({layer.r for layer in report.adapted.values()})
    summary = f"{config.variant} of rank {', '.join(map(str, ranks))} on {format_count(len(report.adapted))} layers"
    return Attached(report.trainable_params, report.total_params, summary, report.notes)


def before_forward(model: nn.Module, seed: int, step: int, rows: Tensor, tokens: Tensor) -> None:
    """Turn the adapters' dropout on and key it; the frozen base stays in eval mode."""
    for layer in inject.attached_layers(model):
        layer.training = True
    key = inject.dropout_key(model)
    key.seed, key.step, key.rows, key.tokens = seed, step, rows, tokens


def start(model: nn.Module, beginning: Beginning) -> list[str]:
    """What an initialisation needs rows or the model's own weights for."""
    config = beginning.config
    if config.init in spectral.STARTS:
        return spectral.start(model, beginning)
    if config.init not in rounding.INITS:
        return []
    return [rounding.start(model, beginning.spec, config.init, beginning.over_rows)]


def finish(model: nn.Module, config: MethodConfig) -> MethodConfig:
    """Fold gates into factors, and take off the layers that have none left. Without gates nothing is done."""
    layers = inject.attached_layers(model)
    if all(layer.gate is None for layer in layers):
        return config
    inject.take_off(model, [layer.name for layer in layers if gates.rank(layer) == 0])
    for layer in (left := inject.owners(model)).values():
        gates.fold(layer, config.scaling_rule)
    exact = {name: f"re:{re.escape(name)}" for name in left}
    return config.model_copy(
        update={
            "targets": list(exact.values()),
            "layers": None,
            "rank_pattern": {exact[name]: layer.r for name, layer in left.items()},
            "alpha_pattern": {exact[name]: layer.alpha for name, layer in left.items()},
        }
    )


METHOD = dataclasses.replace(wrapped.method(attach, start, finish), before_forward=before_forward)
