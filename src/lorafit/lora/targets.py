r"""Which modules `targets`, `rank_pattern` and `layers` mean. One pattern language for all of them.

A pattern is one of
- a name or the end of one at a dot: `q_proj`, `self_attn.q_proj`, `model.layers.0.self_attn.q_proj`;
- a glob, told by any of `* ? [ ]`, over the whole name: `*.mlp.*` (`*` crosses dots);
- a regular expression after `re:`, over the whole name: `re:.*layers\.[0-3]\..*_proj`;
- `all-linear` (in `targets` only): every linear layer but the output head.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from lorafit.errors import TargetError, did_you_mean, listed
from lorafit.lora.base import LINEAR_KINDS, kind_name, refusal
from lorafit.lora.blocks import wanted_blocks
from lorafit.lora.ties import weight_key

V = TypeVar("V", int, float)

ALL_LINEAR = "all-linear"
HEAD_NAMES = ("score", "classifier")  # classification heads of transformers, which no method of the model names


@dataclass
class Selection:
    """names: what to adapt, in the model's order. skipped: how many modules were left out, by reason. notes: why."""

    names: list[str]
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def is_broad(pattern: str) -> bool:
    """Whether a pattern is a glob or a regular expression, which may well match more than adaptable layers."""
    return pattern.startswith("re:") or any(c in pattern for c in "*?[]")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a module's dotted name. Raises TargetError if `re:` holds no regular expression."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise TargetError(
                f"pattern {pattern!r} is not a regular expression: {error}",
                "Close it, or escape the sign with a backslash",
            ) from None
    if is_broad(pattern):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def select(model: nn.Module, targets: str | Sequence[str]) -> Selection:
    """The modules that targets mean. Raises TargetError where a pattern matches nothing that can be adapted."""
    patterns = [targets] if isinstance(targets, str) else list(targets)
    names: dict[str, list[str]] = {}  # every name of a module -> is found under its first
    first: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names.setdefault(first.setdefault(module, name), []).append(name)
    modules = {name: module for module, name in first.items()}
    found = Selection([])
    chosen: set[str] = set()
    missing: list[str] = []
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            hits = _all_linear(model, modules, found)
        else:
            hits = [name for name, aliases in names.items() if any(matches(pattern, alias) for alias in aliases)]
            hits = _adaptable(pattern, hits, modules, found)
        if not hits:
            missing.append(pattern)
        chosen.update(hits)
    if missing or not patterns:
        raise _nothing(missing, [name for name, module in modules.items() if refusal(module) is None])
    found.names = [name for name in modules if name in chosen]
    return found


def pattern_value(pattern_map: Mapping[str, V], name: str) -> V | None:
    """The value of the first pattern that means a name, in the mapping's order, or None."""
    return next((value for pattern, value in pattern_map.items() if matches(pattern, name)), None)


def check_patterns(field_name: str, pattern_map: Mapping[str, float], names: Iterable[str]) -> None:
    """Raises TargetError if a pattern of rank_pattern or alpha_pattern means none of the adapted names."""
    names = list(names)
    missing = [pattern for pattern in pattern_map if not any(matches(pattern, name) for name in names)]
    if missing:
        raise _nothing(missing, names, field_name, "Adapted layers")


def select_layers(model: nn.Module, names: Sequence[str], layers: str | Sequence[int] | None) -> list[str]:
    """Those of the names that lie in the wanted transformer blocks, or all of them where layers is None.

    A block is the first numbered entry of an nn.ModuleList on the way to a module (of an nn.Sequential, if none of the
    names lies in a ModuleList); names outside of blocks are left out. layers: "last:K", "first:K", "0-3,7" or numbers.
    In a model of several stacks (an encoder and a decoder), each stack is counted by itself.
    Raises TargetError if layers can't be read, goes beyond the longest stack or leaves nothing.
    """
    if layers is None:
        return list(names)
    blocks = _blocks(model, names, nn.ModuleList) or _blocks(model, names, nn.Sequential)
    if not blocks:
        raise TargetError(f"layers is {layers!r}, but none of the targets lies in a numbered block", "Leave layers out")
    longest = max(count for _, count in blocks.values())
    wanted_blocks(layers, longest, longest)  # the one check of the range
    kept = [
        name for name in names if name in blocks and blocks[name][0] in wanted_blocks(layers, blocks[name][1], longest)
    ]
    if not kept:
        raise TargetError(f"layers {layers!r} leaves none of the targets", f"There are {longest} blocks, from 0 on")
    return kept


def _blocks(model: nn.Module, names: Sequence[str], stack: type[nn.Module]) -> dict[str, tuple[int, int]]:
    """For each name in a stack: its block's number and the number of blocks there."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            parent = modules[".".join(parts[:i])]
            if part.isdigit() and isinstance(parent, stack):
                found[name] = (int(part), len(parent._modules))
                break
    return found


def _adaptable(pattern: str, hits: list[str], modules: dict[str, nn.Module], found: Selection) -> list[str]:
    """Those hits that can be adapted. What a broad pattern matches besides is counted; a name must mean a layer."""
    reasons = {name: refusal(modules[name]) for name in hits}
    good = [name for name, reason in reasons.items() if reason is None]
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    if refused and not is_broad(pattern):
        name, reason = next(iter(refused.items()))
        below = [n for n in modules if n.startswith(f"{name}.") and refusal(modules[n]) is None]
        inside = f"Adaptable layers in it: {listed(leaf_names(below))}" if below else "Leave it out of targets"
        raise TargetError(f"target {pattern!r} means {name}; it {reason}", inside)
    for name, reason in refused.items():
        _skip(name, modules[name], reason, found)
    return good


def _skip(name: str, module: nn.Module, reason: str, found: Selection) -> None:
    """Count a module that was left out; say why, if its class is one that is otherwise adapted."""
    found.skipped[type(module).__name__] += 1
    if kind_name(module) is not None:
        found.notes.append(f"{name} is left out: it {reason}")


def _all_linear(model: nn.Module, modules: dict[str, nn.Module], found: Selection) -> list[str]:
    """Every linear layer, without the output head, and without those that can't be adapted (each in a note)."""
    heads = _heads(model, modules)
    hits = []
    for name, module in modules.items():
        if kind_name(module) not in LINEAR_KINDS:
            continue
        reason = refusal(module)
        if name in heads:
            found.skipped["output head"] += 1
            found.notes.append(f"{name} is left out: it is the output head")
        elif reason is not None:
            _skip(name, module, reason, found)
        else:
            hits.append(name)
    found.notes += _bare_weights({name: module for name, module in modules.items() if name not in heads}, found)
    return hits


def _heads(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The output head's names: what `get_output_embeddings` gives; `score` and `classifier` at the top, with all below.

    Those names count only in models that have that method. In any other nn.Module nothing tells a head from a layer,
    and all linear layers are adapted, the last one too, unless its weight is an embedding's.
    """
    embeddings = {weight_key(module) for module in modules.values() if kind_name(module) == "embedding"} - {None}
    heads = {name for name, module in modules.items() if weight_key(module) in embeddings}
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if get_output_embeddings is not None:
        output = get_output_embeddings()
        heads |= {name for name, module in modules.items() if module is output}
        heads |= {name for name in modules if name.split(".")[0] in HEAD_NAMES}
    return heads


def _bare_weights(modules: dict[str, nn.Module], found: Selection) -> list[str]:
    """A line for each class that keeps matrices as bare parameters (fused experts): no layer there to adapt."""
    counts: Counter[str] = Counter()
    for module in modules.values():
        if kind_name(module) is None:
            matrices = [key for key, p in module._parameters.items() if p is not None and p.dim() >= 2]
            counts[type(module).__name__] += sum("weight" in key or "proj" in key for key in matrices)
    lines = []
    for name, count in counts.items():
        if count:
            found.skipped[f"bare weight in {name}"] += count
            lines.append(f"{count} weight matrices in {name} are bare parameters, not layers, and are not adapted")
    return lines


def leaf_names(names: Iterable[str]) -> list[str]:
    """The last part of each dotted name, each once, in order."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _nothing(
    missing: list[str], names: list[str], field_name: str = "targets", what: str = "Adaptable layers"
) -> TargetError:
    leaves = leaf_names(names)
    if not leaves:
        return TargetError(f"{field_name} {missing} match nothing: the model has no layer that can be adapted")
    hints = [hint for pattern in missing if (hint := did_you_mean(pattern.rsplit(".", 1)[-1], leaves))]
    nearest = f". {hints[0]}" if hints else ""
    return TargetError(f"{field_name} {missing} match nothing", f"{what} here: {listed(leaves)}{nearest}")
