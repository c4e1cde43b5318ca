"""Modules that an adapter replaces whole in PEFT's format: `modules_to_save`, and every parameter of each.

Where modules share a weight PEFT tears them apart, unless `ensure_weight_tying` is set: a head that is saved is then
another than the embedding. The same is done here, and merging writes them apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.errors import AdapterError, listed
from lorafit.export.peft_tensors import PREFIX, check_tensor
from lorafit.lora.whole import OWN, Whole, with_same_weight


def read_whole(value: Any, config_name: str) -> list[str]:
    """modules_to_save of adapter_config.json: ends of names. Raises AdapterError for anything else."""
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise AdapterError(f"{config_name} has modules_to_save = {value!r}", "It must be a list of names of modules")
    return value


def whole_to_peft(modules: Mapping[str, Whole]) -> dict[str, Tensor]:
    """The parameters under PEFT's keys, on the CPU, each module's own."""
    return {
        f"{PREFIX}{name}.{key}": module.get_parameter(OWN + key).detach().to("cpu", copy=True)
        for name, module in modules.items()
        for key in module.keys
    }


def whole_groups(model: nn.Module, ends: Collection[str], tensors: Mapping[str, Tensor], tied: bool) -> list[list[str]]:
    """Which modules are replaced, those together that share what is new. tied: PEFT was told to keep ties.

    A name that a model has not is passed over, as PEFT itself does: it names both `score` and `classifier` for every
    classifier. Raises AdapterError if the model has none of them.
    """
    if not ends:
        return []
    matched = [name for name, _ in model.named_modules() if name and name.endswith(tuple(ends))]
    names = [name for top in matched for name in _with_parameters(model, top)]
    if not names:
        raise AdapterError(
            f"modules_to_save names {listed(sorted(ends))}, and the model has no such module",
            "Load the adapter into the model that it was trained on",
        )
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        same = with_same_weight(model, name)
        owner = next((first for first in groups if first in same and (tied or _equal(first, name, tensors))), None)
        if owner is None:
            groups[name] = [name]
            owner = name
        groups[owner] += [other for other in same if tied and other not in groups[owner]]
        if name not in groups[owner]:
            groups[owner].append(name)
    return list(groups.values())


def split_whole(
    modules: Mapping[str, Whole], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the parameters under our names, all other tensors). Raises AdapterError, with the key, for one missing or unfit.

    One that shares what is new with another may be in the file or not; if it is, it must be the same.
    """
    others, found = dict(tensors), dict[str, Tensor]()
    for name, module in modules.items():
        for key in module.keys:
            theirs, own = f"{PREFIX}{name}.{key}", f"{module.tied_to or name}.{OWN}{key}"
            if theirs not in others:
                if module.tied_to is None:
                    raise AdapterError(f"{theirs} is missing", "Copy the adapter again, and whole")
                continue
            check_tensor(theirs, others[theirs], module.get_parameter(OWN + key))
            value = others.pop(theirs)
            if not torch.equal(found.setdefault(own, value), value):
                raise AdapterError(
                    f"{theirs} is not what {module.tied_to} has, and both were to be one weight",
                    "Load the adapter with PEFT",
                )
    return found, others


def _with_parameters(model: nn.Module, top: str) -> list[str]:
    """A module, or what lies inside it, that has parameters of its own."""
    inside = model.get_submodule(top).named_modules()
    return [
        f"{top}.{name}".rstrip(".")
        for name, module in inside
        if any(p is not None for p in module._parameters.values())
    ]


def _equal(first: str, second: str, tensors: Mapping[str, Tensor]) -> bool:
    a, b = (tensors.get(f"{PREFIX}{name}.weight") for name in (first, second))
    return a is not None and b is not None and torch.equal(a, b)
