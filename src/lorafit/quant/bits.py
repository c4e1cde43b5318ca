"""Weights of a model that is not quantized yet, in 4 or 8 bits: the formats and numbers of bitsandbytes.

nf4: 64 numbers share a scale, their largest absolute value; each is the nearest of 16 quantiles of a normal
distribution, times that scale. The scales, less their mean, are stored in 8 bits, 256 of them with a float32 of their
own (Dettmers et al. 2023, QLoRA, section 3). int8: a scale for each row (Dettmers et al. 2022, LLM.int8(), section
2.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit import slabs
from lorafit.quant.stored import NUMBERS_AT_ONCE, Stored

BLOCK, GROUP = 64, 256
# Source: QLoRA, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
STEP = 1 / 127


@dataclass(frozen=True, eq=False)
class Nf4(Stored):
    """W in nf4. data: (rows, width / 2) uint8, the first of two numbers in the upper half of a byte.

    scales: (rows, width / 64) uint8. groups: (all scales / 256) float32, the largest absolute value of each 256 scales
    in the order of the whole matrix. offset: () float32, the mean of the scales. before: rows of the whole matrix in
    front of these.
    """

    scales: Tensor
    groups: Tensor
    offset: Tensor
    before: int = 0

    @property
    def name(self) -> str:
        """Always `nf4`."""
        return "nf4"

    @property
    def nbytes(self) -> int:
        """What is stored, the float32 of the groups and the mean included."""
        return self.data.numel() + self.scales.numel() + 4 * (self.groups.numel() + 1)

    def part(self, rows: slice) -> Nf4:
        """Some rows that follow each other, in the same memory."""
        first = self.before + (rows.start or 0)
        return Nf4(self.data[rows], self.width, self.scales[rows], self.groups, self.offset, first)

    def tops(self) -> Tensor:
        """The scale of every block: (rows, width / 64) float32."""
        first = self.before * self.scales.shape[1]
        at = torch.arange(first, first + self.scales.numel(), device=self.data.device) // GROUP
        code = dynamic_code().to(self.data.device)
        return code[self.scales.long()] * self.groups[at].view_as(self.scales) + self.offset

    def values(self) -> Tensor:
        """W in float32: (rows, width), all at once."""
        code = torch.tensor(NF4, device=self.data.device)
        both = torch.stack([self.data >> 4, self.data & 15], dim=-1).long()
        return (code[both].view(-1, BLOCK) * self.tops().view(-1, 1)).view(-1, self.width)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Nf4:
        """The same on another device."""
        groups, offset = (move(tensor).float() for tensor in (self.groups, self.offset))
        return Nf4(move(self.data), self.width, move(self.scales), groups, offset, self.before)


@dataclass(frozen=True, eq=False)
class Int8(Stored):
    """W in int8. data: (rows, width) int8. tops: (rows,) float32, the largest absolute value of each row."""

    tops: Tensor

    @property
    def name(self) -> str:
        """Always `int8`."""
        return "int8"

    @property
    def nbytes(self) -> int:
        """What is stored."""
        return self.data.numel() + 4 * self.tops.numel()

    def part(self, rows: slice) -> Int8:
        """Some rows that follow each other, in the same memory."""
        return Int8(self.data[rows], self.width, self.tops[rows])

    def values(self) -> Tensor:
        """W in float32: (rows, width), all at once."""
        return self.data.float() * self.tops[:, None] * STEP

    def moved(self, move: Callable[[Tensor], Tensor]) -> Int8:
        """The same on another device."""
        return Int8(move(self.data), self.width, move(self.tops).float())


def to_nf4(W: Tensor) -> Nf4:
    """W: (rows, width), width a multiple of 64, any floating type."""
    rows, width = W.shape
    packed = _lasting((rows, width // 2), torch.uint8, W)
    tops = _lasting((rows, width // BLOCK), torch.float32, W)
    code = torch.tensor(NF4, device=W.device)
    for part in row_parts(W):
        blocks = W[part].float().view(-1, BLOCK)
        own = blocks.abs().amax(dim=1)
        q = _nearest(blocks * (1 / own.clamp(min=1e-38))[:, None], code)
        packed[part] = ((q[:, ::2] << 4) | q[:, 1::2]).view(-1, width // 2)
        tops[part] = own.view(-1, width // BLOCK)
    offset = tops.mean()
    scales, groups = _in_8_bits(tops.flatten() - offset)
    return Nf4(packed, width, slabs.kept(scales.view(rows, -1)), slabs.kept(groups), slabs.kept(offset))


def to_int8(W: Tensor) -> Int8:
    """W: (rows, width), any floating type."""
    q, tops = _lasting(tuple(W.shape), torch.int8, W), _lasting(W.shape[:1], torch.float32, W)
    for part in row_parts(W):
        wide = W[part].float()
        tops[part] = own = wide.abs().amax(dim=1)
        q[part] = torch.round(wide * torch.where(own > 0, 127 / own, 0.0)[:, None]).to(torch.int8)
    return Int8(q, W.shape[1], tops)


def row_parts(W: Tensor) -> Iterator[slice]:
    """The rows of a matrix, a few at a time: what is made of them on the way stays small.

    Large tensors that come and go between those that last leave the heap full of holes.
    """
    rows, width = W.shape
    step = max(1, NUMBERS_AT_ONCE // width)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _lasting(shape: tuple[int, ...], dtype: torch.dtype, beside: Tensor) -> Tensor:
    """Uninitialised memory beside a tensor, in a slab where that is the CPU's."""
    if beside.device.type == "cpu":
        return slabs.empty(shape, dtype, smallest=0)
    return torch.empty(shape, dtype=dtype, device=beside.device)


def _in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (n,) as codes (n,) uint8 of `dynamic_code`, and the largest absolute value of each 256 of them."""
    padded = torch.nn.functional.pad(x, (0, -len(x) % GROUP)).view(-1, GROUP)
    tops = padded.abs().amax(dim=1)
    q = _nearest(padded * (1 / tops.clamp(min=1e-38))[:, None], dynamic_code().to(x.device))
    return q.flatten()[: len(x)], tops


def _nearest(x: Tensor, code: Tensor) -> Tensor:
    """Which of the sorted values of `code` is nearest to each x: uint8."""
    return torch.bucketize(x, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)


@functools.cache
def dynamic_code() -> Tensor:
    """256 values from -1 to 1: a sign, a decimal exponent in as many zeros as it takes, and a fraction in what is left.

    Source: Dettmers 2016, 8-Bit Approximations for Parallelism in Deep Learning, section 2.2.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        ends = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10 ** (exponent - 6) * ((ends[:-1] + ends[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
