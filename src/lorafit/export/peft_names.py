"""Which modules an adapter_config.json means, and how to name exactly those in it.

The rules are those of PEFT 0.21 (`check_target_module_exists`, `get_pattern_key`), followed to the letter: what PEFT
adapts is adapted here, and what it leaves alone is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lorafit.errors import AdapterError, listed
from lorafit.lora.adapted import Adapted
from lorafit.lora.base import LINEAR_KINDS, kind_name

ALL_LINEAR = "all-linear"
HEAD_NAMES = ("score", "classifier")  # PEFT's names of a classification head, which all-linear leaves out
BLOCK = r".*?\.[^.]*\.(?P<index>\d+)\."  # the first numbered part of a name is the block, not an expert inside it

V = TypeVar("V", int, float)


@dataclass(frozen=True)
class Targets:
    """The fields of adapter_config.json that choose modules.

    include, exclude: names or ends of names at a dot, or one regular expression over the whole name; include may be
    `all-linear`. layers: the numbers of the blocks, None for all. layers_pattern: what the list of blocks is called.
    classifies: the task is sequence classification.
    """

    include: list[str] | str
    exclude: list[str] | str
    layers: list[int] | None
    layers_pattern: list[str]
    classifies: bool


def resolve(model: nn.Module, targets: Targets) -> list[str]:
    """The names of the modules of `model` that PEFT would adapt, in the model's order. Raises AdapterError if none."""
    if isinstance(targets.include, str) and targets.include.lower() == ALL_LINEAR:
        targets = Targets(_all_linear(model, targets.classifies), targets.exclude, None, [], False)
    names = [name for name, _ in model.named_modules() if name and _is_target(name, targets)]
    if not names:
        raise AdapterError(
            f"target_modules of adapter_config.json match nothing in this model: {_shown(targets.include)}",
            "Load the adapter into the model that it was trained on",
        )
    return names


def pattern_value(patterns: Mapping[str, V], name: str, default: V) -> V:
    """The value of the first pattern that PEFT's rank_pattern or alpha_pattern would find for a module."""
    for pattern, value in patterns.items():
        if _compiled(rf"(.*\.)?({pattern})$").match(name):
            return value
    return default


def exact_pattern(name: str) -> str:
    """A key of rank_pattern or alpha_pattern that means one module and no other."""
    return f"^{re.escape(name)}"


def exact_targets(model: nn.Module, names: Collection[str]) -> list[str] | str:
    """target_modules that mean these modules and no others.

    PEFT takes a listed name for the end of longer names too. Where that would reach another module of the model, one
    regular expression over whole names stands for the list.
    """
    wanted, ends = set(names), _proper_ends(_base_names(model) - set(names))
    return "|".join(re.escape(name) for name in names) if wanted & ends else list(names)


def own_patterns(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """For each name a pattern of lorafit's own `targets` that means this module and no other."""
    ends = _proper_ends(_base_names(model))
    return {name: f"re:{re.escape(name)}" if name in ends else name for name in names}


def _base_names(model: nn.Module) -> set[str]:
    """The names of all modules, each place of a shared one, without what lies inside an adapted layer."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, Adapted))
    return {name for name in modules if name and not name.startswith(inside)}


def _proper_ends(names: Iterable[str]) -> set[str]:
    """Every end at a dot of every name, the names themselves left out: `a.b.c` gives `b.c` and `c`."""
    return {name[i + 1 :] for name in names for i, letter in enumerate(name) if letter == "."}


def _is_target(name: str, targets: Targets) -> bool:
    if _means(targets.exclude, name):
        return False
    if isinstance(targets.include, str) or name in targets.include:
        return _means(targets.include, name)
    return _means(targets.include, name) and (targets.layers is None or _block(name, targets) in targets.layers)


def _means(patterns: list[str] | str, name: str) -> bool:
    if isinstance(patterns, str):
        return bool(patterns) and _compiled(patterns).fullmatch(name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _block(name: str, targets: Targets) -> int | None:
    patterns = [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in targets.layers_pattern] or [BLOCK]
    for pattern in patterns:
        found = _compiled(pattern).match(name)
        if found:
            return int(found["index"])
    return None


def _all_linear(model: nn.Module, classifies: bool) -> list[str]:
    """Every linear layer but the output head, or the classification head where that is the task."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    head = get_output_embeddings() if get_output_embeddings is not None else None
    if head is None and classifies and get_output_embeddings is not None:
        head = next((getattr(model, name) for name in HEAD_NAMES if hasattr(model, name)), None)
    return [n for n, module in model.named_modules() if kind_name(module) in LINEAR_KINDS and module is not head]


def _compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression of adapter_config.json. Raises AdapterError if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise AdapterError(
            f"adapter_config.json holds {pattern!r}, which is no regular expression: {error}", "Mend the file"
        ) from None


def _shown(patterns: list[str] | str) -> str:
    return repr(patterns) if isinstance(patterns, str) else listed(sorted(patterns), 6)
