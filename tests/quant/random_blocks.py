"""Blocks of random bits, whose scales are finite numbers."""

from __future__ import annotations

import torch

from lorafit.quant.blocks import Blocks
from lorafit.quant.codecs import CODECS

# Where in a block its float16 numbers stand.
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)}
HALVES |= {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(name: str, rows: int, width: int, seed: int = 0, size: float = 1.0) -> Blocks:
    """A matrix of (rows, width). size: of the scales' standard deviation."""
    codec, generator = CODECS[name], torch.Generator().manual_seed(seed)
    count = rows * width // codec.numbers
    data = torch.randint(0, 256, (count, codec.nbytes), dtype=torch.uint8, generator=generator)
    for place in HALVES[name]:
        scales = (size * torch.randn(count, 1, generator=generator)).to(torch.float16)
        scales[0] = 2**-24  # the smallest that there is
        data[:, place : place + 2] = scales.view(torch.uint8)
    return Blocks(data.view(rows, -1), width, codec)
