"""A merged GGUF file in the types of the file that was trained on: changed tensors rounded again, all others copied.

A block keeps its scales, and its codes go up or down at random (`quant/recode.py`), unless its grid does not reach what
it is to hold: then it gets a new one. To round to the nearest, on either grid, would take most of an update away, as it
is smaller than a step: the error is small and all of one kind, where that of chance averages out (docs/log.md).

The package gguf makes new grids for some types alone. A tensor of another type is written in the next larger one, by
bits a number, and named: if its grid is not known here, or does not reach what was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import numpy as np
import torch

from lorafit.export.gguf import Array, quantized
from lorafit.lora.init import layer_generator
from lorafit.methods import table
from lorafit.model.gguf_names import hf_name
from lorafit.model.spec import ModelSpec
from lorafit.quant.codecs import CODECS
from lorafit.quant.recode import GRIDS, recode

# What a block of numbers is written as, where its own type cannot be.
LARGER = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "F32")


def changed_names(model: Any, spec: ModelSpec) -> set[str]:
    """Of an adapted model: the parameters that merging changes, or that were given rows, by transformers' names."""
    changed = table.changed_names(model)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if ends[0].weight.shape[0] != spec.vocab:
        changed |= {f"{name}.weight" for name, module in model.named_modules() if module in ends}
    return changed


class AsInFile:
    """Each tensor in its own type of a GGUF file, and unread where nothing has changed it.

    larger: (tensor, its type, the type it was given) of those whose type cannot be written. requantized, copied: how
    many were.
    """

    def __init__(self, spec: ModelSpec, changed: Collection[str]) -> None:
        import gguf

        read = gguf.GGUFReader(spec.path)
        self._architecture = str(read.fields["general.architecture"].contents())
        stated = read.fields.get("general.file_type")
        self.file_type: int | None = None if stated is None else int(stated.contents())
        self._tensors: dict[str, Any] = {tensor.name: tensor for tensor in read.tensors}
        self._changed = changed
        self.larger: list[tuple[str, str, str]] = []
        self.requantized = self.copied = 0

    def form(self, name: str, values: Callable[[], Array]) -> tuple[Array, str]:
        """The bytes of the file, or numbers in its type; one that it has not (a head of its own) as the embedding."""
        tensor = self._tensors.get(name)
        if tensor is not None and hf_name(self._architecture, name) not in self._changed:
            self.copied += 1
            return tensor.data, tensor.tensor_type.name
        self.requantized += 1
        numbers = values()
        if tensor is not None and tensor.tensor_type.name in GRIDS and _shape(tensor) == numbers.shape:
            blocks = _on_its_grid(name, tensor, numbers)
            if blocks is not None:
                return blocks, tensor.tensor_type.name
            return self._larger(name, tensor.tensor_type.name, numbers)
        own = (tensor or self._tensors["token_embd.weight"]).tensor_type.name
        return (quantized(numbers, own), own) if has_quantizer(own) else self._larger(name, own, numbers)

    def _larger(self, name: str, own: str, numbers: Array) -> tuple[Array, str]:
        other = next_larger(own, numbers.shape[-1])
        self.larger.append((name, own, other))
        return quantized(numbers, other), other


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _on_its_grid(name: str, tensor: Any, numbers: Array) -> Array | None:
    """The bytes of a tensor that holds other numbers; None where its grid reaches too few of them."""
    kind = tensor.tensor_type.name
    codec = CODECS[kind]
    blocks = torch.from_numpy(np.array(tensor.data)).view(-1, codec.nbytes)
    values = torch.from_numpy(numbers).view(-1, codec.numbers)
    found = recode(blocks, kind, values, layer_generator(0, name))
    if not has_quantizer(kind):
        if float(found.clipped.sum()) > float(found.noise.sum()):
            return None
        return found.blocks.view(*tensor.data.shape).numpy()
    anew = torch.from_numpy(quantized(numbers, kind)).view(-1, codec.nbytes)
    error = (codec.decode(anew) - values).square().sum(dim=1)
    nearer = error < found.clipped
    return torch.where(nearer[:, None], anew, found.blocks).view(*tensor.data.shape).numpy()


def next_larger(kind: str, width: int) -> str:
    """The type with the fewest bits a number above `kind`'s that can be written, with blocks of such a width."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for other in LARGER:
        if _bits(other) > _bits(kind) and width % GGML_QUANT_SIZES[GGMLQuantizationType[other]][0] == 0:
            return other
    return "F32"


def _bits(kind: str) -> float:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    numbers, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return 8 * nbytes / numbers


@cache
def has_quantizer(kind: str) -> bool:
    """Whether the package gguf writes the type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        quantized(np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return True
