"""What every method does to a model, as a record of functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorafit.config import MethodConfig
from lorafit.model.spec import ModelSpec


@dataclass(frozen=True)
class Attached:
    """What a method did to a model. Parameters that several layers share are counted once.

    total_params: those of the base, without what the method added.
    """

    trainable_params: int
    total_params: int
    summary: str
    notes: list[str]


@dataclass(frozen=True)
class Beginning:
    """What a method may know before the first step.

    first_ids: tokens that virtual ones are to start as. told: where they are from. over_rows: takes the model over the
    rows of the first step; with_gradients: back as well, of some of them at once.
    """

    config: MethodConfig
    spec: ModelSpec
    first_ids: Sequence[int] = ()
    told: str = ""
    over_rows: Callable[[], Any] = field(default=lambda: None)
    with_gradients: Callable[[], Any] = field(default=lambda: None)


@dataclass(frozen=True)
class Method:
    """The operations of a method on a model.

    attach(model, config): add what is trained, freeze the rest. start(model, beginning): before the first step of a
    fresh run; returns lines to be shown. trainable(model): {name: parameter}.
    state(model) and load_state(model, state): every trained tensor by name, strict.
    before_forward(model, seed, step, rows, tokens): called before each forward pass of training; what it draws at
    random depends on its arguments alone. rows, tokens: (batch, tokens) int64: each token's row in the data set, and
    its position in that row.
    finish(model, config): after the last step; returns the settings that attach what is left to be saved.
    set_scale, merge, unmerge: as in `lora.inject`. forget(model): take off what was merged, and keep the weights.
    """

    attach: Callable[[nn.Module, MethodConfig], Attached]
    start: Callable[[nn.Module, Beginning], list[str]]
    trainable: Callable[[nn.Module], dict[str, nn.Parameter]]
    state: Callable[[nn.Module], dict[str, Tensor]]
    load_state: Callable[[nn.Module, dict[str, Tensor]], None]
    before_forward: Callable[[nn.Module, int, int, Tensor, Tensor], None]
    finish: Callable[[nn.Module, MethodConfig], MethodConfig]
    set_scale: Callable[[nn.Module, float], None]
    merge: Callable[[nn.Module], None]
    unmerge: Callable[[nn.Module], None]
    forget: Callable[[nn.Module], None]
