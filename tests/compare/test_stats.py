"""Intervals hold what they should, and no more."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lorafit.compare import stats
from lorafit.compare.stats import Estimate, Scores, difference, estimate, pooled

ROWS, REPEATS = 80, 300


def drawn(chance: np.random.Generator, seeds: int, better_by: float = 0.0, of_seed: float = 0.05) -> Scores:
    """Nats of a method on rows of differing length: its seeds' own luck, and noise of each row and seed."""
    weights = np.arange(ROWS) % 5 + 1.0
    luck = chance.normal(0, of_seed, seeds)
    noise = chance.normal(0, 0.3, (ROWS, seeds))
    return Scores((1.0 - better_by + luck + noise) * weights[:, None], weights)


def wrong(chance: np.random.Generator, seeds: int, noisier: float = 1.0) -> float:
    """In how many comparisons of three equal methods the first two seem to differ. noisier: the first one's seeds."""
    count = 0
    for _ in range(REPEATS):
        noisy, *others = (drawn(chance, seeds, of_seed=0.05 * factor) for factor in (noisier, 1.0, 1.0))
        a, b, _ = pooled([noisy, *others])
        count += difference(a, b).excludes_zero
    return count / REPEATS


@pytest.mark.parametrize(("seeds", "noisier"), [(2, 1.0), (3, 1.0), (5, 1.0), (2, 3.0), (3, 3.0)])
def test_of_equal_methods_at_most_one_difference_in_twenty_seems_real(
    seeds: int, noisier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    # Three standard errors of a share of 5% in so many repeats.
    assert wrong(np.random.default_rng(seeds), seeds, noisier) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / REPEATS)


def test_nor_far_fewer_where_seeds_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interval that holds everything would pass the test above."""
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    assert wrong(np.random.default_rng(7), 5) >= 0.005


def test_without_the_spread_of_seeds_far_more_would_seem_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    chance = np.random.default_rng(1)
    pairs = [(drawn(chance, 3), drawn(chance, 3)) for _ in range(REPEATS)]
    alone = [Scores((a.sums - b.sums).mean(1, keepdims=True), a.weights) for a, b in pairs]
    assert sum(estimate(one).excludes_zero for one in alone) / REPEATS > 0.2


def test_two_seeds_that_happen_to_agree_do_not_make_a_method_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    weights = np.ones(ROWS)
    agree = Scores(np.ones((ROWS, 2)), weights)
    apart = Scores(np.ones((ROWS, 2)) * [0.8, 1.2], weights)
    together = pooled([agree, apart])
    assert estimate(together[0]).high - estimate(together[0]).low > 0.3
    assert estimate(agree) == Estimate(1.0, 1.0, 1.0)
    lone = pooled([Scores(np.ones((ROWS, 1)), weights), apart])[0]
    assert estimate(lone).high - estimate(lone).low > estimate(together[0]).high - estimate(together[0]).low


def test_a_method_that_is_not_stable_is_unsure_itself_and_leaves_the_others_sure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    chance = np.random.default_rng(9)
    stable = [drawn(chance, 3, of_seed=0.01) for _ in range(4)]
    unstable = Scores(np.ones((ROWS, 3)) * [0.9, 1.0, 8.0], np.ones(ROWS))

    def widths(methods: list[Scores]) -> list[float]:
        return [found.high - found.low for found in map(estimate, pooled(methods))]

    *with_it, own = widths([*stable, unstable])
    assert with_it == widths(stable)
    assert own > 10  # its three seeds alone: 4.3 times 4.07 / sqrt(3) to both sides
    a, odd = pooled([*stable, unstable])[:: len(stable)]
    assert not difference(odd, a).excludes_zero


def test_where_all_are_alike_hardly_any_is_called_unstable() -> None:
    chance = np.random.default_rng(10)
    apart = 0
    for _ in range(REPEATS):
        found = pooled([drawn(chance, 3) for _ in range(5)])
        apart += len({one.spread for one in found}) > 1
    assert apart / REPEATS <= stats.OUTLYING + 3 * math.sqrt(stats.OUTLYING * (1 - stats.OUTLYING) / REPEATS)


def test_few_rows_widen_an_interval_and_rows_that_are_all_alike_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 1000)
    chance, held = np.random.default_rng(8), 0
    for _ in range(REPEATS):
        found = estimate(Scores(chance.normal(1.0, 1.0, (5, 1)), np.ones(5)))
        held += found.low <= 1.0 <= found.high
    # Five rows drawn again as they are hold the truth in 80 to 85 of 100 cases.
    assert held / REPEATS >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / REPEATS)
    none_right = estimate(Scores(np.zeros((60, 1)), np.ones(60)), 0.0, 1.0)
    assert (none_right.low, none_right.high) == (0.0, 3 / 60)


def test_a_large_difference_is_found_and_has_its_sign() -> None:
    chance = np.random.default_rng(2)
    better, worse = drawn(chance, 3, better_by=0.6), drawn(chance, 3)
    found = difference(worse, better)
    assert found.excludes_zero and found.low < 0.6 < found.high and found.value > 0
    assert difference(better, worse).value == -found.value


def test_what_all_rows_have_in_common_does_not_blur_a_difference() -> None:
    """Paired: hard rows are hard for both."""
    chance = np.random.default_rng(3)
    hard = chance.exponential(5.0, (ROWS, 1))
    weights = np.ones(ROWS)
    a, b = Scores(hard + 0.1 + chance.normal(0, 0.05, (ROWS, 1)), weights), Scores(hard, weights)
    assert difference(a, b).excludes_zero
    assert estimate(a).high - estimate(a).low > 20 * (difference(a, b).high - difference(a, b).low)


def test_a_figure_is_the_ratio_of_sums_and_its_interval_stays_possible() -> None:
    scores = Scores(np.array([[1.0], [0.0], [1.0], [1.0]]), np.ones(4))
    found = estimate(scores, 0.0, 1.0)
    assert found.value == 0.75 and 0 <= found.low < 0.75 < found.high == 1.0
    assert Scores(np.array([[4.0], [1.0]]), np.array([4.0, 2.0])).value == 5 / 6


def test_a_base_without_seeds_and_a_method_with_fewer_stand_against_all() -> None:
    chance = np.random.default_rng(4)
    tuned = drawn(chance, 3, better_by=0.5)
    base = Scores(np.ones((ROWS, 1)) * tuned.weights[:, None], tuned.weights)
    assert difference(tuned, base).value == pytest.approx(tuned.value - 1.0)
    assert difference(drawn(chance, 3), drawn(chance, 2)).value != 0


def test_intervals_are_the_same_each_time() -> None:
    scores = drawn(np.random.default_rng(5), 3)
    assert estimate(scores) == estimate(scores)


def test_a_loss_that_is_no_number_has_no_interval() -> None:
    found = estimate(Scores(np.array([[np.inf], [1.0]]), np.ones(2)))
    assert found.value == np.inf and not found.excludes_zero
