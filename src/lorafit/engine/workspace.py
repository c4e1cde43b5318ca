"""Where the tensors of a step lie: in slabs, not on the heap, where a third of the process was holes (docs/log.md).

What holds a row per token is taken from a pool of blocks of few sizes, those of the largest batch so far, and goes back
to it when the last tensor on it is gone.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit import slabs
from lorafit.slabs import SLABS, Piece

# What is smaller is left to the heap: taking a block costs some microseconds.
SMALLEST_BLOCK = 64 << 10


class _Block(np.ndarray[Any, np.dtype[np.uint8]]):
    """A piece of a slab that goes back to its pool when the last tensor on it is gone."""

    pool: _Pool
    piece: Piece

    def __del__(self) -> None:
        self.pool.free[len(self.piece)].append(self.piece)


class _Pool:
    """Blocks of each size, used again and again."""

    def __init__(self) -> None:
        self.free: defaultdict[int, list[Piece]] = defaultdict(list)
        self.made: defaultdict[int, int] = defaultdict(int)

    def take(self, size: int) -> _Block:
        free = self.free[size]
        if free:
            piece = free.pop()
        else:
            piece = SLABS.take(size)
            self.made[size] += 1
        block = np.ndarray.__new__(_Block, (size,), np.uint8, piece)
        block.pool, block.piece = self, piece
        return block

    @property
    def is_idle(self) -> bool:
        """Whether no block is in use."""
        return all(len(self.free[size]) == made for size, made in self.made.items())


_largest = 0
_pool = _Pool()


def rows(like: Tensor, count: int, *rest: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (count, *rest) with a row per token, on the device of `like` and in its type, or in `dtype`."""
    expect(count)
    # Memory beyond what is used is never touched. What is far shorter is no batch of tokens, and left to the heap.
    if 8 * count > _largest:
        return block(like, count, *rest, dtype=dtype, reserved=_largest)
    return like.new_empty(count, *rest, dtype=dtype or like.dtype)


def block(like: Tensor, count: int, *rest: int, dtype: torch.dtype | None = None, reserved: int = 0) -> Tensor:
    """The same for any rows, of sizes that repeat. reserved: take a block for so many."""
    dtype = dtype or like.dtype
    width = math.prod(rest)
    size = max(count, reserved) * width * dtype.itemsize
    if size < SMALLEST_BLOCK or count == 0 or like.device.type != "cpu":
        return like.new_empty(count, *rest, dtype=dtype)
    return torch.frombuffer(_pool.take(size), dtype=dtype, count=count * width).view(count, *rest)


def lasting(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised, contiguous, on the device of `like`; for what lives as long as the engine."""
    return slabs.empty(shape, dtype) if like.device.type == "cpu" else like.new_empty(shape, dtype=dtype)


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.found: dict[str, tuple[int, int, Tensor]] = {}


_scratch = _Scratch()


def scratch(purpose: str, size: int) -> int:
    """Address of `size` bytes on the CPU for one call of a kernel, which the next of this thread for it overwrites."""
    found = _scratch.found.get(purpose)
    if found is None or found[0] < size:
        memory = slabs.empty((size,), torch.uint8)
        found = _scratch.found[purpose] = (size, memory.data_ptr(), memory)
    return found[1]


def expect(count: int) -> None:
    """Say how many tokens the largest batch to come has. Blocks for smaller ones are given up."""
    global _largest, _pool
    if count > _largest:
        _largest, _pool = count, _Pool()


def release() -> None:
    """Hand back whatever is free; the next batch pays for it with page faults."""
    global _pool
    if _pool.is_idle:
        _pool = _Pool()
    _scratch.found.clear()
    slabs.trim_heap()
    SLABS.release()


def forget() -> None:
    """As `release`, and the batches so far say nothing of those to come: blocks are no longer as large as theirs."""
    global _largest
    _largest = 0
    release()
