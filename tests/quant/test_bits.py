"""nf4 and int8 against bitsandbytes."""

from __future__ import annotations

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from lorafit.quant import stored as stored_module
from lorafit.quant.bits import dynamic_code, to_int8, to_nf4


def weight(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    W = 0.05 * torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    W[0] = 0  # a block, and a row, without anything
    W[1, 3] = 4.0  # an outlier
    return W.to(dtype)


@pytest.mark.parametrize("shape", [(3, 64), (37, 192), (300, 576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = weight(*shape, dtype=dtype)
    packed, state = bnb.quantize_4bit(W, compress_statistics=True, quant_type="nf4")
    ours = to_nf4(W)
    assert torch.equal(ours.data.flatten(), packed.flatten())
    assert torch.equal(ours.groups, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)
    # bitsandbytes on a CPU sometimes takes a scale's second nearest code; ours is never farther away.
    tops = W.float().view(-1, 64).abs().amax(1)
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    own = ours.tops().flatten()
    assert ((own - tops).abs() <= (theirs - tops).abs() + torch.finfo(torch.float32).eps * tops.max()).all()
    # What bitsandbytes has encoded is decoded to its bits.
    state.dtype = torch.float32
    same = replace(ours, scales=state.absmax.view_as(ours.scales))
    assert torch.equal(same.decode(torch.float32), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(3, 64), (37, 191)])
def test_int8_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    W = weight(*shape)[1:]
    q, tops, _ = bnb.int8_vectorwise_quant(W)
    ours = to_int8(W)
    assert torch.equal(ours.data, q)
    assert torch.equal(ours.tops, tops)
    assert torch.equal(ours.decode(torch.float32), bnb.int8_vectorwise_dequant(q, tops))


def test_a_row_of_zeros_stays_one() -> None:
    W = weight(5, 128)
    assert not to_int8(W).decode(torch.float32)[0].any()
    # In nf4 its codes are those of 0, whatever its scale has become in 8 bits.
    assert not to_nf4(W).decode(torch.float32)[0].any()


@pytest.mark.parametrize("encode", [to_nf4, to_int8])
def test_what_is_decoded_in_parts_is_the_whole(encode: object, monkeypatch: pytest.MonkeyPatch) -> None:
    W = weight(300, 192)
    whole = encode(W).values()  # type: ignore[operator]
    monkeypatch.setattr(stored_module, "NUMBERS_AT_ONCE", 1000)
    assert torch.equal(whole, encode(W).decode(torch.float32))  # type: ignore[operator]
    assert torch.equal(whole[7:20], encode(W).part(slice(7, 20)).values())  # type: ignore[operator]
    assert torch.equal(whole[9:20], encode(W).part(slice(7, 20)).part(slice(2, None)).values())  # type: ignore[operator]


def test_the_bits_of_a_weight_are_those_of_the_paper() -> None:
    W = weight(512, 4096)
    # 4 bits, 8 for 64 numbers, 32 for 64 x 256 of them, and the mean.
    assert 8 * to_nf4(W).nbytes / W.numel() == 4 + 8 / 64 + 32 / (64 * 256) + 32 / W.numel()
    assert 8 * to_int8(W).nbytes / W.numel() == 8 + 32 / 4096


def test_the_code_of_scales_is_that_of_bitsandbytes() -> None:
    assert torch.equal(dynamic_code(), bnb.create_dynamic_map())
