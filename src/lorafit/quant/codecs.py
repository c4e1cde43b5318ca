"""Block formats of weights, decoded by torch's own operations on any device. A new one is a function and a line here.

A block holds `numbers` values of one row, side by side, in `nbytes` bytes. Each value is one product and at most one
sum of float32 numbers, in the order of the package gguf (gguf/quants.py), so both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """A block format. decode: (blocks, nbytes) uint8 -> (blocks, numbers) float32, new memory."""

    name: str
    numbers: int
    nbytes: int
    decode: Callable[[Tensor], Tensor]

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` numbers, a multiple of the block's."""
        return width // self.numbers * self.nbytes


def half(raw: Tensor) -> Tensor:
    """(n, 2 k) bytes -> (n, k) float32."""
    return raw.contiguous().view(torch.float16).float()


def nibbles(packed: Tensor) -> Tensor:
    """(n, 16) bytes -> (n, 2, 16) float32: the low halves of the bytes, then the high ones."""
    values = torch.empty(len(packed), 2, packed.shape[1], device=packed.device)
    values[:, 0], values[:, 1] = packed & 15, packed >> 4
    return values


def bits(packed: Tensor, each: int) -> Tensor:
    """(n, groups, k) bytes -> (n, groups, 8 / each, k) uint8: `each` bits at a time, the lowest first."""
    shifts = torch.arange(0, 8, each, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)
    return packed[:, :, None] >> shifts & (1 << each) - 1


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8) * half(blocks[:, :2])


def _q4_0(blocks: Tensor) -> Tensor:
    return nibbles(blocks[:, 2:]).sub_(8).mul_(half(blocks[:, :2])[..., None]).flatten(1)


def _q4_1(blocks: Tensor) -> Tensor:
    scale, least = half(blocks[:, :4]).unbind(dim=1)
    return nibbles(blocks[:, 4:]).mul_(scale[:, None, None]).add_(least[:, None, None]).flatten(1)


def fives(high: Tensor, low: Tensor) -> Tensor:
    """(n, 4) bytes of fifth bits, (n, 16) of the others -> (n, 32) float32 from 0 to 31."""
    fifth = (high[..., None] >> torch.arange(8, dtype=torch.uint8, device=high.device) & 1).flatten(1)
    return nibbles(low).flatten(1).add_(fifth, alpha=16)


def _q5_0(blocks: Tensor) -> Tensor:
    return fives(blocks[:, 2:6], blocks[:, 6:]).sub_(16).mul_(half(blocks[:, :2]))


def _q5_1(blocks: Tensor) -> Tensor:
    both = half(blocks[:, :4])
    return fives(blocks[:, 4:8], blocks[:, 8:]).mul_(both[:, :1]).add_(both[:, 1:])


def scales_and_least(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: d and dmin, and 6 bits each of 8 scales and 8 minima. Returns both (n, 8, 1) float32."""
    both = half(blocks[:, :4])
    d, dmin = both[:, :1], both[:, 1:]
    low_scales, low_least, high = blocks[:, 4:16].view(-1, 3, 4).unbind(dim=1)
    scales = torch.cat([low_scales & 63, (high & 15) | (low_scales >> 2 & 48)], dim=1)
    least = torch.cat([low_least & 63, (high >> 4) | (low_least >> 2 & 48)], dim=1)
    return (d * scales)[..., None], (dmin * least)[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scales, least = scales_and_least(blocks)
    values = bits(blocks[:, 16:].view(-1, 4, 32), 4).flatten(1, 2).float()
    return values.mul_(scales).sub_(least).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, least = scales_and_least(blocks)
    fifth = bits(blocks[:, None, 16:48], 1).flatten(1, 2)
    values = bits(blocks[:, 48:].view(-1, 4, 32), 4).flatten(1, 2).float().add_(fifth, alpha=16)
    return values.mul_(scales).sub_(least).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = bits(blocks[:, :128].view(-1, 2, 64), 4).reshape(-1, 8, 32)
    high = bits(blocks[:, 128:192].view(-1, 2, 32), 2).flatten(1, 2)
    scales = half(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8)
    values = low.float().add_(high, alpha=16).sub_(32)
    return values.view(-1, 16, 16).mul_(scales[..., None]).flatten(1)


CODECS: dict[str, Codec] = {
    "Q4_0": Codec("Q4_0", 32, 18, _q4_0),
    "Q4_1": Codec("Q4_1", 32, 20, _q4_1),
    "Q5_0": Codec("Q5_0", 32, 22, _q5_0),
    "Q5_1": Codec("Q5_1", 32, 24, _q5_1),
    "Q8_0": Codec("Q8_0", 32, 34, _q8_0),
    "Q4_K": Codec("Q4_K", 256, 144, _q4_k),
    "Q5_K": Codec("Q5_K", 256, 176, _q5_k),
    "Q6_K": Codec("Q6_K", 256, 210, _q6_k),
}
