"""Blocks decoded by torch's operations: the bits of the package gguf, whole and row by row."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from lorafit.quant import stored as stored_module
from lorafit.quant.blocks import Blocks
from lorafit.quant.codecs import CODECS
from tests.quant.random_blocks import random_blocks


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_gives_the_bits_of_the_package_gguf(name: str) -> None:
    stored = random_blocks(name, rows=37, width=512)
    expected = gguf.dequantize(stored.data.numpy(), gguf.GGMLQuantizationType[name])
    got = stored.decode(torch.float32).numpy()
    assert got.shape == expected.shape == (37, 512)
    assert np.array_equal(expected.view(np.int32), got.view(np.int32))


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_knows_the_size_of_its_blocks(name: str) -> None:
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (CODECS[name].numbers, CODECS[name].nbytes)
    assert CODECS[name].row_bytes(512) == 512 // CODECS[name].numbers * CODECS[name].nbytes


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_rows_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_module, "NUMBERS_AT_ONCE", 1000)  # several parts, the last of them shorter
    stored = random_blocks(name, rows=9, width=256)
    ids = torch.tensor([[3, 0], [8, 3]])
    whole = stored.decode(torch.bfloat16)
    assert torch.equal(whole[ids], stored.rows(ids, torch.bfloat16))
    assert torch.equal(whole, stored.decode(torch.float32).to(torch.bfloat16))


def test_a_matrix_knows_what_it_takes() -> None:
    stored = Blocks(torch.zeros(3, 36, dtype=torch.uint8), 64, CODECS["Q4_0"])
    assert stored.shape == (3, 64)
    assert stored.nbytes == 108
