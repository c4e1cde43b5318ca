"""Memory for large tensors, in slabs that are used again, instead of the C library's heap.

On the heap, small objects that live longer stand between large tensors, whose memory can then never be joined again.
Memory that a process has touched is also far cheaper than new memory, which the system has to find and to clear: what a
released weight leaves is given to the next tensor, and goes back to the system when `release` says so.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
from bisect import insort
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

SLAB_BYTES = 64 << 20
ALIGNMENT = 64
# What is smaller fits between others on the heap.
SMALLEST_MAPPED = 64 << 10
# Linux since 5.14; Python's mmap does not know it, and would keep the interpreter waiting.
MADV_POPULATE_WRITE = 23
FILLED_AT_ONCE = 8 << 20
Extent = tuple[int, int]  # where it begins, where it ends


@dataclass(eq=False)
class _Slab:
    """Mapped memory, and which extents of it are free, from front to back."""

    memory: mmap.mmap
    free: list[Extent] = field(default_factory=list)

    def is_free(self) -> bool:
        return self.free == [(0, len(self.memory))]

    def give(self, extent: Extent) -> None:
        """Join an extent with its neighbours."""
        insort(self.free, extent)
        at = self.free.index(extent)
        first, last = at, at
        if at and self.free[at - 1][1] == extent[0]:
            first -= 1
        if at + 1 < len(self.free) and self.free[at + 1][0] == extent[1]:
            last += 1
        self.free[first : last + 1] = [(self.free[first][0], self.free[last][1])]

    def clear(self) -> None:
        """Let the system have the whole pages of what is free; where it can't, they stay."""
        with suppress(OSError, AttributeError):
            for begin, end in self.free:
                begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                if begin < end:
                    self.memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class Piece(np.ndarray[Any, np.dtype[np.uint8]]):
    """A piece of a slab, which is free again when the last tensor on it is gone."""

    slab: _Slab
    extent: Extent
    returned: deque[tuple[_Slab, Extent]]

    def __del__(self) -> None:
        # In any thread and at any time, so nothing else is touched here.
        if getattr(self, "slab", None) is not None:  # a view of a piece has none
            self.returned.append((self.slab, self.extent))


class Slabs:
    """Memory handed out in pieces, each from the free extent that it fits best."""

    def __init__(self) -> None:
        self._slabs: list[_Slab] = []
        self._returned: deque[tuple[_Slab, Extent]] = deque()
        self._filling: list[threading.Thread] = []

    def take(self, size: int) -> Piece:
        """Uninitialised memory of `size` bytes."""
        self._collect()
        wanted = -(-max(1, size) // ALIGNMENT) * ALIGNMENT
        fitting = [
            (end - begin, number, begin)
            for number, slab in enumerate(self._slabs)
            for begin, end in slab.free
            if end - begin >= wanted
        ]
        if fitting:
            _, number, begin = min(fitting)
            slab = self._slabs[number]
        else:
            slab, begin = _new_slab(max(SLAB_BYTES, wanted)), 0
            self._slabs.append(slab)
        at = next(i for i, extent in enumerate(slab.free) if extent[0] == begin)
        end = slab.free[at][1]
        slab.free[at : at + 1] = [(begin + wanted, end)] if begin + wanted < end else []
        piece = np.ndarray.__new__(Piece, (size,), np.uint8, slab.memory, begin)
        piece.slab, piece.extent, piece.returned = slab, (begin, begin + wanted), self._returned
        return piece

    def reserve(self, size: int) -> None:
        """Have the system find and clear memory for `size` bytes on a core that idles, while the caller goes on.

        On a virtual machine, new memory costs up to 2 s/GB. Where this can't be done nothing is.
        """
        if size <= 0:
            return
        slab = _new_slab(size)
        self._slabs.append(slab)
        self._filling.append(threading.Thread(target=_fill, args=(slab.memory,), daemon=True))
        self._filling[-1].start()

    def release(self) -> None:
        """Hand back what is free to the system; whoever needs it next pays for it with page faults."""
        while self._filling:
            self._filling.pop().join()  # or it would fetch again what goes back
        self._collect()
        self._slabs = [slab for slab in self._slabs if not slab.is_free()]
        for slab in self._slabs:
            slab.clear()

    def _collect(self) -> None:
        while self._returned:
            slab, extent = self._returned.popleft()
            slab.give(extent)


def _new_slab(size: int) -> _Slab:
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    if sys.platform == "win32":
        memory = mmap.mmap(-1, size)
    else:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # fewer page faults, where the system has huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return _Slab(memory, [(0, size)])


def _fill(memory: mmap.mmap) -> None:
    """Make the pages of mapped memory exist, without changing what is written to them in the meantime."""
    cells = np.frombuffer(memory, np.uint8)
    with suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for first in range(0, len(cells), FILLED_AT_ONCE):
            size = min(FILLED_AT_ONCE, len(cells) - first)
            if madvise(cells.ctypes.data + first, size, MADV_POPULATE_WRITE):
                return


def trim_heap() -> None:
    """Let the system have what is free on the C library's heap, where that library can do so (glibc).

    It keeps what weights leave between others, where it never fits again; and tensors of a few megabytes that come and
    go make it grow, as what is cut off to align them is not joined again (its bug 30723).
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


SLABS = Slabs()


def empty(shape: tuple[int, ...], dtype: torch.dtype, smallest: int = SMALLEST_MAPPED) -> torch.Tensor:
    """Uninitialised on the CPU, contiguous, in a slab; those of fewer bytes than `smallest` on the heap."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < smallest:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(SLABS.take(size), dtype=dtype, count=count).view(shape)


def kept(values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy that lasts, of what is made between large tensors that come and go: in a slab, however small it is.

    On the heap it would stand in the place where the next of those tensors could lie.
    """
    if values.device.type != "cpu" or not values.numel():
        return values.to(dtype or values.dtype, copy=True)
    return empty(tuple(values.shape), dtype or values.dtype, smallest=0).copy_(values)
