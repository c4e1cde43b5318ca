"""The modules of a model that a method works on: those of --targets, or those of the usual names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorafit.config import MethodConfig
from lorafit.errors import TargetError, listed
from lorafit.lora.base import LINEAR_KINDS, kind_name, refusal
from lorafit.lora.targets import ALL_LINEAR, leaf_names, matches, select, select_layers
from lorafit.model.sublayers import is_one_of


def chosen(model: nn.Module, config: MethodConfig, usual: Sequence[str]) -> list[str]:
    """The linear layers of --targets, or by default those of the names in `usual`, in the blocks of --layers.

    Raises TargetError where there are none.
    """
    if config.targets != ALL_LINEAR:
        names = select(model, config.targets).names
    else:
        names = [name for name, module in model.named_modules() if _is_linear(module) and is_one_of(name, usual)]
    if not names:
        raise _not_found(model, usual)
    return select_layers(model, names, config.layers)


def modules_named(model: nn.Module, config: MethodConfig, usual: Sequence[str]) -> list[str]:
    """Modules of any kind, as `chosen`."""
    patterns = usual if config.targets == ALL_LINEAR else config.targets
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [name for name, _ in model.named_modules() if any(matches(pattern, name) for pattern in wanted)]
    if not names:
        raise _not_found(model, wanted)
    return select_layers(model, names, config.layers)


def _is_linear(module: nn.Module) -> bool:
    return kind_name(module) in LINEAR_KINDS and refusal(module) is None


def _not_found(model: nn.Module, usual: Sequence[str]) -> TargetError:
    here = leaf_names(name for name, module in model.named_modules() if _is_linear(module))
    return TargetError(
        f"this model has no layer of the usual names ({listed(usual, 20)})", f"Name some of its own: {listed(here, 20)}"
    )
