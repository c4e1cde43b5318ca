"""The tensors of a GGUF file as torch parameters under transformers' names: read, dequantise, rename, undo.

The block formats that are met most are unpacked here, the others by the package gguf; both give the same bits, since
each value is one product and at most one sum of float32 numbers. Source of the formats: gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

Undo = Callable[[torch.Tensor], torch.Tensor]


def state_dict(header: Header, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter in the file as a transformers state dict of `dtype`; tied output weights are not in it.

    Raises ModelError for a tensor without a known name or in a block format that nothing here can unpack.
    """
    names = {name: hf_name(header.architecture, name) for name in header.tensors if name not in NOT_PARAMETERS}
    unknown = [name for name, found in names.items() if found is None]
    if unknown:
        raise ModelError(
            f"{header.path} has {len(unknown)} tensors unknown to {header.architecture}: {listed(unknown, 4)}",
            "Use the safetensors version of the model",
        )
    undo = _undone(header)

    def read(name: str) -> torch.Tensor:
        values = undo(name)(read_tensor(header.path, header.tensors[name]))
        return slabs.empty(tuple(values.shape), dtype).copy_(values)

    with _one_thread():
        return {str(found): read(name) for name, found in names.items()}


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


def _half(raw: torch.Tensor) -> torch.Tensor:
    """(n, 2 k) bytes -> (n, k) float32."""
    return raw.contiguous().view(torch.float16).float()


def _f32(raw: torch.Tensor) -> torch.Tensor:
    return raw.view(torch.float32)


def _f16(raw: torch.Tensor) -> torch.Tensor:
    return raw.view(torch.float16).float()


def _bf16(raw: torch.Tensor) -> torch.Tensor:
    return raw.view(torch.bfloat16).float()


def _q8_0(raw: torch.Tensor) -> torch.Tensor:
    blocks = raw.view(-1, 34)
    return blocks[:, 2:].view(torch.int8) * _half(blocks[:, :2])


def _q4_0(raw: torch.Tensor) -> torch.Tensor:
    blocks = raw.view(-1, 18)
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_half(blocks[:, :2])[..., None])


def _q4_1(raw: torch.Tensor) -> torch.Tensor:
    blocks = raw.view(-1, 20)
    scale, least = _half(blocks[:, :4]).unbind(dim=1)
    return _nibbles(blocks[:, 4:]).mul_(scale[:, None, None]).add_(least[:, None, None])


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """(n, 16) bytes -> (n, 2, 16) float32: the low halves of the bytes, then the high ones."""
    values = torch.empty(len(packed), 2, packed.shape[1])
    values[:, 0], values[:, 1] = packed & 15, packed >> 4
    return values


UNPACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
}
