"""Modules that share one weight (an embedding and its head, T5's embeddings): one adapter serves all of them.

Two adapters on one weight would disagree once merged, and an adapter on one of the modules alone would break the tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorafit.errors import TargetError
from lorafit.lora.base import kind_name, make_kind, refusal
from lorafit.quant.modules import Quantized


def weight_key(module: nn.Module) -> Any:
    """Equal for modules whose stored weight is the same memory in the same layout; None without a stored weight."""
    weight = module.stored.data if isinstance(module, Quantized) else module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return None
    if weight.device.type == "meta" or weight.numel() == 0:
        return id(weight)  # there is no memory to compare
    return (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device)


def tied_groups(model: nn.Module, names: Sequence[str], works_transposed: bool, variant: str) -> dict[str, list[str]]:
    """For each owner among the names: the other modules that have its weight, in the model's order.

    The owner is the first of the names that has the weight; its state is saved under that name.
    Raises TargetError if another module has the weight but can't follow the update.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    by_key: dict[Any, list[str]] = {}
    for name, module in modules.items():
        if name and weight_key(module) is not None:
            by_key.setdefault(weight_key(module), []).append(name)
    groups: dict[str, list[str]] = {}
    owned: set[Any] = set()
    for name in names:
        key = weight_key(modules[name])
        if key not in owned:
            owned.add(key)
            groups[name] = [other for other in by_key[key] if other != name]
            for other in groups[name]:
                _check_tie(name, modules[name], other, modules[other], works_transposed, variant)
    _check_bare_ties(modules, groups)
    return groups


def _check_tie(name: str, module: nn.Module, other: str, tied: nn.Module, works_transposed: bool, variant: str) -> None:
    reason = refusal(tied)
    if reason is not None:
        raise TargetError(f"{name} shares its weight with {other}, and that {reason}", f"Leave {name} out of targets")
    if make_kind(module).transposed != make_kind(tied).transposed and not works_transposed:
        raise TargetError(
            f"variant {variant!r} can't adapt {name}: its weight is also that of {other}, transposed, and a length per "
            "row of one is not a length per row of the other",
            f"Use variant 'lora', or leave {name} out of targets",
        )


def _check_bare_ties(modules: Mapping[str, nn.Module], groups: Mapping[str, list[str]]) -> None:
    """Raises TargetError if a module of no kind holds the very parameter that would be merged into."""
    owners = {id(modules[name]._parameters.get("weight")): name for name in groups}
    members = {modules[name] for owner, others in groups.items() for name in (owner, *others)}
    for other, module in modules.items():
        if module in members:
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in owners:
                name = owners[id(parameter)]
                where = f"{other}.{key}" if other else key
                known = kind_name(module) or type(module).__name__
                raise TargetError(
                    f"{name} shares its weight with {where} of a {known}, which can't follow its update",
                    f"Leave {name} out of targets",
                )
