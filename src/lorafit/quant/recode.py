"""Changing a matrix that is stored in blocks, on the grid of each block: its scales stay, its codes change.

A block's numbers are offset + step * code. A change of less than a step is lost by rounding to the nearest code, and a
new grid rounds every number of the block again, those that hardly change too. So a code goes up or down at random, as
likely as the change is large (stochastic rounding): a number without a change keeps its code, and the mean is right.
Source of the rounding: Gupta et al. 2015, Deep Learning with Limited Numerical Precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.quant.codecs import CODECS, bits, fives, half, nibbles, scales_and_least

BLOCKS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Grid:
    """The grid of a block format. codes: blocks -> (n, numbers) float32. steps: blocks -> the same, or (n, 1).

    pack: (blocks, codes) -> blocks with other codes. lowest, highest: of the codes.
    """

    codes: Callable[[Tensor], Tensor]
    steps: Callable[[Tensor], Tensor]
    pack: Callable[[Tensor, Tensor], Tensor]
    lowest: int
    highest: int


@dataclass(frozen=True)
class Recoded:
    """blocks: (n, bytes). noise, clipped: (n,) the sum of squares that rounding, and the end of the grid, cost a block.

    noise is what is expected of the random choice.
    """

    blocks: Tensor
    noise: Tensor
    clipped: Tensor


def recode(blocks: Tensor, kind: str, values: Tensor, generator: torch.Generator) -> Recoded:
    """Blocks that hold other values. blocks: (n, bytes) uint8. values: (n, numbers) float32. kind: one of GRIDS."""
    pieces = [slice(first, first + BLOCKS_AT_ONCE) for first in range(0, len(blocks), BLOCKS_AT_ONCE)]
    parts = [_recoded(blocks[piece], kind, values[piece], generator) for piece in pieces]
    return Recoded(*(torch.cat([getattr(part, name) for part in parts]) for name in ("blocks", "noise", "clipped")))


def _recoded(blocks: Tensor, kind: str, values: Tensor, generator: torch.Generator) -> Recoded:
    grid = GRIDS[kind]
    codes, steps = grid.codes(blocks), grid.steps(blocks)
    change = values - CODECS[kind].decode(blocks)
    exact = codes + torch.where(steps == 0, 0.0, change / steps)
    exact = exact.nan_to_num(nan=0.0)  # 0 / 0, where `where` does not look
    inside = exact.maximum(codes.clamp(max=grid.lowest)).clamp(max=grid.highest)  # what is outside may stay there
    share = inside - inside.floor()
    chosen = (inside.floor() + (torch.rand(share.shape, generator=generator) < share)).clamp(max=grid.highest)
    noise = (share * (1 - share) * steps.square()).sum(dim=1)
    # A step of 0 holds no change at all.
    clipped = torch.where(steps == 0, change, (exact - inside) * steps).square().sum(dim=1)
    return Recoded(grid.pack(blocks, chosen.to(torch.uint8)), noise, clipped)


# --- the formats ----------------------------------------------------------------------------------------------------


def _joined(values: Tensor, each: int) -> Tensor:
    """(n, groups, 8 / each, k) uint8 -> (n, groups, k) bytes: the other way round of `codecs.bits`."""
    shifts = torch.arange(0, 8, each, dtype=torch.uint8).view(1, 1, -1, 1)
    return (values << shifts).sum(dim=2, dtype=torch.int32).to(torch.uint8)


def _with(blocks: Tensor, **parts: tuple[int, Tensor]) -> Tensor:
    """A copy with some bytes replaced, each from where it begins."""
    out = blocks.clone()
    for begin, new in parts.values():
        out[:, begin : begin + new.shape[1]] = new
    return out


def _fours(codes: Tensor) -> Tensor:
    """(n, 32) codes below 16 -> (n, 16) bytes, as `codecs.nibbles` reads them."""
    return _joined(codes.view(-1, 1, 2, 16), 4).flatten(1)


def _fifths(codes: Tensor) -> Tensor:
    """(n, 32) codes -> the fifth bit of each, (n, 4) bytes, as `codecs.fives` reads them."""
    return _joined((codes >> 4).view(-1, 4, 8, 1), 1).flatten(1)


def _simple(fifths_at: int | None, fours_at: int) -> Grid:
    """4 or 5 bits a number, with the step in front."""

    def codes(blocks: Tensor) -> Tensor:
        low = blocks[:, fours_at:]
        return nibbles(low).flatten(1) if fifths_at is None else fives(blocks[:, fifths_at:fours_at], low)

    def pack(blocks: Tensor, new: Tensor) -> Tensor:
        fours = _with(blocks, fours=(fours_at, _fours(new & 15)))
        return fours if fifths_at is None else _with(fours, fifths=(fifths_at, _fifths(new)))

    return Grid(codes, lambda blocks: half(blocks[:, :2]), pack, 0, 15 if fifths_at is None else 31)


def _q8_codes(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() + 128


def _q8_pack(blocks: Tensor, codes: Tensor) -> Tensor:
    return _with(blocks, codes=(2, (codes ^ 128)))  # two's complement of what is 128 less


def _k_steps(blocks: Tensor) -> Tensor:
    scales, _ = scales_and_least(blocks)
    return scales.expand(-1, -1, 32).flatten(1)


def _k_fours(codes: Tensor) -> Tensor:
    return _joined((codes & 15).view(-1, 4, 2, 32), 4).flatten(1)


def _q4_k_codes(blocks: Tensor) -> Tensor:
    return bits(blocks[:, 16:].view(-1, 4, 32), 4).flatten(1).float()


def _q5_k_codes(blocks: Tensor) -> Tensor:
    fifth = bits(blocks[:, None, 16:48], 1).flatten(1)
    return bits(blocks[:, 48:].view(-1, 4, 32), 4).flatten(1).float().add_(fifth, alpha=16)


def _q5_k_pack(blocks: Tensor, codes: Tensor) -> Tensor:
    fifths = _joined((codes >> 4).view(-1, 1, 8, 32), 1).flatten(1)
    return _with(blocks, fifths=(16, fifths), fours=(48, _k_fours(codes)))


def _q6_k_codes(blocks: Tensor) -> Tensor:
    low = bits(blocks[:, :128].view(-1, 2, 64), 4).flatten(1)
    high = bits(blocks[:, 128:192].view(-1, 2, 32), 2).flatten(1)
    return low.float().add_(high, alpha=16)


def _q6_k_steps(blocks: Tensor) -> Tensor:
    return (half(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8)).repeat_interleave(16, dim=1)


def _q6_k_pack(blocks: Tensor, codes: Tensor) -> Tensor:
    low = _joined((codes & 15).view(-1, 2, 2, 64), 4).flatten(1)
    high = _joined((codes >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    return _with(blocks, low=(0, low), high=(128, high))


GRIDS: dict[str, Grid] = {
    "Q4_0": _simple(None, 2),
    "Q4_1": _simple(None, 4),
    "Q5_0": _simple(2, 6),
    "Q5_1": _simple(4, 8),
    "Q8_0": Grid(_q8_codes, lambda blocks: half(blocks[:, :2]), _q8_pack, 1, 255),
    "Q4_K": Grid(_q4_k_codes, _k_steps, lambda blocks, codes: _with(blocks, fours=(16, _k_fours(codes))), 0, 15),
    "Q5_K": Grid(_q5_k_codes, _k_steps, _q5_k_pack, 0, 31),
    "Q6_K": Grid(_q6_k_codes, _q6_k_steps, _q6_k_pack, 0, 63),
}
