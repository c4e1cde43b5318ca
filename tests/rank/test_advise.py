"""Which rank is advised, on losses whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.errors import NumericsError
from lorafit.rank.advise import advise, standard_error

TOKENS = [4] * 50


def rows(mean: float, noise: float, seed: int) -> list[float]:
    """Nats of 50 rows of four tokens: a mean a token, and noise that all seeds but one share."""
    shared = np.random.default_rng(0).normal(0, 0.5, 50)
    return list(4 * (mean + shared + np.random.default_rng(seed).normal(0, noise, 50)))


def test_the_smallest_rank_that_paired_rows_cannot_tell_from_the_best_is_advised() -> None:
    nats = {1: rows(1.2, 0.01, 1), 2: rows(1.001, 0.05, 2), 4: rows(0.999, 0.05, 3), 8: rows(1.0, 0.05, 4)}
    found = advise(nats, TOKENS)
    assert found.r == 2
    # Rows differ by half a nat among themselves: without pairing rank 1 would pass.
    first = found.curve[0]
    assert not first.as_good and first.gap > first.se and first.gap < 4 * first.loss_se
    assert "r = 1 loses" in found.reason


def test_rows_that_tell_nothing_are_said_to() -> None:
    nats = {r: rows(1.0, 0.3, r) for r in (1, 2, 4)}
    nats[4] = [own - 1e-3 for own in nats[1]]  # the best by a hair
    nats[4][0] += 0.04
    found = advise(nats, TOKENS)
    assert found.r == 1 and "cannot tell r = 1 from r = 4" in found.reason


def test_a_loss_that_still_falls_at_the_end_is_said_to() -> None:
    nats = {r: rows(1.0 - 0.1 * k, 0.001, r) for k, r in enumerate((1, 2, 4))}
    found = advise(nats, TOKENS)
    assert found.r == 4 and "still falls" in found.reason


def test_a_rank_that_diverged_is_never_advised() -> None:
    nats = {1: rows(1.0, 0.01, 1), 2: rows(0.5, 0.01, 2), 4: [math.nan] * 50}
    assert advise(nats, TOKENS).r == 2


def test_the_standard_error_of_a_ratio_is_that_of_drawn_rows() -> None:
    chance = np.random.default_rng(1)
    weights = chance.integers(1, 9, 400).astype(float)
    sums = weights * 0.3 + chance.normal(0, 1, 400)
    drawn = chance.integers(400, size=(4000, 400))
    bootstrap = (sums[drawn].sum(1) / weights[drawn].sum(1)).std()
    # A standard deviation of 4,000 draws is off by 1 / sqrt(8000), and the expansion by O(1 / rows).
    assert standard_error(sums, weights) == pytest.approx(bootstrap, rel=0.05)


def test_the_smallest_rank_may_be_the_best_alone() -> None:
    nats = {r: rows(1.0 + 0.1 * k, 0.001, r) for k, r in enumerate((1, 2, 4))}
    found = advise(nats, TOKENS)
    assert found.r == 1 and "smallest that was tried" in found.reason


def test_a_difference_of_less_than_half_a_hundredth_does_not_count_however_sure_it_is() -> None:
    nats = {r: rows(1.0 + 0.002 * k, 1e-4, r) for k, r in enumerate((8, 4, 2, 1))}
    found = advise(nats, TOKENS)
    assert [one.as_good for one in found.curve] == [False, True, True, True]
    assert found.curve[1].gap > 10 * found.curve[1].se
    assert found.r == 2 and "within 0.5% of the lowest, which is that of r = 8; r = 1 loses" in found.reason


def test_where_no_rank_gains_half_a_hundredth_the_smallest_is_enough() -> None:
    nats = {r: rows(1.0 + 0.002 * k, 1e-4, r) for k, r in enumerate((4, 2, 1))}
    found = advise(nats, TOKENS)
    assert found.r == 1 and found.reason == "no rank loses 0.5% less than r = 1: the smallest is enough"


def test_a_rank_beyond_a_worse_one_is_not_as_good() -> None:
    nats = {1: rows(1.004, 1e-3, 1), 2: rows(1.02, 1e-3, 2), 4: rows(1.0, 1e-3, 4)}
    found = advise(nats, TOKENS)
    assert found.curve[0].gap < 0.005
    assert [one.as_good for one in found.curve] == [False, False, True]
    assert found.r == 4


def test_neighbours_that_are_nearly_one_function_are_told_apart_no_better_than_two_trainings() -> None:
    """As halving gives them: each is the one above it with a little more noise, and a little worse."""
    chance, nats = np.random.default_rng(2), {8: rows(1.0, 0.1, 1)}
    for r in (4, 2, 1):
        nats[r] = [own + n for own, n in zip(nats[2 * r], 4 * chance.normal(0.02, 0.02 * 8 / r, 50), strict=True)]
    found = advise(nats, TOKENS)
    four, one = found.curve[2], found.curve[0]
    assert four.gap > 3 * four.se and four.gap > 0.01 * found.curve[-1].loss
    assert found.error == pytest.approx(one.se * math.sqrt(found.curve[-1].loss / one.loss)) and four.gap < found.error
    assert found.r == 4 and "within one standard error of the lowest, which is that of r = 8" in found.reason
    assert f"({found.curve[1].gap / found.error:.1f} standard errors of what two trainings differ by)" in found.reason


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=6), st.floats(0.1, 10), st.integers(0, 999))
def test_the_advice_goes_with_shares_of_the_loss_and_not_with_its_unit(
    means: list[float], unit: float, seed: int
) -> None:
    chance = np.random.default_rng(seed)
    nats = {2**k: mean * np.exp(chance.normal(0, 0.3, 40)) for k, mean in enumerate(means)}
    plain, scaled = (advise({r: own * by for r, own in nats.items()}, [3] * 40) for by in (1.0, unit))
    assert plain.r == scaled.r and scaled.error == pytest.approx(unit * plain.error)
    assert plain.error <= max(one.se for one in plain.curve)


def test_a_rank_without_a_finite_loss_is_no_reason_with_a_number() -> None:
    broken = [math.nan, *rows(1.0, 0.01, 1)[1:]]
    found = advise({2: broken, 4: rows(1.0, 0.01, 2), 8: rows(1.1, 0.01, 3)}, TOKENS)
    assert found.r == 4 and found.reason == "it has the lowest loss, and r = 2 has no finite loss"
    with pytest.raises(NumericsError, match="no rank has a finite loss"):
        advise({2: broken, 4: broken}, TOKENS)
