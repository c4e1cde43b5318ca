"""The tensors of a GGUF file as torch parameters under transformers' names: read, dequantise, rename, undo.

The block formats that are met most are decoded by `quant`, the others by the package gguf, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from lorafit import slabs
from lorafit.errors import ModelError, listed
from lorafit.model.gguf_config import config_dict
from lorafit.model.gguf_header import Header, TensorInfo
from lorafit.model.gguf_names import NOT_PARAMETERS, hf_name
from lorafit.quant.blocks import Blocks
from lorafit.quant.codecs import CODECS

Undo = Callable[[torch.Tensor], torch.Tensor]


def state_dict(header: Header, dtype: torch.dtype, without: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Every parameter in the file as a transformers state dict of `dtype`; tied output weights are not in it.

    without: names that are left out.

    Raises ModelError for a tensor without a known name or in a block format that nothing here can unpack.
    """
    names, undo = _names(header), _undone(header)

    def read(name: str) -> torch.Tensor:
        values = undo(name)(read_tensor(header.path, header.tensors[name]))
        return slabs.empty(tuple(values.shape), dtype).copy_(values)

    with _one_thread():
        return {found: read(name) for name, found in names.items() if found not in without}


def kept_blocks(header: Header) -> dict[str, Blocks]:
    """The matrices that can stay as they are in the file, by transformers' name: mapped, not read.

    Only those whose rows stand in another order are copied. Raises ModelError as `state_dict`.
    """
    undo = _undone(header)

    def mapped(name: str) -> Blocks:
        info = header.tensors[name]
        # Copy on write: nothing writes, and torch wants memory that could be written to.
        raw = np.memmap(header.path, np.uint8, "c", info.offset, (info.nbytes,))
        blocks = _in_rows(torch.from_numpy(raw), info)
        return Blocks(undo(name)(blocks.data), blocks.width, blocks.codec)

    def can_stay(info: TensorInfo) -> bool:
        return info.type in CODECS and len(info.shape) == 2

    return {found: mapped(name) for name, found in _names(header).items() if can_stay(header.tensors[name])}


def matrices(header: Header) -> list[str]:
    """Transformers' names of all that has two dimensions or more. Raises ModelError as `state_dict`."""
    return [found for name, found in _names(header).items() if len(header.tensors[name].shape) > 1]


def _names(header: Header) -> dict[str, str]:
    """Tensor -> transformers' name of the parameter. Raises ModelError for one without."""
    names = {name: hf_name(header.architecture, name) for name in header.tensors if name not in NOT_PARAMETERS}
    unknown = [name for name, found in names.items() if found is None]
    if unknown:
        raise ModelError(
            f"{header.path} has {len(unknown)} tensors unknown to {header.architecture}: {listed(unknown, 4)}",
            "Use the safetensors version of the model",
        )
    return {name: str(found) for name, found in names.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Unpacking moves memory; torch's threads, waiting for each other a thousand times, made it 10x slower here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """One tensor in float32, of shape `info.shape`. Raises ModelError for an unknown block format."""
    raw = torch.from_numpy(np.fromfile(path, np.uint8, info.nbytes, offset=info.offset))
    if info.type in CODECS:
        return _in_rows(raw, info).decode(torch.float32).view(info.shape)
    if info.type in UNPACK:
        return UNPACK[info.type](raw).reshape(info.shape)
    try:
        rows = raw.numpy().reshape(*info.shape[:-1], -1)
        return torch.from_numpy(dequantize(rows, GGMLQuantizationType[info.type])).reshape(info.shape)
    except NotImplementedError as error:
        raise ModelError(
            f"{path}: {info.name} is stored as {info.type}, which cannot be unpacked here",
            "Use a file in F16, Q8_0 or Q4_K",
        ) from error


def _in_rows(raw: torch.Tensor, info: TensorInfo) -> Blocks:
    """The bytes of a tensor as the rows of its last axis."""
    codec, width = CODECS[info.type], info.shape[-1]
    return Blocks(raw.view(-1, codec.row_bytes(width)), width, codec)


def _undone(header: Header) -> Callable[[str], Undo]:
    """Which change of the converter to undo, by tensor name."""
    config = config_dict(header)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    def undo(name: str) -> Undo:
        if header.architecture == "llama" and ".attn_q." in name:
            return partial(_unpermute, heads=heads)
        if header.architecture == "llama" and ".attn_k." in name:
            return partial(_unpermute, heads=kv_heads)
        if header.architecture == "gemma3" and name.endswith("norm.weight"):
            return lambda weight: weight - 1  # llama.cpp scales by w, transformers' Gemma by 1 + w
        return lambda weight: weight

    return undo


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """weight: (rows, ...). Rows of a head from llama.cpp's order for RoPE, pairs side by side, back to two halves.

    Source: `permute` in llama.cpp's conversion of Llama.
    """
    halves = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _f32(raw: torch.Tensor) -> torch.Tensor:
    return raw.view(torch.float32)


def _f16(raw: torch.Tensor) -> torch.Tensor:
    return raw.view(torch.float16).float()


def _bf16(raw: torch.Tensor) -> torch.Tensor:
    return raw.view(torch.bfloat16).float()


UNPACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
}
