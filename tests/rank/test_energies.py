"""What follows from spectra of gradients."""

from __future__ import annotations

import numpy as np
import pytest

from lorafit.rank.energies import Spectrum, allocate, held, mean_effective_rank


def spectrum(shape: tuple[int, int], energies: list[float], rest: float = 0.0) -> Spectrum:
    return Spectrum(shape, np.array(energies), rest)


def test_shares_and_effective_ranks_of_known_spectra() -> None:
    even, steep = spectrum((9, 7), [1.0, 1.0, 1.0, 1.0]), spectrum((9, 7), [4.0, 0.0], rest=4.0)
    assert even.held(1) == 0.25 and even.held(4) == 1 and steep.held(2) == 0.5
    assert even.effective_rank == pytest.approx(4) and steep.effective_rank == pytest.approx(2)
    assert held({"a": even, "b": steep}, 1) == pytest.approx((1 + 4) / 12)
    assert mean_effective_rank({"a": even, "b": steep}) == pytest.approx((4 * 4 + 8 * 2) / 12)
    assert spectrum((9, 2), [4.0, 2.0], rest=1.0).held(2) == 1  # an update of rank 2 is any matrix of two columns
    nothing = spectrum((9, 7), [0.0, 0.0])
    assert nothing.held(1) == 1 and mean_effective_rank({"a": nothing}) == 0


def test_ranks_go_where_the_energy_is_and_cost_no_more_than_the_same_everywhere() -> None:
    found = {"a": spectrum((8, 8), [9.0, 8.0, 7.0, 1.0]), "b": spectrum((8, 8), [0.5, 0.4, 0.3, 0.2])}
    assert allocate(found, 2) == {"a": 4, "b": 0}
    wide = {"a": spectrum((8, 8), [2.0, 1.0]), "b": spectrum((8, 72), [9.0, 8.0])}
    assert allocate(wide, 1) == {"a": 1, "b": 1}  # b's directions cost five times as much


def test_a_least_rank_is_everyones_and_is_paid_for() -> None:
    found = {"a": spectrum((8, 8), [9.0, 8.0, 7.0, 1.0]), "b": spectrum((8, 8), [0.5, 0.4, 0.3, 0.2])}
    assert allocate(found, 2, least=1) == {"a": 3, "b": 1}
    assert allocate(found, 1, least=1) == {"a": 1, "b": 1}
