"""A head of labels alone: the frozen model's features, and a linear layer on them. See `methods.labels`.

Source: Alain and Bengio 2016, Understanding intermediate layers using linear classifier probes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lorafit.config import MethodConfig
from lorafit.errors import ConfigError
from lorafit.methods import wrapped
from lorafit.methods.labels import label_head
from lorafit.methods.method import Attached


def attach(model: nn.Module, config: MethodConfig) -> Attached:
    """Freeze the model; its head of labels is what trains. Raises ConfigError where it has none."""
    if label_head(model) is None:
        raise ConfigError(
            "--method head trains a head of labels, and these rows have none", "Give rows with text and label"
        )
    return wrapped.attached(model, {}, "a frozen model")


def set_scale(model: nn.Module, scale: float) -> None:
    """Raises ConfigError for any scale but 1: the model's own weights are as they were."""
    if scale != 1:
        raise ConfigError(f"--scale {scale:g} is given, and a head alone has nothing to scale", "Leave it out")


METHOD = replace(wrapped.method(attach), set_scale=set_scale)
