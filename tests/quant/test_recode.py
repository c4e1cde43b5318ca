"""Blocks that are given other values on their own grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafit.quant.codecs import CODECS
from lorafit.quant.recode import GRIDS, Recoded, recode
from tests.quant.random_blocks import random_blocks


def blocks_of(name: str) -> Tensor:
    """300 blocks; the first has the smallest scale, the second a scale of zero."""
    blocks = random_blocks(name, 1, 300 * CODECS[name].numbers).data.view(300, -1)
    place = 208 if name == "Q6_K" else 0
    blocks[1, place : place + 2] = 0
    return blocks


def recoded(blocks: Tensor, name: str, values: Tensor, seed: int = 0) -> Recoded:
    return recode(blocks, name, values, torch.Generator().manual_seed(seed))


def test_every_codec_has_a_grid() -> None:
    assert GRIDS.keys() == CODECS.keys()


@pytest.mark.parametrize("name", GRIDS)
def test_values_that_do_not_change_keep_every_bit(name: str) -> None:
    blocks = blocks_of(name)
    found = recoded(blocks, name, CODECS[name].decode(blocks))
    assert torch.equal(found.blocks, blocks)
    assert float(found.noise.sum()) == float(found.clipped.sum()) == 0


@pytest.mark.parametrize("name", GRIDS)
def test_other_codes_are_what_is_decoded(name: str) -> None:
    """Every code of every place: packed, then read by the codec, one step apart."""
    grid, blocks = GRIDS[name], blocks_of(name)
    codes = torch.randint(grid.lowest, grid.highest + 1, grid.codes(blocks).shape, dtype=torch.int32)
    packed = grid.pack(blocks, codes.to(torch.uint8))
    assert torch.equal(grid.codes(packed), codes.float())
    assert torch.equal(grid.steps(packed), grid.steps(blocks))
    got = CODECS[name].decode(packed).double() - CODECS[name].decode(blocks).double()
    expected = (codes - grid.codes(blocks)).double() * grid.steps(blocks).double()
    largest = CODECS[name].decode(packed).abs().max(dim=1, keepdim=True).values + expected.abs()
    # Each of the two is a product and a sum, rounded.
    assert bool(((got - expected).abs() <= 4 * torch.finfo(torch.float32).eps * largest + 1e-9).all())


@pytest.mark.parametrize("name", GRIDS)
def test_a_change_below_a_step_is_right_in_the_mean_and_costs_what_is_said(name: str) -> None:
    grid, blocks = GRIDS[name], blocks_of(name)[2:40]
    middle = torch.full(grid.codes(blocks).shape, (grid.lowest + grid.highest) // 2, dtype=torch.uint8)
    blocks = grid.pack(blocks, middle)
    share = torch.rand(middle.shape, generator=torch.Generator().manual_seed(1))
    steps = grid.steps(blocks).double().expand(middle.shape)
    wanted = (CODECS[name].decode(blocks).double() + share * steps).float()
    draws = 400
    found = [recoded(blocks, name, wanted, seed) for seed in range(draws)]
    errors = torch.stack([CODECS[name].decode(one.blocks).double() - wanted for one in found])
    in_steps = torch.where(steps == 0, 0.0, errors / steps)
    # A mean of draws of standard deviation at most 1/2; six of the mean's cover every one of some thousands.
    assert float(in_steps.mean(dim=0).abs().max()) <= 6 * 0.5 / draws**0.5
    squares = errors.square().sum(dim=2).mean(dim=0)
    torch.testing.assert_close(squares.sum(), found[0].noise.double().sum(), rtol=0.05, atol=0)
    assert torch.equal(found[0].blocks, recoded(blocks, name, wanted, 0).blocks)


@pytest.mark.parametrize("name", GRIDS)
def test_what_the_grid_does_not_reach_is_told(name: str) -> None:
    grid, blocks = GRIDS[name], blocks_of(name)
    top = grid.pack(blocks, torch.full(grid.codes(blocks).shape, grid.highest, dtype=torch.uint8))
    wanted = CODECS[name].decode(top) + 3 * grid.steps(top)
    found = recoded(blocks, name, wanted)
    torch.testing.assert_close(CODECS[name].decode(found.blocks), CODECS[name].decode(top), rtol=1e-3, atol=1e-3)
    expected = (9 * grid.steps(blocks).square().expand(wanted.shape)).sum(dim=1)
    torch.testing.assert_close(found.clipped[2:], expected[2:], rtol=1e-2, atol=1e-4)
    without = recoded(blocks[1:2], name, CODECS[name].decode(blocks[1:2]) + 0.5)
    assert float(without.clipped) > 0 or bool((grid.steps(blocks[1:2]) != 0).any())
