"""Attention over rows in C++ (`attention.cpp`), in bfloat16 on a CPU; head dimensions are multiples of 16."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafit.engine import workspace
from lorafit.engine.kernels.build import library
from lorafit.engine.kernels.products import LANES, has_low_rank


@dataclass(frozen=True, eq=False)
class RowTable:
    """Rows that stand one after the other. array: (n, 3): first token, how many, which row this one continues or -1."""

    array: NDArray[np.int64]

    @cached_property
    def end(self) -> int:
        """The first token behind all rows."""
        return int((self.array[:, 0] + self.array[:, 1]).max(initial=0))

    @cached_property
    def pairs(self) -> int:
        """How often a query meets a key that it may see, a window left out of account."""
        lengths, before = self.array[:, 1], self.array[:, 2]
        prefixes = np.where(before >= 0, lengths[before], 0)
        return int((lengths * prefixes + lengths * (lengths + 1) // 2).sum())


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("heads", "kv_heads", "dim", "dim_v", "window", "rows")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        *((name, c_int64) for name in ("gq_stride", "gk_stride", "gv_stride")),
        ("scale", c_float),
    ]


def serve(q: Tensor, v: Tensor) -> bool:
    """Whether tensors like these can be given to `forward`. q: (tokens, heads, dim). v: (tokens, kv_heads, dim_v)."""
    fits = q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] % LANES == v.shape[2] % LANES == 0
    return fits and has_low_rank()


@functools.cache
def _function(name: str) -> Any:
    loaded = library()
    assert loaded is not None, "ask serve() first"
    function = loaded[name]
    function.argtypes = (c_void_p,) * {"tokens": 2, "forward": 9, "backward": 13}[name.removeprefix("attention_")]
    function.restype = c_int64 if name == "attention_tokens" else None
    return function


def _by_token(x: Tensor) -> Tensor:
    """Tokens may be apart, but each is one piece."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _shape(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: RowTable, scale: float, window: int, *gradients: Tensor
) -> Any:
    sizes = q.shape[1], k.shape[1], q.shape[2], v.shape[2], window, len(rows.array)
    return _Shape(*sizes, *(x.stride(0) for x in (q, k, v, out)), *_strides(gradients), scale)


def _strides(gradients: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(x.stride(0) for x in gradients) or (0, 0, 0)


def _operands(tokens: int, *given: Tensor) -> list[int]:
    """Addresses of what keys and values are laid out in for the products, while a call lasts."""
    sizes = [2 * tokens * x.shape[1] * x.shape[2] for x in given]
    return [workspace.scratch(f"operand{number}", size) for number, size in enumerate(sizes)]


def forward(q: Tensor, k: Tensor, v: Tensor, rows: RowTable, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """(out, log sum exp of scores): (tokens, heads, dim_v), (tokens, heads) float32.

    q: (tokens, heads, dim). k: (tokens, kv_heads, dim). v: (tokens, kv_heads, dim_v). window: most keys a query sees; 0
    for all.
    """
    q, k, v = map(_by_token, (q, k, v))
    out = workspace.rows(q, q.shape[0], q.shape[1], v.shape[2])
    log_sum = torch.zeros(q.shape[:2])
    shape = _shape(q, k, v, out, rows, scale, window)
    _clear_the_rest(rows, out)
    tokens = _function("attention_tokens")(ctypes.addressof(shape), rows.array.ctypes.data)
    _function("attention_forward")(
        *(ctypes.addressof(shape), rows.array.ctypes.data),
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), *_operands(tokens, k, v), out.data_ptr(), log_sum.data_ptr()),
    )
    return out, log_sum


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_out: Tensor,
    log_sum: Tensor,
    rows: RowTable,
    scale: float,
    window: int,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. into: where they are written; tokens may be apart. Else they are contiguous."""
    q, k, v, g_out = map(_by_token, (q, k, v, g_out))
    gq, gk, gv = into or tuple(workspace.rows(x, *x.shape) for x in (q, k, v))
    shape = _shape(q, k, v, g_out, rows, scale, window, gq, gk, gv)
    _clear_the_rest(rows, gq, gk, gv)
    tokens = _function("attention_tokens")(ctypes.addressof(shape), rows.array.ctypes.data)
    _function("attention_backward")(
        *(ctypes.addressof(shape), rows.array.ctypes.data),
        *(x.data_ptr() for x in (q, k, v, g_out, log_sum)),
        *(*_operands(tokens, k, k, v), gq.data_ptr(), gk.data_ptr(), gv.data_ptr()),
    )
    return gq, gk, gv


def _clear_the_rest(rows: RowTable, *tensors: Tensor) -> None:
    """Tokens of no row stand behind all rows; nothing is written to them."""
    for x in tensors:
        if rows.end < x.shape[0]:
            x[rows.end :] = 0
