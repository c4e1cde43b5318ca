"""Attention over rows in C++ against its definition in float64, within the rounding of what it rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafit.engine.kernels import products, rows

pytestmark = pytest.mark.skipif(not products.has_low_rank(), reason="no such kernel on this machine")
EPS = torch.finfo(torch.bfloat16).eps
SINGLE = torch.finfo(torch.float32).eps
# (prefix, lengths of what continues it), heads, kv_heads, dim, dim_v, window
CASES: list[tuple[list[tuple[int, list[int]]], int, int, int, int, int]] = [
    ([(0, [1])], 2, 1, 16, 16, 0),
    ([(0, [5]), (0, [17]), (0, [33])], 4, 2, 32, 16, 0),
    ([(7, [5, 17, 1, 2, 9, 40])], 4, 4, 16, 48, 0),
    ([(40, [50, 130, 3]), (0, [20]), (16, [16, 16])], 6, 2, 64, 64, 24),
    ([(0, [100]), (0, [30])], 6, 2, 80, 80, 16),
    ([(3, [300, 20])], 8, 1, 128, 96, 0),
    ([(33, [70, 5])], 2, 2, 16, 16, 1),
]


def table(families: list[tuple[int, list[int]]]) -> np.ndarray:
    made: list[tuple[int, int, int]] = []
    at = 0
    for prefix, lengths in families:
        before = -1
        if prefix:
            before = len(made)
            made.append((at, prefix, -1))
            at += prefix
        for length in lengths:
            made.append((at, length, before))
            at += length
    return np.array(made, dtype=np.int64)


class Exact:
    """Values in float64 with, for each, the sum of the sizes of what was rounded to bfloat16 before it was added up."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, made: np.ndarray, scale: float, window: int) -> None:
        self.out, self.gq, self.gk, self.gv = (torch.zeros_like(x) for x in (g, q, k, v))
        self.sizes = [torch.zeros_like(x) for x in (g, q, k, v)]
        group = q.shape[1] // k.shape[1]
        for start, length, before in made.tolist():
            own = torch.arange(start, start + length)
            first = torch.arange(*np.cumsum(made[before, :2])) if before >= 0 else own[:0]
            keys = torch.cat([first, own])
            position, at = torch.arange(len(keys)), torch.arange(length)[:, None] + len(first)
            seen = (position <= at) & (position > at - window if window else True)
            for head in range(q.shape[1]):
                place = (own, head), (keys, head // group)
                Q, K, V, G = q[place[0]], k[place[1]], v[place[1]], g[place[0]]
                P = torch.softmax((scale * Q @ K.T).masked_fill(~seen, -torch.inf), 1)
                D = G @ V.T
                S = scale * P * (D - (P * D).sum(1, keepdim=True))
                # Sums in single precision before the difference: of the size of D, not of S.
                S_size = EPS * S.abs() + 64 * SINGLE * scale * P * D.abs().amax(1, keepdim=True)
                for y, size, where, value, bound in (
                    (self.out, self.sizes[0], place[0], P @ V, EPS * P @ V.abs()),
                    (self.gq, self.sizes[1], place[0], S @ K, S_size @ K.abs()),
                    (self.gk, self.sizes[2], place[1], S.T @ Q, S_size.T @ Q.abs()),
                    (self.gv, self.sizes[3], place[1], P.T @ G, EPS * P.T @ G.abs()),
                ):
                    y[where] += value
                    size[where] += bound


@pytest.mark.parametrize("case", CASES)
def test_it_is_attention_and_its_gradient(case: tuple[list[tuple[int, list[int]]], int, int, int, int, int]) -> None:
    families, heads, kv_heads, dim, dim_v, window = case
    made = table(families)
    used, n = int(made[:, :2].sum(1).max()), int(made[:, :2].sum(1).max()) + 3
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (
        torch.randn(n, h, d, generator=generator).bfloat16()
        for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, dim_v), (heads, dim_v))
    )
    exact = Exact(*(x.double() for x in (q, k, v, g)), made, 0.3, window)
    apart = torch.cat([v.flatten(1), v.flatten(1)], dim=1)[:, : kv_heads * dim_v].view(v.shape)
    out, log_sum = rows.forward(q, k, apart, rows.RowTable(made), 0.3, window)
    gradients = rows.backward(q, k, apart, g, log_sum, rows.RowTable(made), 0.3, window)
    names, values = ("out", "gq", "gk", "gv"), (exact.out, exact.gq, exact.gk, exact.gv)
    for name, got, expected, size in zip(names, (out, *gradients), values, exact.sizes, strict=True):
        error = (got.double() - expected).abs()
        assert (error <= size + EPS * expected.abs() + 1e-6).all(), name
        assert (got[used:] == 0).all(), name


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    made = table([(20, [30, 9, 41, 7, 12, 5]), (0, [64])])
    q, k, v, g = (torch.randn(200, h, 32, generator=torch.Generator().manual_seed(h)).bfloat16() for h in (6, 2, 2, 6))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, log_sum = rows.forward(q, k, v, rows.RowTable(made), 0.2, 0)
            results.append((out, *rows.backward(q, k, v, g, log_sum, rows.RowTable(made), 0.2, 0)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_query_that_is_no_number_gives_no_number() -> None:
    made = rows.RowTable(table([(0, [20]), (0, [7])]))
    q, k, v = (torch.ones(27, h, 16).bfloat16() for h in (2, 1, 1))
    q[5, 1] = float("nan")
    out, _ = rows.forward(q, k, v, made, 0.25, 0)
    assert out[5, 1].isnan().all()
    assert out.isnan().sum() == 16
