"""Memory for tensors that comes from the system in whole pages, instead of from the C library's heap.

On the heap, small objects that live longer stand between large tensors, whose memory can then never be joined again.
Mapped memory goes back to the system when the last tensor on it is gone.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress

import torch

SLAB_BYTES = 64 << 20
ALIGNMENT = 64
# What is smaller fits between others on the heap.
SMALLEST_MAPPED = 64 << 10
Place = tuple[mmap.mmap, int]


class Slabs:
    """Large pieces, handed out from front to back."""

    def __init__(self) -> None:
        self._slab: mmap.mmap | None = None
        self._used = 0

    def take(self, size: int) -> Place:
        """A slab and where in it `size` bytes begin; size at most SLAB_BYTES."""
        if self._slab is None or self._used + size > SLAB_BYTES:
            self._slab, self._used = _map(SLAB_BYTES), 0
            with suppress(OSError, AttributeError):  # fewer page faults, where the system has huge pages
                self._slab.madvise(mmap.MADV_HUGEPAGE)
        offset = self._used
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return self._slab, offset


def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU, contiguous, in memory of their own; small ones on the heap."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < SMALLEST_MAPPED:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(_map(size), dtype=dtype, count=count).view(shape)


def _map(size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
