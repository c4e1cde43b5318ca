"""Products with a frozen weight against float64, over odd shapes; int8 within its derived bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafit.engine.kernels import products
from lorafit.engine.product import Dense, Int8, Packed, PackedInt8, Product
from lorafit.engine.update import PackedUpdate, spans

SHAPES = [(1, 3, 2), (5, 17, 33), (300, 64, 96), (513, 576, 192)]
own_int8 = pytest.mark.skipif(not products.has_int8(), reason="this machine's int8 product is torch's")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(product: Product, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return product.forward(x), product.backward(g)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_float64_within_their_rounding(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, width, out = shape
    W, x, g = (random(*s, seed=k).to(dtype) for k, s in enumerate(((out, width), (n, width), (n, out))))
    products = [Dense(W), Packed(W, 512)] if dtype is torch.float32 else [Dense(W)]
    for product in products:
        exact = x.double() @ W.double().T, g.double() @ W.double()
        for expected, got, terms in zip(exact, both(product, x, g), (width, out), strict=True):
            assert got.dtype == dtype
            # Sums in float32, rounded to storage once.
            size = expected.abs().max()
            tolerance = torch.finfo(torch.float32).eps * terms**0.5 * 4 + torch.finfo(dtype).eps
            assert (got.double() - expected).abs().max() <= tolerance * size


def _bound(x: Tensor, W: Tensor) -> Tensor:
    """The largest error of x W^T in int8: each element is off by half a step of its row, and steps multiply.

    |x' W'^T - x W^T| <= sx/2 ||W_j||_1 + sw/2 ||x_i||_1 + k sx sw / 4, with steps s = max |row| / 127.
    """
    sx, sw = x.abs().amax(1) / 127, W.abs().amax(1) / 127
    return sx[:, None] / 2 * W.abs().sum(1) + sw / 2 * x.abs().sum(1)[:, None] + x.shape[1] * sx[:, None] * sw / 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_within_its_rounding_bound(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, width, out = shape
    W, x, g = (random(*s, seed=k).to(dtype) for k, s in enumerate(((out, width), (n, width), (n, out))))
    assert_within_bound(Int8(W, None), W, x, g)


def assert_within_bound(product: Product, W: Tensor, x: Tensor, g: Tensor) -> None:
    for (a, b), got in zip(((x, W), (g, W.T)), both(product, x, g), strict=True):
        exact, bound = a.double() @ b.double().T, _bound(a.double(), b.double())
        assert ((got.double() - exact).abs() <= bound + exact.abs() * torch.finfo(x.dtype).eps).all()


@own_int8
@pytest.mark.parametrize("shape", [(1, 16, 16), (7, 48, 80), (300, 64, 96), (513, 576, 192), (41, 1600, 64)])
def test_our_own_int8_is_within_the_same_bound(shape: tuple[int, int, int]) -> None:
    n, width, out = shape
    W, x, g = (random(*s, seed=k).bfloat16() for k, s in enumerate(((out, width), (n, width + 8), (n, out + 8))))
    assert_within_bound(PackedInt8(W, None), W, x[:, :width], g[:, 8:])  # rows that are apart
    other = Int8(W, x[:, :width].abs().amax(0)), PackedInt8(W, x[:, :width].abs().amax(0))
    for expected, got in zip(*(both(product, x[:, :width], g[:, 8:]) for product in other), strict=True):
        # The same whole numbers, but where a quotient lies on the edge between two of them.
        assert (expected.float() - got.float()).norm() <= 2e-3 * expected.float().norm()


@own_int8
def test_an_update_added_on_the_way_is_added_exactly_once() -> None:
    W, x = random(96, 64).bfloat16(), random(37, 64, seed=1).bfloat16()
    A, B = random(5, 64, seed=2).bfloat16().float(), random(96, 5, seed=3).bfloat16().float()
    update = PackedUpdate(spans([96], [5], [2.0]), [A, B])
    (h, addend), product = update.forward(x), PackedInt8(W, None)
    fused, apart = product.forward(x, addend), product.forward(x)
    exact = apart.double() + 2 * h[:, :5].double() @ B.double().T
    # `apart` was rounded once more than `fused`.
    assert ((fused.double() - exact).abs() <= torch.finfo(torch.bfloat16).eps * (exact.abs() + apart.abs())).all()


def test_columns_with_outliers_no_longer_drown_the_others() -> None:
    x, W = random(200, 64), random(96, 64, seed=1)
    x[:, 5] *= 100
    exact = x @ W.T
    error = [float((Int8(W, tops).forward(x) - exact).norm() / exact.norm()) for tops in (None, x.abs().amax(0))]
    assert error[1] < error[0] / 2
    scaled = Int8(W, x.abs().amax(0))
    assert scaled.inverse is not None
    smooth = 1 / scaled.inverse
    bound = _bound((x / smooth).double(), (W * smooth).double())
    assert ((scaled.forward(x).double() - exact.double()).abs() <= bound + 1e-4 * exact.abs()).all()


def test_a_row_of_zeros_and_a_column_never_used_are_no_division_by_zero() -> None:
    x, W = random(3, 8), random(4, 8, seed=1)
    x[1] = 0
    x[:, 2] = 0
    for tops in (None, x.abs().amax(0)):
        product = Int8(W, tops)
        assert product.forward(x).isfinite().all() and (product.forward(x)[1] == 0).all()
        assert product.backward(torch.zeros(3, 4)).eq(0).all()


@own_int8
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_cell_that_is_no_number_shows_in_its_own_row_alone(bad: float) -> None:
    W, x = random(64, 32).bfloat16(), random(9, 32, seed=1).bfloat16()
    x[4, 7] = bad
    y = PackedInt8(W, None).forward(x)
    assert not y[4].isfinite().any()
    assert y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@own_int8
def test_no_rows_are_no_rows() -> None:
    product = PackedInt8(random(64, 32).bfloat16(), None)
    assert product.forward(torch.empty(0, 32, dtype=torch.bfloat16)).shape == (0, 64)
    assert product.backward(torch.empty(0, 64, dtype=torch.bfloat16)).shape == (0, 32)
