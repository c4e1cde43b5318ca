"""A model without its weights: what an adapter is put on to be merged tensor by tensor.

Parameters have their shapes and types, and take no memory. Modules that share a weight share it here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorafit.errors import ModelError, listed
from lorafit.model.keep import DTYPES, linear_weights, mapped
from lorafit.model.safetensors_header import Entry, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Stored:
    """A tensor of the model's files. parameter: its name in the model; None for one that the model does not use."""

    file: Path
    name: str
    entry: Entry
    parameter: str | None

    def read(self) -> Tensor:
        """The tensor, mapped: it is not to be written to, and its pages go with it."""
        return mapped(self.file, self.name, self.entry)


@dataclass(frozen=True)
class Skeleton:
    """A model in eval mode whose weights are in its files. stored: all tensors, file by file.

    linear: the names of the weights that nf4 and int8 round. elsewhere: parameters that the files hold under other
    names and in other shapes, as the experts of a mixture.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored: tuple[Stored, ...]
    linear: frozenset[str]
    elsewhere: frozenset[str]

    def fill_ends(self) -> None:
        """Read the embedding and the output head after all, in float32: for an adapter that has rows of them.

        To be called before an adapter is attached.
        """
        model: Any = self.model
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        names = {name for name, module in model.named_modules() if module in ends}
        by_name = {one.parameter: one for one in self.stored if one.parameter is not None}
        for name in sorted(names, reverse=True):
            one = by_name.get(f"{name}.weight")
            if one is not None:
                _put(model, f"{name}.weight", one.read().to(torch.float32, copy=True))


def is_placeholder(tensor: Tensor) -> bool:
    """Whether a parameter has a shape and no numbers."""
    return tensor.dim() > 0 and not any(tensor.stride()) and tensor.numel() > 0


def build(
    model_class: Any, config: Any, files: Sequence[Path]
) -> tuple[Any, tuple[Stored, ...], frozenset[str], frozenset[str]]:
    """(model, and the other fields of a `Skeleton`). Raises ModelError where the files lack parameters."""
    with torch.device("meta"):
        model = model_class(config)
    expected, prefix = model.state_dict(keep_vars=True), f"{model.base_model_prefix}."
    stored = tuple(
        Stored(file, name, entry, next((n for n in (name, prefix + name) if n in expected), None))
        for file in files
        for name, entry in read_header(file).items()
    )
    for one in stored:
        if one.parameter is not None:
            _check_shape(one, expected[one.parameter])
    found = {id(expected[one.parameter]) for one in stored if one.parameter is not None}
    missing = [name for name, tensor in expected.items() if id(tensor) not in found]
    if missing and all(one.parameter is not None for one in stored):
        raise ModelError(
            f"the model's files lack {len(missing)} of its parameters: {listed(missing, 3)}", "Download it again"
        )
    for one in stored:
        if one.parameter is not None:
            _put(model, one.parameter, _nothing(one.entry.shape, DTYPES[one.entry.dtype]))
    for name in missing:
        _put(model, name, _nothing(tuple(expected[name].shape), expected[name].dtype))
    return model.eval(), stored, frozenset(linear_weights(model_class, config)), frozenset(missing)


def _nothing(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)


def _check_shape(one: Stored, parameter: Tensor) -> None:
    if one.entry.shape != tuple(parameter.shape) or one.entry.dtype not in DTYPES:
        raise ModelError(
            f"{one.name} in {one.file} is {one.entry.dtype} {one.entry.shape}, and the model wants "
            f"{tuple(parameter.shape)}",
            "Download it again; is it the model that its config describes?",
        )


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer another value, in all modules that have it."""
    path, _, leaf = name.rpartition(".")
    old = getattr(model.get_submodule(path), leaf)
    new = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
    for module in model.modules():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is old:
                setattr(module, own, new)
