"""A base that stays in fewer bits: modules that hold it so, in the place of those that transformers built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lorafit import slabs
from lorafit.errors import listed
from lorafit.quant.bits import BLOCK, to_int8, to_nf4
from lorafit.quant.blocks import Blocks
from lorafit.quant.modules import QuantizedEmbedding, QuantizedLinear
from lorafit.quant.stored import Stored
from lorafit.units import format_bytes

ENCODERS = {"nf4": to_nf4, "int8": to_int8}


@dataclass
class Kept:
    """What stays in fewer bits. ways: matrices stored in each way. left: names of those that do not.

    errors: of matrices that were quantized here, |W - W'| / |W| in the Frobenius norm, by name.
    """

    ways: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0
    left: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def describe(self) -> str:
        """One line."""
        ways = ", ".join(f"{count} matrices in {name}" for name, count in sorted(self.ways.items()))
        line = f"the base stays in fewer bits: {ways} ({format_bytes(self.nbytes)})"
        if self.errors:
            worst = max(self.errors, key=lambda name: self.errors[name])
            mean = sum(self.errors.values()) / len(self.errors)
            line += f", which changes them by {mean:.1%} of their norm, {worst} most ({self.errors[worst]:.1%})"
        return f"{line}; {len(self.left)} do not: {listed(self.left, 2)}" if self.left else line


def placeholder(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """A weight of the right shape and type that takes no memory, until `put_stored` takes its place."""
    return torch.zeros((), dtype=dtype).expand(stored.shape)


def quantized_tensors(
    files: Sequence[Path], linear: set[str], storage: str, dtype: torch.dtype, decoded: bool
) -> tuple[dict[str, Stored], dict[str, torch.Tensor], dict[str, float]]:
    """The weights named in `linear`, quantized, all other tensors of safetensors files in `dtype`, and `Kept.errors`.

    Read one by one, so that the whole model is never in memory. A width that nf4's blocks do not divide is left alone.
    decoded: give quantized weights among the others, as they are decoded.
    """
    stored: dict[str, Stored] = {}
    rest: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    for name, W in _each_tensor(files):
        if name in linear and W.dim() == 2 and (storage != "nf4" or W.shape[1] % BLOCK == 0):
            stored[name] = ENCODERS[storage](W)
            errors[name] = _change(W, stored[name])
            if decoded:
                rest[name] = stored.pop(name).decode(dtype)
        else:
            rest[name] = W.to(dtype, copy=True)
    return stored, rest, errors


def slab_tensors(files: Sequence[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of safetensors files, in slabs, floats in `dtype`."""
    found: dict[str, torch.Tensor] = {}
    for name, values in _each_tensor(files):
        kind = dtype if values.is_floating_point() else values.dtype
        found[name] = slabs.empty(tuple(values.shape), kind).copy_(values)
    return found


def _each_tensor(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of safetensors files; a tensor is to be copied before the next one is asked for.

    A file is mapped anew for each: pages that were read leave the process with the mapping, and not only at its end.
    """
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        for name in names:
            with safe_open(file, framework="pt") as opened:
                yield name, opened.get_tensor(name)


def _change(W: torch.Tensor, stored: Stored) -> float:
    size = float(W.float().norm())
    return float((stored.decode(torch.float32) - W).norm()) / size if size else 0.0


def linear_weights(model_class: Any, config: Any) -> set[str]:
    """The weights of the linear layers of a model of this class, without the output head."""
    with torch.device("meta"):
        model = model_class(config)
    head = model.get_output_embeddings()
    return {f"{name}.weight" for name, m in model.named_modules() if type(m) is nn.Linear and m is not head}


def put_stored(model: nn.Module, found: Mapping[str, Stored], dtype: torch.dtype, kept: Kept) -> None:
    """Replace every module whose weight is in `found`, by the parameter's name, and those that share it.

    Where one of them is no plain linear layer or embedding, the weight is decoded into `dtype` instead. Counts in
    `kept`.
    """
    holders: dict[int, list[tuple[nn.Module, str, nn.Module]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            holders.setdefault(id(child._parameters.get("weight")), []).append((parent, name, child))
    for name, stored in found.items():
        weight = model.get_parameter(name)
        places = holders.get(id(weight), [])
        if not places or not all(type(child) in (nn.Linear, nn.Embedding) for _, _, child in places):
            weight.data = stored.decode(dtype)
            kept.left.append(name)
            continue
        for parent, own, child in places:
            setattr(parent, own, _quantized(child, stored, dtype))
        kept.ways[stored.name] += 1
        kept.nbytes += stored.nbytes


def _quantized(module: nn.Module, stored: Stored, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        assert isinstance(stored, Blocks), "only files of blocks hold embeddings so"
        return QuantizedEmbedding(stored, dtype, module.padding_idx)
    assert isinstance(module, nn.Linear)
    return QuantizedLinear(stored, dtype, module.bias)
