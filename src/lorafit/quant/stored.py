"""A matrix in fewer bits than it is computed with: what all ways of storing one have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# Decoding makes several float32 tensors of what it decodes; so many numbers at a time stay in the cache.
NUMBERS_AT_ONCE = 1 << 18


@dataclass(frozen=True, eq=False)
class Stored(ABC):
    """A matrix W of (rows, width). data: (rows, ...), what most of its bytes are."""

    data: Tensor
    width: int

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the way in which it is stored, as `Q4_0` or `nf4`."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What is stored."""

    @abstractmethod
    def part(self, rows: slice) -> Self:
        """Some rows that follow each other, in the same memory."""

    @abstractmethod
    def values(self) -> Tensor:
        """W in float32: (rows, width), all at once."""

    @abstractmethod
    def moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same on another device. move: what is done to each tensor; one that casts changes no type here."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, width)."""
        return len(self.data), self.width

    def decoded_parts(self, rows: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """W, so many rows at a time: which, and those decoded."""
        for first in range(0, len(self.data), rows):
            part = slice(first, min(first + rows, len(self.data)))
            yield part, self.part(part).decode(dtype)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """W: (rows, width), each number rounded once from float32 to dtype."""
        out = torch.empty(self.shape, dtype=dtype, device=self.data.device)
        step = max(1, NUMBERS_AT_ONCE // self.width)
        for first in range(0, len(self.data), step):
            rows = slice(first, first + step)
            out[rows] = self.part(rows).values()
        return out
