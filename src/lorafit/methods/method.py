"""What every method does to a model, as a record of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lorafit.config import LoRAConfig


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
class Method:
    """The operations of a method on a model.

    attach(model, config): add what is trained, freeze the rest. trainable(model): {name: parameter}.
    state(model) and load_state(model, state): every trained tensor by name, strict.
    before_forward(model, seed, step, rows, tokens): called before each forward pass of training; what it draws at
    random depends on its arguments alone. rows, tokens: (batch, tokens) int64: each token's row in the data set, and
    its position in that row.
    """

    attach: Callable[[nn.Module, LoRAConfig], Attached]
    trainable: Callable[[nn.Module], dict[str, nn.Parameter]]
    state: Callable[[nn.Module], dict[str, Tensor]]
    load_state: Callable[[nn.Module, dict[str, Tensor]], None]
    before_forward: Callable[[nn.Module, int, int, Tensor, Tensor], None]
