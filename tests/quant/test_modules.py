"""Layers in blocks against torch's own layers with the decoded weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorafit.quant import modules
from lorafit.quant.modules import QuantizedEmbedding, QuantizedLinear, number_count
from tests.quant.random_blocks import random_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_layer_gives_what_its_decoded_weight_gives(dtype: torch.dtype, has_bias: bool) -> None:
    stored = random_blocks("Q4_1", rows=5, width=64)
    bias = nn.Parameter(torch.randn(5, dtype=dtype)) if has_bias else None
    layer = QuantizedLinear(stored, dtype, bias)
    W = stored.decode(dtype)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    expected = F.linear(x, W) if bias is None else F.linear(x, W) + bias
    assert torch.equal(expected, layer(x))
    g = torch.randn_like(expected)
    (expected_gx,) = torch.autograd.grad(expected, x, g)
    (gx,) = torch.autograd.grad(layer(x), x, g)
    torch.testing.assert_close(gx, expected_gx)


def test_a_weight_of_many_rows_is_decoded_in_parts_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear(random_blocks("Q8_0", rows=11, width=32, size=0.01), torch.float64)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 11, dtype=torch.float64)
    expected = layer(x)
    (expected_gx,) = torch.autograd.grad(expected, x, g)
    monkeypatch.setattr(modules, "ROWS_AT_ONCE", 4)
    torch.testing.assert_close(layer(x), expected)
    (gx,) = torch.autograd.grad(layer(x), x, g)
    torch.testing.assert_close(gx, expected_gx)


def test_no_decoded_weight_is_kept_for_the_backward_pass() -> None:
    layer = QuantizedLinear(random_blocks("Q8_0", rows=5, width=32), torch.float32)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(3, 32, requires_grad=True))
    assert kept == []


def test_an_embedding_gives_the_decoded_rows() -> None:
    stored = random_blocks("Q6_K", rows=11, width=256)
    ids = torch.tensor([[0, 10], [3, 3]])
    assert torch.equal(F.embedding(ids, stored.decode(torch.bfloat16)), QuantizedEmbedding(stored, torch.bfloat16)(ids))


def test_another_weight_can_be_written_and_the_blocks_come_back() -> None:
    layer = QuantizedLinear(random_blocks("Q4_0", rows=5, width=32), torch.float32)
    before = layer.weight
    layer.write(before + 1)
    assert torch.equal(layer.weight, before + 1)
    assert torch.equal(layer(torch.eye(32)), (before + 1).T)
    layer.write(before)
    assert layer.dense is None
    assert torch.equal(layer.weight, before)


def test_a_module_that_is_cast_decodes_into_that_type_and_keeps_its_blocks() -> None:
    layer = QuantizedLinear(random_blocks("Q4_0", rows=5, width=32), torch.float32, nn.Parameter(torch.zeros(5)))
    layer.to(torch.bfloat16)
    assert layer.stored.data.dtype == torch.uint8
    assert layer.weight.dtype == layer(torch.zeros(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_two_modules_share_is_counted_once() -> None:
    stored = random_blocks("Q8_0", rows=7, width=32)
    model = nn.ModuleList(
        [QuantizedEmbedding(stored, torch.float32), QuantizedLinear(stored, torch.float32), nn.Linear(3, 2)]
    )
    assert number_count(model) == 7 * 32 + 3 * 2 + 2
