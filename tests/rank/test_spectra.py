"""Spectra of gradients, against gradients that autograd forms whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded
from lorafit.engine.engine import Engine, prepare
from lorafit.rank import spectra
from lorafit.rank.energies import Spectrum
from tests import tiny

STEPS, ROWS = 3, 4


def rows() -> list[Encoded]:
    random = np.random.default_rng(0)
    return [
        Encoded(random.integers(0, 258, length).astype(np.int32), np.arange(length) > 2, 0, f"row {length}")
        for length in range(9, 9 + STEPS * ROWS)
    ]


def measured(most: int) -> tuple[dict[str, Spectrum], Engine]:
    model = tiny.llama().requires_grad_(False)
    layers = spectra.attach(model, most)
    engine = prepare(model, share_prefix=True)
    own = rows()
    steps = [micro_batches(own, range(at, at + ROWS), 64, engine.packing) for at in range(0, len(own), ROWS)]
    return spectra.measure(engine, layers, steps, seed=1, on_step=lambda: None), engine


def whole() -> dict[str, list[Tensor]]:
    """Of every linear weight the gradient of each step's mean loss, by plain autograd."""
    model = tiny.llama()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    own = rows()
    for at in range(0, len(own), ROWS):
        total, count = torch.zeros(()), 0
        for row in own[at : at + ROWS]:
            ids, supervised = torch.tensor(row.input_ids)[None].long(), torch.tensor(row.supervised)[1:]
            logits = model(ids).logits[0, :-1][supervised]
            total = total + nn.functional.cross_entropy(logits, ids[0, 1:][supervised], reduction="sum")
            count += int(supervised.sum())
        model.zero_grad()
        (total / count).backward()
        for name in names:
            found[name].append(model.get_submodule(name).weight.grad.clone())
    return found


def test_a_sketch_as_wide_as_the_weight_gives_its_gradients_own_energies() -> None:
    found, _ = measured(most=64)
    for name, gradients in whole().items():
        G = torch.stack(gradients).double()
        expected = torch.linalg.eigvalsh((G @ G.mT).mean(0)).flip(0)
        own = found[name]
        if gradients[0].shape[0] > gradients[0].shape[1]:
            continue  # an adapter as wide as it has outputs has a higher rank than it can hold
        count = min(len(own.energies), len(expected))
        # Both are sums of squares in float32: each off by eps times the largest, times the root of what is summed up.
        close = torch.finfo(torch.float32).eps * 64 * float(expected[0])
        torch.testing.assert_close(torch.tensor(own.energies[:count]), expected[:count], rtol=0, atol=close)
        assert own.rest == 0 and own.total == pytest.approx(float(expected.sum()), rel=1e-5)


def test_a_narrow_sketch_never_finds_more_than_there_is_and_misses_no_more_than_it_may() -> None:
    found, _ = measured(most=1)
    missed = allowed = 0.0
    for name, gradients in whole().items():
        G = torch.stack(gradients).double()
        expected = torch.linalg.eigvalsh((G @ G.mT).mean(0)).flip(0)
        own = torch.tensor(found[name].energies)
        # In a subspace no energy is larger than in the whole: Cauchy's interlacing.
        assert (own[:9] <= expected[:9] * (1 + 1e-5)).all(), name
        missed += float(expected.sum() - own.sum())
        # Halko et al. 2011, theorem 10.5, for k = 1 of nine columns, which holds in the mean.
        allowed += (1 + 1 / (spectra.BEYOND - 1)) * float(expected[1:].sum())
    assert missed < allowed


def test_what_a_narrow_sketch_misses_is_estimated() -> None:
    found, _ = measured(most=1)
    missed, variance = 0.0, 0.0
    for name, gradients in whole().items():
        own = found[name]
        rest = float(torch.stack(gradients).square().sum((1, 2)).mean()) - float(own.energies.sum())
        # The squared norm of what is left of a Gaussian probe has this mean; its variance is twice the sum of the
        # fourth powers of the singular values that are left, no more than twice the square of the mean.
        missed += own.rest - rest
        variance += 2 * rest**2 / spectra.PROBES
    assert abs(missed) < 4 * variance**0.5


def test_the_model_is_the_base_again_afterwards() -> None:
    _, engine = measured(most=2)
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    engine.close()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(engine.model(ids).logits, tiny.llama()(ids).logits, rtol=0, atol=0)
