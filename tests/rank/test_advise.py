"""Which rank is advised, on losses whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

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


def test_a_difference_of_less_than_a_hundredth_does_not_count_however_sure_it_is() -> None:
    nats = {r: rows(1.0 + 0.004 * k, 1e-4, r) for k, r in enumerate((8, 4, 2, 1))}
    found = advise(nats, TOKENS)
    assert [one.as_good for one in found.curve] == [False, True, True, True]
    assert found.curve[1].gap > 10 * found.curve[1].se
    assert found.r == 2 and "within 1% of the lowest, which is that of r = 8; r = 1 loses" in found.reason


def test_where_no_rank_gains_a_hundredth_the_smallest_is_enough() -> None:
    nats = {r: rows(1.0 + 0.004 * k, 1e-4, r) for k, r in enumerate((4, 2, 1))}
    found = advise(nats, TOKENS)
    assert found.r == 1 and found.reason == "no rank loses 1% less than r = 1: the smallest is enough"


def test_a_rank_beyond_a_worse_one_is_not_as_good_however_wide_its_own_error_is() -> None:
    nats = {1: rows(1.02, 0.5, 1), 2: rows(1.02, 1e-3, 2), 4: rows(1.0, 1e-3, 4)}
    found = advise(nats, TOKENS)
    assert found.curve[0].gap < found.curve[0].se
    assert [one.as_good for one in found.curve] == [False, False, True]
    assert found.r == 4
