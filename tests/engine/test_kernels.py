"""The C++ kernels against torch's own operations, over types and odd shapes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from lorafit.engine.kernels import native, plain
from lorafit.engine.kernels.plain import Geometry
from lorafit.quant.bits import to_int8, to_nf4
from lorafit.quant.codecs import CODECS
from tests.quant.random_blocks import random_blocks

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler on this machine")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (5, 64), (17, 576), (2, 1001)]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(expected: Tensor, got: Tensor, terms: int = 1, size: float | None = None) -> None:
    """Both round one result to storage (half a step each); sums of `terms` float32 products may differ by their own.

    size: of what is added up, where the sum may cancel; by default that of the result.
    """
    eps = torch.finfo(expected.dtype).eps
    accumulated = torch.finfo(torch.float32).eps * (terms + 8)
    size = float(expected.float().abs().max()) + 1e-30 if size is None else size
    torch.testing.assert_close(got.float(), expected.float(), rtol=eps, atol=accumulated * size + eps * size * 2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("round_first", [True, False])
def test_rms_norm_and_its_gradient(dtype: torch.dtype, shape: tuple[int, int], round_first: bool) -> None:
    x, gy, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), 1 + 0.1 * torch.arange(shape[1])
    expected, inverse = plain.rms_norm(x, weight, 1e-5, round_first)
    got, got_inverse = native.rms_norm(x, weight, 1e-5, round_first)
    # Where the normalised x falls between two values of storage, the two may round it apart by one step.
    assert_close(expected, got, shape[1]) if not round_first or dtype is torch.float32 else torch.testing.assert_close(
        got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )
    assert_close(inverse, got_inverse, shape[1])
    size = float((gy.float() * weight * inverse[:, None]).abs().max())
    expected, got = (k.rms_norm_backward(gy, x, weight, inverse) for k in (plain, native))
    assert_close(expected, got, shape[1], size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize(("n", "heads", "dim"), [(1, 1, 2), (5, 3, 16), (33, 9, 64)])
def test_rotary_takes_rows_that_are_apart(dtype: torch.dtype, inverse: bool, n: int, heads: int, dim: int) -> None:
    x = random(n, heads * dim + 5, dtype=dtype)[:, : heads * dim].unflatten(-1, (heads, dim))
    cosine, sine = random(n, dim, dtype=dtype, seed=1), random(n, dim, dtype=dtype, seed=2)
    assert_close(plain.rotary(x, cosine, sine, inverse), native.rotary(x, cosine, sine, inverse))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_rotary_in_place_turns_some_heads_of_each_row(dtype: torch.dtype, inverse: bool) -> None:
    whole, cosine, sine = (random(5, width, dtype=dtype, seed=width) for width in (48, 8, 8))
    expected = plain.rotary(whole[:, :32].view(5, 4, 8), cosine, sine, inverse)
    rest = whole[:, 32:].clone()
    native.rotary_(whole[:, :32].view(5, 4, 8), cosine, sine, inverse)
    assert_close(expected, whole[:, :32].view(5, 4, 8))
    assert torch.equal(rest, whole[:, 32:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_adds_what_goes_past_it_before_and_its_gradient_after(dtype: torch.dtype) -> None:
    x, more, gy = (random(7, 40, dtype=dtype, seed=seed) for seed in range(3))
    weight = torch.rand(40) + 0.5
    summed = x + more
    expected, inverse = native.rms_norm(summed, weight, 1e-5, True)
    assert all(map(torch.equal, (expected, inverse), native.rms_norm(x, weight, 1e-5, True, more)))
    assert torch.equal(summed, x)
    back = native.rms_norm_backward(gy, summed, weight, inverse)
    assert torch.equal(back + more, native.rms_norm_backward(gy, summed, weight, inverse, more))


def test_inverse_rotary_is_the_transpose() -> None:
    x, g = random(4, 2, 8, dtype=torch.float32), random(4, 2, 8, dtype=torch.float32, seed=3)
    cosine, sine = random(4, 8, dtype=torch.float32, seed=1), random(4, 8, dtype=torch.float32, seed=2)
    there = (plain.rotary(x, cosine, sine, False) * g).sum()
    back = (x * plain.rotary(g, cosine, sine, True)).sum()
    torch.testing.assert_close(there, back)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [plain.SILU, plain.GELU_TANH])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_activation_and_its_gradient(dtype: torch.dtype, kind: int, shape: tuple[int, int]) -> None:
    n, width = shape
    both = 4 * random(n, 2 * width, dtype=dtype)
    gate, up, gy = both[:, :width], both[:, width:], random(n, width, dtype=dtype, seed=1)
    assert_close(plain.gated(gate, up, kind), native.gated(gate, up, kind))
    assert_close(plain.gated_backward(gy, gate, up, kind), native.gated_backward(gy, gate, up, kind))
    for one in (plain, native):
        both, value = one.gated_again(gy, gate, up, kind)
        assert torch.equal(both, one.gated_backward(gy, gate, up, kind))
        assert torch.equal(value, one.gated(gate, up, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [True, False])
def test_heads_are_gathered_and_scattered(dtype: torch.dtype, add: bool) -> None:
    x = random(6, 40, dtype=dtype)[:, :32].unflatten(-1, (4, 8))
    tokens = torch.tensor([3, 0, -1, 5, -1, 2], dtype=torch.int32)
    packed = plain.gather_heads(x, tokens, 2)
    assert torch.equal(native.gather_heads(x, tokens, 2), packed)
    expected, got = random(6, 4, 8, dtype=dtype, seed=1), random(6, 4, 8, dtype=dtype, seed=1)
    plain.scatter_heads_(packed, tokens, expected, add)
    native.scatter_heads_(packed, tokens, got, add)
    assert torch.equal(got, expected)


GEOMETRIES = [
    Geometry(blocks=2, rows=1, queries=1, group=1, first=0, keys=1, prefix=0, window=0),
    Geometry(blocks=6, rows=3, queries=5, group=3, first=0, keys=5, prefix=0, window=0),
    Geometry(blocks=6, rows=3, queries=5, group=3, first=0, keys=5, prefix=7, window=0),
    Geometry(blocks=2, rows=1, queries=4, group=2, first=3, keys=7, prefix=5, window=0),
    Geometry(blocks=2, rows=1, queries=4, group=2, first=3, keys=7, prefix=5, window=3),
    Geometry(blocks=4, rows=2, queries=6, group=1, first=0, keys=6, prefix=9, window=8),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", GEOMETRIES)
def test_softmax_and_its_gradient(dtype: torch.dtype, at: Geometry) -> None:
    lines = at.queries * at.group

    def scores(keys: int, seed: int) -> Tensor | None:
        return 3 * random(at.blocks, lines, keys, dtype=dtype, seed=seed) if keys else None

    lengths = torch.tensor([at.first + at.queries - row for row in range(at.rows)], dtype=torch.int32)
    results = []
    for kernels in (plain, native):
        own, shared, g_own, g_shared = (
            scores(at.keys, 0),
            scores(at.prefix, 1),
            scores(at.keys, 2),
            scores(at.prefix, 3),
        )
        p_own, p_shared = scores(at.keys, 0), scores(at.prefix, 1)
        log_sum = kernels.softmax_(p_own, p_shared, lengths, at, 0.3)
        kernels.softmax_backward_(own, shared, g_own, g_shared, lengths, log_sum, at, 0.3)
        results.append([t for t in (log_sum, p_own, p_shared, own, shared, g_own, g_shared) if t is not None])
    for expected, got in zip(*results, strict=True):
        # p is stored twice in bf16: before and after the division by the sum.
        torch.testing.assert_close(got, expected, rtol=3 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_a_window_as_wide_as_the_row_changes_nothing() -> None:
    at = GEOMETRIES[2]
    own, shared = random(6, 15, 5, dtype=torch.float32), random(6, 15, 7, dtype=torch.float32, seed=1)
    lengths = torch.tensor([5, 4, 3], dtype=torch.int32)
    wide_own, wide_shared = own.clone(), shared.clone()
    native.softmax_(own, shared, lengths, at, 1.0)
    native.softmax_(wide_own, wide_shared, lengths, replace(at, window=12), 1.0)
    assert torch.equal(own, wide_own) and torch.equal(shared, wide_shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 259), (5, 4099)])
def test_cross_entropy_and_its_gradient(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits = 5 * random(*shape, dtype=dtype)
    targets, weights = torch.arange(shape[0]) % shape[1], 1 + 0.5 * torch.arange(shape[0], dtype=torch.float32)
    expected, got = logits.clone(), logits.clone()
    torch.testing.assert_close(
        native.cross_entropy_(got, targets, weights, True),
        plain.cross_entropy_(expected, targets, weights, True),
        rtol=1e-5,
        atol=1e-5,
    )
    assert_close(expected, got, shape[1])
    untouched = logits.clone()
    native.cross_entropy_(untouched, targets, weights, False)
    assert torch.equal(untouched, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaled", [True, False])
def test_quantizing_stays_within_half_a_step(dtype: torch.dtype, shape: tuple[int, int], scaled: bool) -> None:
    x = random(*shape, dtype=dtype)
    columns = 1 + torch.arange(shape[1], dtype=torch.float32) if scaled else None
    q, scales = native.quantize_rows(x, columns)
    wide = x.float() * columns if columns is not None else x.float()
    assert (q.float() * scales[:, None] - wide).abs().le(0.5001 * scales[:, None] + 1e-12).all()
    assert (q.int() - plain.quantize_rows(x, columns)[0].int()).abs().le(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantizing_columns_stays_within_half_a_step(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = random(*shape, dtype=dtype)
    x[:, 0] = 0
    for kernels in (plain, native):
        q, scales = kernels.quantize_columns(x)
        assert (q.float() * scales - x.float()).abs().le(0.5001 * scales + 1e-12).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_dequantizing_writes_into_rows_that_are_apart(dtype: torch.dtype, add: bool, scaled: bool) -> None:
    sums = torch.arange(-10, 11, dtype=torch.int32).reshape(3, 7) * 1000
    rows, columns = torch.tensor([0.1, 0.2, 0.3]), torch.arange(7, dtype=torch.float32) if scaled else None
    expected, got = random(3, 9, dtype=dtype)[:, :7], random(3, 9, dtype=dtype)[:, :7]
    plain.dequantize_(sums, rows, columns, expected, add)
    native.dequantize_(sums, rows, columns, got, add)
    assert_close(expected, got)


def test_a_logit_that_is_not_a_number_makes_the_loss_not_a_number() -> None:
    logits = torch.full((2, 40), 0.5, dtype=torch.bfloat16)
    logits[1, 3] = torch.nan
    nll = native.cross_entropy_(logits, torch.zeros(2, dtype=torch.int64), torch.ones(2), True)
    assert nll[0].isfinite() and nll[1].isnan()


STORED = {
    **{name: partial(random_blocks, name, 19, 512) for name in CODECS},
    "nf4": lambda: to_nf4(random(19, 512, dtype=torch.float32)),
    "int8": lambda: to_int8(random(19, 511, dtype=torch.float32)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STORED)
def test_stored_weights_are_decoded_to_the_same_bits(dtype: torch.dtype, name: str) -> None:
    stored = STORED[name]()
    width = stored.width
    expected, got = torch.empty(19, width, dtype=dtype), torch.zeros(19, width + 8, dtype=dtype)
    plain.decode_(stored, expected)
    native.decode_(stored, got[:, :width])  # rows that are apart
    assert torch.equal(expected, got[:, :width])
    assert not got[:, width:].any()


def test_rows_within_a_stored_weight_are_decoded_to_the_same_bits() -> None:
    stored = to_nf4(random(300, 192, dtype=torch.float32)).part(slice(7, 290))
    expected, got = torch.empty(283, 192), torch.empty(283, 192)
    plain.decode_(stored, expected)
    native.decode_(stored, got)
    assert torch.equal(expected, got)
