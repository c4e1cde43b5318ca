"""LoRA whose layers begin with more rank than they will have: attached with gates. `lora.finish` folds them."""

from __future__ import annotations

import dataclasses
import math

from torch import nn

from lorafit.config import TrainConfig
from lorafit.errors import ConfigError
from lorafit.lora import gates, inject
from lorafit.lora.update import scaling
from lorafit.methods import table
from lorafit.methods.method import Attached
from lorafit.units import format_count

# What a schedule of ranks says nothing of, with what it must be.
AS_USUAL = {"method": "lora", "variant": "lora", "init": "gaussian", "rank_pattern": {}}


def check(config: TrainConfig) -> None:
    """Raise ConfigError where a schedule of ranks is given with what it cannot go with."""
    if config.rank_schedule != "adalora":
        return
    for name, usual in AS_USUAL.items():
        if (got := getattr(config, name)) != usual:
            raise ConfigError(
                f"--rank-schedule {config.rank_schedule} is given with --{name.replace('_', '-')} {got}",
                f"It decides ranks itself, and starts in its own way; leave --{name.replace('_', '-')} out",
            )
    if first_rank(config) < config.r:
        raise ConfigError(
            f"--r-start {config.r_start} is below --r {config.r}, the mean rank to end with", "Begin with more"
        )
    if config.rank_hold + config.rank_settle >= 1:
        raise ConfigError(
            f"--rank-hold {config.rank_hold:g} and --rank-settle {config.rank_settle:g} leave no steps between them",
            "Let them add up to less than 1",
        )


def first_rank(config: TrainConfig) -> int:
    """What layers begin with; half as much again as they end with, as in Zhang et al. 2023, section 4.1."""
    return config.r_start or math.ceil(1.5 * config.r)


def as_attached(config: TrainConfig) -> TrainConfig:
    """The settings that the adapter begins with: more rank, and the scaling of the one that is meant."""
    if config.rank_schedule != "adalora":
        return config
    r = first_rank(config)
    more = scaling(config.r, 1.0, config.scaling_rule) / scaling(r, 1.0, config.scaling_rule)
    alphas = {pattern: more * alpha for pattern, alpha in config.alpha_pattern.items()}
    return config.model_copy(update={"r": r, "alpha": more * config.alpha, "alpha_pattern": alphas})


def followed_numbers(config: TrainConfig, params: int) -> int:
    """Numbers that are kept beside so many trained ones: the importance of each, and how uncertain that is."""
    return 2 * params if config.rank_schedule == "adalora" else 0


def attach(model: nn.Module, config: TrainConfig) -> Attached:
    """As `table.attach`, with gates where ranks have a schedule. Raises what that does."""
    attached = table.attach(model, as_attached(config))
    if config.rank_schedule != "adalora":
        return attached
    gates.put_on(inject.attached_layers(model), config.seed)
    layers = inject.owners(model)
    return dataclasses.replace(
        attached,
        trainable_params=attached.trainable_params + sum(layer.r for layer in layers.values()),
        summary=f"{attached.summary}, {format_count(config.r)} in the mean at the end",
    )


def ranks(model: nn.Module, config: TrainConfig) -> dict[str, int] | None:
    """The rank of every adapted layer now, where they have a schedule."""
    if config.rank_schedule != "adalora":
        return None
    return {name: gates.rank(layer) for name, layer in inject.owners(model).items()}
