"""Low-rank updates of several layers at once, in torch's products and in our own, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafit.engine.kernels import products
from lorafit.engine.update import PackedUpdate, Span, Update, spans

EPS = torch.finfo(torch.bfloat16).eps
GROUPS: list[tuple[list[int], list[int | None]]] = [
    ([48], [4]),
    ([64, 16, 32], [3, 20, 7]),  # panels of 64 columns that two layers share
    ([48, 32, 160], [16, None, 8]),
    ([96, 80], [40, 36]),  # more ranks than stand in one block
]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Case:
    """Factors that bfloat16 holds exactly, as are they times their scaling, and what they give in float64."""

    def __init__(self, outs: list[int], ranks: list[int | None], n: int, width: int = 48) -> None:
        self.spans = spans(outs, ranks, [0.5 * 2**k for k in range(len(outs))])
        adapted = [(out, r) for out, r in zip(outs, ranks, strict=True) if r is not None]
        self.factors = [
            random(*shape, seed=k).float()
            for k, shape in enumerate(shape for out, r in adapted for shape in ((r, width), (out, r)))
        ]
        self.x, self.g = random(n, width, seed=98), random(n, sum(outs) + 8, seed=99)[:, : sum(outs)]
        self.y, self.gx = random(n, sum(outs), seed=100), random(n, width, seed=101)

    def pairs(self) -> list[tuple[Span, Tensor, Tensor]]:
        doubles = [factor.double() for factor in self.factors]
        return list(zip(self.spans, doubles[::2], doubles[1::2], strict=True))


def check(update: Update | PackedUpdate, case: Case) -> None:
    x, g = case.x.double(), case.g.double()
    h, to_y = update.forward(case.x)
    gh, to_gx = update.backward(case.g)
    y, gx = case.y.clone(), case.gx.clone()
    assert to_y is not None
    to_y.add_to(y)
    to_gx.add_to(gx)
    gradients = update.gradients(case.x, h, case.g, gh)
    expected_gx, size_gx = case.gx.double(), case.gx.double().abs()
    touched = torch.zeros(y.shape[1], dtype=torch.bool)
    for number, (span, A, B) in enumerate(case.pairs()):
        touched[span.columns] = True
        first = update.layout.parts[number][2] if isinstance(update, PackedUpdate) else span.ranks.start
        own = slice(first, first + len(A))
        g_own, scaled = g[:, span.columns], span.scaling * B
        close(h[:, own], x @ A.T, x.abs() @ A.abs().T)
        close(gh[:, own], g_own @ scaled, g_own.abs() @ scaled.abs())
        # What follows is computed from h and gh as they were rounded.
        h_own, gh_own = h[:, own].double(), gh[:, own].double()
        before = case.y[:, span.columns].double()
        close(y[:, span.columns], before + h_own @ scaled.T, before.abs() + h_own.abs() @ scaled.abs().T)
        expected_gx, size_gx = expected_gx + gh_own @ A, size_gx + gh_own.abs() @ A.abs()
        gA, gB = gradients[2 * number : 2 * number + 2]
        sums = EPS if isinstance(update, Update) else 0.0  # torch rounds them to bfloat16
        close(gA, gh_own.T @ x, gh_own.abs().T @ x.abs(), sums)
        close(gB, span.scaling * g_own.T @ h_own, span.scaling * g_own.abs().T @ h_own.abs(), sums)
    close(gx, expected_gx, size_gx)
    assert torch.equal(y[:, ~touched], case.y[:, ~touched])


def close(got: Tensor, expected: Tensor, size: Tensor, eps: float = EPS) -> None:
    """Rounded once to bfloat16, after float32 sums of terms whose sizes add up to `size`."""
    sums = torch.finfo(torch.float32).eps * 8
    assert ((got.double() - expected).abs() <= eps * expected.abs() + (sums + eps * 2**-6) * size + 1e-30).all()


@pytest.mark.parametrize(("outs", "ranks"), GROUPS)
@pytest.mark.parametrize("n", [1, 2, 13, 530])
def test_torchs_products(outs: list[int], ranks: list[int | None], n: int) -> None:
    case = Case(outs, ranks, n)
    check(Update(case.spans, case.factors, torch.bfloat16), case)


@pytest.mark.skipif(not products.has_low_rank(), reason="this machine's low-rank products are torch's")
@pytest.mark.parametrize(("outs", "ranks"), GROUPS)
@pytest.mark.parametrize("n", [1, 2, 13, 530])
def test_our_own_products(outs: list[int], ranks: list[int | None], n: int) -> None:
    case = Case(outs, ranks, n)
    check(PackedUpdate(case.spans, case.factors), case)


def test_without_a_scaling_there_is_nothing_to_add() -> None:
    case = Case([48], [4], 3)
    silent = spans([48], [4], [0.0])
    updates: list[Update | PackedUpdate] = [Update(silent, case.factors, torch.bfloat16)]
    if products.has_low_rank():
        updates.append(PackedUpdate(silent, case.factors))
    assert all(update.forward(case.x)[1] is None for update in updates)
