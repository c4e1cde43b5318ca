"""What all methods have in common that put modules in the place of others: see `lora.inject`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from lorafit.config import MethodConfig
from lorafit.lora import inject
from lorafit.lora.adapted import Adapted
from lorafit.methods.method import Attached, Beginning, Method


def attached(model: nn.Module, made: Mapping[str, Adapted], summary: str, notes: list[str] | None = None) -> Attached:
    """Put the modules in and freeze all else. Raises TargetError if the model has an adapter already."""
    told = list(notes or ())
    total = inject.install(model, made, notes=told)
    count = sum(parameter.numel() for parameter in inject.trainable_parameters(model))
    return Attached(count, total, summary, told)


def nothing_before(model: nn.Module, seed: int, step: int, rows: Tensor, tokens: Tensor) -> None:
    """Nothing is drawn at random."""


def begins_at_once(model: nn.Module, beginning: Beginning) -> list[str]:
    """Nothing is to be known of rows first."""
    return []


def method(
    attach: Callable[[nn.Module, MethodConfig], Attached],
    start: Callable[[nn.Module, Beginning], list[str]] = begins_at_once,
    finish: Callable[[nn.Module, MethodConfig], MethodConfig] = lambda model, config: config,
) -> Method:
    """A method that is told by what it attaches, and what it does before the first step and after the last."""
    return Method(
        attach=attach,
        start=start,
        trainable=inject.trained_parameters,
        state=inject.adapter_state,
        load_state=inject.load_adapter_state,
        before_forward=nothing_before,
        finish=finish,
        set_scale=inject.set_scale,
        merge=inject.merge,
        unmerge=inject.unmerge,
        forget=inject.forget_originals,
    )
