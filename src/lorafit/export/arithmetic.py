"""Adapters in PEFT's format as vectors: `combine` adds several up, `shrink` brings one to a lower rank. No base needed.

Modules that only some of the adapters change get the sum of those. The result is plain LoRA with alpha = r.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lorafit import files
from lorafit.errors import AdapterError, ConfigError, listed
from lorafit.export.peft import CONFIG_NAME, PEFT_TYPE, WEIGHTS_NAME, AdapterConfig, read_config
from lorafit.export.peft_names import exact_pattern, pattern_value
from lorafit.export.peft_tensors import PREFIX, read_tensors
from lorafit.lora.combine import DROPPING, HOWS, Factors, Recipe, norm, truncated
from lorafit.lora.update import scaling

# PEFT's names of A and B, by kind of module.
KEYS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True)
class Part:
    """The update of one module. keys: of A and B in the file. shapes: of both, with rank 1, as the file has them."""

    keys: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    factors: Factors


@dataclass(frozen=True)
class Adapter:
    """An adapter directory. parts: by module, as PEFT calls it.

    tied: modules whose update is that of another one transposed, as both are one weight of the base, and that one.
    """

    directory: Path
    config: AdapterConfig
    parts: dict[str, Part]
    tied: dict[str, str]


def read(directory: Path) -> Adapter:
    """All of an adapter's updates. Raises AdapterError for what is no sum of low-rank updates."""
    config, tensors = read_config(directory), read_tensors(directory / WEIGHTS_NAME)
    if config.peft_type != PEFT_TYPE or config.variant != "lora":
        what = f"variant {config.variant}" if config.variant != "lora" else config.peft_type
        raise AdapterError(
            f"{directory} is of {what}, which is no sum of low-rank updates", "Merge each into a model of its own"
        )
    parts: dict[str, Part] = {}
    left = dict(tensors)
    for key_A, key_B in KEYS:
        for key in [key for key in tensors if key.endswith(f".{key_A}")]:
            name = key.removesuffix(f".{key_A}").removeprefix(PREFIX)
            keys = key, f"{PREFIX}{name}.{key_B}"
            if keys[1] not in left:
                raise AdapterError(f"{directory} has {key} and no {keys[1]}", "Copy the adapter again, and whole")
            A, B = left.pop(keys[0]), left.pop(keys[1])
            parts[name] = _part(keys, A, B, name, config)
    if left:
        raise AdapterError(
            f"{directory} also holds {listed(left, 3)}, which cannot be added up", "Train without --add-tokens"
        )
    return Adapter(directory, config, parts, _tied(parts))


def _tied(parts: Mapping[str, Part]) -> dict[str, str]:
    """A head whose factors are those of an embedding, transposed and in the other order, and that embedding."""
    embeddings = [name for name, part in parts.items() if part.keys[0].endswith(KEYS[1][0])]
    return {
        name: owner
        for owner in embeddings
        for name, part in parts.items()
        if name not in embeddings and _is_transposed(part.factors, parts[owner].factors)
    }


def _is_transposed(one: Factors, other: Factors) -> bool:
    return one.scaling == other.scaling and torch.equal(one.A, other.B.T) and torch.equal(one.B, other.A.T)


def _with_tied(adapters: Sequence[Adapter], made: dict[str, Part]) -> dict[str, Part]:
    """What was made, with the update of every tied module taken from its owner's: made apart, they would differ.

    Raises AdapterError where they are tied in some adapters alone.
    """
    for name, owner in {pair for adapter in adapters for pair in adapter.tied.items()}:
        having = [adapter for adapter in adapters if adapter.parts.keys() & {name, owner}]
        if any(adapter.tied.get(name) != owner for adapter in having):
            raise AdapterError(
                f"{name} has the update of {owner} in some of the adapters and another one in others",
                "Train all of them with the same targets",
            )
        A, B, factor = made[owner].factors
        A, factor = (-A, -factor) if factor < 0 else (A, factor)  # so that both factors are saved at one scaling
        made[owner] = replace(made[owner], factors=Factors(A, B, factor))
        made[name] = replace(made[name], factors=Factors(B.T, A.T, factor))
    return made


def _part(keys: tuple[str, str], A: Tensor, B: Tensor, name: str, config: AdapterConfig) -> Part:
    for key, tensor in zip(keys, (A, B), strict=True):
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise AdapterError(f"{key} holds values that are not finite numbers", "Train it again")
    r = len(A)
    stated = pattern_value(config.ranks, name, config.r)
    if stated != r or B.dim() < 2 or B.shape[1] != r:
        raise AdapterError(
            f"{keys[0]} is {tuple(A.shape)} and {keys[1]} {tuple(B.shape)}, where {CONFIG_NAME} says rank {stated}",
            "Copy the adapter again, and whole",
        )
    factor = scaling(r, pattern_value(config.alphas, name, config.alpha), config.scaling_rule)
    shapes = (1, *A.shape[1:]), (B.shape[0], 1, *B.shape[2:])
    # What stands around a convolution's rank is 1 in B, and is a part of the inputs in A.
    return Part(keys, shapes, Factors(A.float().flatten(1), B.float().reshape(len(B), r), factor))


def combine(
    directories: Sequence[Path], weights: Sequence[float], how: str, density: float, r: int | None, seed: int, out: Path
) -> dict[str, Any]:
    """Write the sum of adapters as one. Returns what was done. Raises AdapterError, RankError or ConfigError."""
    _check(directories, weights, how, density, r)
    adapters = [read(directory) for directory in directories]
    _check_bases(adapters)
    generator = torch.Generator().manual_seed(seed)
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.parts))
    made: dict[str, Part] = {}
    for name in names:
        own = [(a.parts[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.parts]
        shapes = {part.shapes for part, _ in own}
        if len(shapes) > 1:
            raise AdapterError(f"{name} has other sizes in one adapter than in another", "Are they of one base?")
        recipe = Recipe([weight for _, weight in own], density, r, generator)
        found = HOWS[how]([part.factors for part, _ in own], recipe)
        made[name] = Part(own[0][0].keys, own[0][0].shapes, found)
    _write(adapters[0], _with_tied(adapters, made), out, adapters[0].directory)
    everywhere = sum(all(name in adapter.parts for adapter in adapters) for name in names)
    ranks = sorted({part.factors.r for part in made.values()})
    return {"adapter": str(out), "how": how, "modules": len(names), "in_all": everywhere, "ranks": ranks}


def shrink(directory: Path, r: int, beside: Path, out: Path) -> dict[str, Any]:
    """Write the nearest adapter of rank r. Returns what was lost. Raises AdapterError or RankError.

    beside: the adapter directory whose tokenizer goes with it.
    """
    adapter = read(directory)
    made, lost, total = {}, 0.0, 0.0
    for name, part in adapter.parts.items():
        found, share = truncated(part.factors, r) if r < part.factors.r else (part.factors, 0.0)
        made[name] = replace(part, factors=found)
        if name not in adapter.tied:  # one weight counts once
            size = norm(part.factors)
            lost, total = lost + (share * size) ** 2, total + size**2
    _write(adapter, _with_tied([adapter], made), out, beside)
    before = sorted({part.factors.r for part in adapter.parts.values()})
    share = math.sqrt(lost / total) if total else 0.0
    return {"adapter": str(out), "ranks_before": before, "r": r, "lost": share}


def _check(directories: Sequence[Path], weights: Sequence[float], how: str, density: float, r: int | None) -> None:
    if len(weights) != len(directories):
        raise ConfigError(
            f"{len(directories)} adapters are given and {len(weights)} weights", "Give one weight for each: 0.7,0.3"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"--weights {listed(map(str, weights))} are not all finite", "Give numbers such as 0.7,-0.3")
    if density < 1 and how not in DROPPING:
        raise ConfigError(f"--density is given with --how {how}, which drops nothing", f"It is for {listed(DROPPING)}")
    if r is not None and how != "svd":
        raise ConfigError(f"--r is given with --how {how}", "The rank follows from those of the adapters, but for svd")


def _check_bases(adapters: Sequence[Adapter]) -> None:
    bases = list(dict.fromkeys(adapter.config.base for adapter in adapters))
    if len(bases) > 1:
        raise AdapterError(
            f"the adapters are of different base models: {listed(str(base) for base in bases)}",
            "Only updates of one base can be added up; if these are one, give them one name in adapter_config.json",
        )


def _write(like: Adapter, parts: dict[str, Part], out: Path, beside: Path) -> None:
    """An adapter as `like`, of these updates, with the tokenizer of `beside`.

    Scalings are in the factors: alpha is r.
    """
    usual = max((part.factors.r for part in parts.values()), default=1)
    fields = json.loads((like.directory / CONFIG_NAME).read_text(encoding="utf-8"))
    others = {exact_pattern(name): part.factors.r for name, part in parts.items() if part.factors.r != usual}
    fields |= {
        "r": usual,
        "lora_alpha": usual,
        "target_modules": list(parts),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors: dict[str, Tensor] = {}
    for part in parts.values():
        A, B, factor = part.factors
        root = math.sqrt(abs(factor))
        shape_A, shape_B = part.shapes
        tensors[part.keys[0]] = (math.copysign(root, factor) * A).reshape(len(A), *shape_A[1:]).contiguous()
        tensors[part.keys[1]] = (root * B).reshape(shape_B[0], len(A), *shape_B[2:]).contiguous()
    weights = to_safetensors(tensors, metadata={"format": "pt"})

    def fill(temporary: Path) -> None:
        files.write_json(temporary / CONFIG_NAME, fields)
        (temporary / WEIGHTS_NAME).write_bytes(weights)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if (beside / name).is_file():
                (temporary / name).write_bytes((beside / name).read_bytes())

    files.write_dir_atomic(out, fill)
