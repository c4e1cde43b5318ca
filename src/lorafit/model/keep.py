"""A base that stays in fewer bits: modules that hold it so, in the place of those that transformers built."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lorafit import slabs
from lorafit.errors import ModelError, listed
from lorafit.model.safetensors_header import Entry, read_header
from lorafit.quant.bits import BLOCK, row_parts, to_int8, to_nf4
from lorafit.quant.blocks import Blocks
from lorafit.quant.modules import QuantizedEmbedding, QuantizedLinear
from lorafit.quant.stored import Stored
from lorafit.units import format_bytes

ENCODERS = {"nf4": to_nf4, "int8": to_int8}
# As a safetensors file names them.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


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
        if name in linear and can_be_rounded(W, storage):
            stored[name] = ENCODERS[storage](W)
            errors[name] = _change(W, stored[name])
            slabs.trim_heap()
            if decoded:
                rest[name] = stored.pop(name).decode(dtype)
        else:
            rest[name] = slabs.kept(W, dtype)
    return stored, rest, errors


def can_be_rounded(W: torch.Tensor, storage: str) -> bool:
    """Whether a linear layer's weight is quantized; a width that nf4's blocks do not divide is left alone."""
    return W.dim() == 2 and (storage != "nf4" or W.shape[1] % BLOCK == 0)


def slab_tensors(files: Sequence[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of safetensors files, in slabs, floats in `dtype`."""
    found: dict[str, torch.Tensor] = {}
    for name, values in _each_tensor(files):
        kind = dtype if values.is_floating_point() else values.dtype
        found[name] = slabs.kept(values, kind)
    return found


def _each_tensor(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of safetensors files; a tensor is to be copied before the next one is asked for.

    Each is mapped by itself: its pages leave the process with it, and it takes no place on the heap, where what is
    kept of it would come to lie in front of the next one.
    """
    for file in files:
        for name, entry in read_header(file).items():
            yield name, mapped(file, name, entry)


def mapped(file: Path, name: str, entry: Entry) -> torch.Tensor:
    """One tensor of a safetensors file, mapped; it must not be written to. Raises ModelError for an unknown type."""
    if entry.dtype not in DTYPES:
        raise ModelError(f"{name} in {file} is {entry.dtype}, which cannot be read here", "Convert it to BF16")
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    raw = np.memmap(file, np.uint8, "c", entry.offset, (entry.nbytes,))
    return torch.frombuffer(raw, dtype=DTYPES[entry.dtype]).view(entry.shape)


def _change(W: torch.Tensor, stored: Stored) -> float:
    size = change = 0.0
    for rows in row_parts(W):
        size += float(W[rows].float().norm()) ** 2
        change += float(stored.part(rows).values().sub_(W[rows]).norm()) ** 2
    return math.sqrt(change / size) if size else 0.0


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
