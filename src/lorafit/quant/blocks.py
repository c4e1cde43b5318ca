"""A matrix in the blocks of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.quant.codecs import Codec
from lorafit.quant.stored import Stored


@dataclass(frozen=True, eq=False)
class Blocks(Stored):
    """Rows of blocks of one codec. data: (rows, bytes of a row) uint8."""

    codec: Codec

    @property
    def name(self) -> str:
        """The codec's."""
        return self.codec.name

    @property
    def nbytes(self) -> int:
        """What is stored."""
        return self.data.numel()

    def part(self, rows: slice) -> Blocks:
        """Some rows that follow each other, in the same memory."""
        return Blocks(self.data[rows], self.width, self.codec)

    def values(self) -> Tensor:
        """W in float32: (rows, width), all at once."""
        return self.codec.decode(self.data.reshape(-1, self.codec.nbytes)).view(-1, self.width)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Blocks:
        """The same on another device."""
        return Blocks(move(self.data), self.width, self.codec)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of W. ids: (...) int64. Returns (..., width)."""
        chosen = Blocks(self.data[ids.flatten()], self.width, self.codec)
        return chosen.decode(dtype).view(*ids.shape, self.width)
