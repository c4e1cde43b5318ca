"""A merged GGUF file in the types of the file that was trained on: changed tensors quantized again, all others copied.

The K types and IQ types have no quantizer in the package gguf. A changed tensor of theirs is written in the next larger
type that has one, by bits a number, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import numpy as np

from lorafit.export.gguf import Array, quantized
from lorafit.lora.inject import adapted_modules
from lorafit.lora.whole import Whole
from lorafit.model.gguf_names import hf_name
from lorafit.model.spec import ModelSpec

# What a block of numbers is written as, where its own type cannot be.
LARGER = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "F32")


def changed_names(model: Any, spec: ModelSpec) -> set[str]:
    """Of an adapted model: the parameters that merging changes, or that were given rows, by transformers' names."""
    changed = {
        f"{name}.{key}"
        for name, module in adapted_modules(model).items()
        for key in (module.keys if isinstance(module, Whole) else ["weight"])
    }
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
        like = tensor or self._tensors["token_embd.weight"]
        numbers = values()
        own = like.tensor_type.name
        written = writable(own, numbers.shape[-1])
        if written != own:
            self.larger.append((name, own, written))
        self.requantized += 1
        return quantized(numbers, written), written


def writable(kind: str, width: int) -> str:
    """The type itself if it can be written; else the next larger one, by bits a number, with blocks of such a width."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if _has_quantizer(kind):
        return kind
    bits = _bits(kind)
    for other in LARGER:
        if _bits(other) > bits and width % GGML_QUANT_SIZES[GGMLQuantizationType[other]][0] == 0:
            return other
    return "F32"


def _bits(kind: str) -> float:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    numbers, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return 8 * nbytes / numbers


@cache
def _has_quantizer(kind: str) -> bool:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        quantized(np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return True
