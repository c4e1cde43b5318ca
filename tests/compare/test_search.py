"""The search of a rate, and the time that trials may take."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lorafit.compare.budget import Budget, Costs
from lorafit.compare.search import FURTHEST, STEP, next_factor, sure_factors


def searched(loss: Callable[[float], float], most: int) -> dict[float, float]:
    tried: dict[float, float] = {}
    while (factor := next_factor(tried, most)) is not None:
        assert factor not in tried
        tried[factor] = loss(factor)
    return tried


def best(tried: dict[float, float]) -> float:
    return min(tried, key=lambda factor: tried[factor])


@pytest.mark.parametrize("optimum", [1.0, 0.3, 3.0, 0.07, 20.0])
def test_the_rate_that_is_found_is_within_a_step_of_the_best(optimum: float) -> None:
    tried = searched(lambda factor: abs(math.log(factor / optimum)), most=8)
    assert abs(math.log(best(tried) / optimum)) <= math.log(STEP) / 2
    assert min(tried) < best(tried) < max(tried)


def test_it_ends_where_training_fails() -> None:
    tried = searched(lambda factor: math.inf if factor > 0.5 else factor, most=10)
    assert best(tried) == min(tried) == STEP**-FURTHEST
    assert searched(lambda factor: math.inf, most=10).keys() >= {1.0, 1 / STEP, STEP}


def test_no_more_rates_are_tried_than_asked_for() -> None:
    for most in range(1, 7):
        assert len(searched(lambda factor: -factor, most)) == most if most <= 3 + FURTHEST - 1 else True
    assert list(searched(lambda factor: -factor, 1)) == [1.0]


def test_a_trial_is_judged_by_what_earlier_ones_took() -> None:
    costs = Costs()
    assert costs.of_run("lora", 100) == 0
    costs.trained("lora", steps=10, train_s=5.0, wall_s=8.0)
    costs.measured("lora", 4.0)
    assert costs.of_training("lora", 20) == 3.0 + 10.0
    assert costs.of_run("lora", 20) == 17.0
    assert costs.of_run("ia3", 20) == 17.0  # nothing is known of it yet
    costs.trained("ia3", steps=10, train_s=1.0, wall_s=3.0)
    assert costs.of_training("ia3", 20) == 2.0 + 2.0


def test_a_budget_keeps_a_little_back_and_none_is_endless() -> None:
    budget = Budget(100.0, spent_s=50.0)
    assert budget.has(47.0) and not budget.has(47.1)
    assert Budget().has(1e12)


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_what_is_sure_to_be_tried_is_what_a_search_one_by_one_tries_first(most: int) -> None:
    losses: tuple[Callable[[float], float], ...] = (
        lambda factor: factor,
        lambda factor: -factor,
        lambda factor: math.inf,
    )
    for loss in losses:
        tried: dict[float, float] = {}
        while sure := sure_factors(tried, most):
            assert len(sure) == (min(3, most) if not tried else 1)
            for factor in sure:
                assert next_factor(tried, most) == factor
                tried[factor] = loss(factor)
        assert next_factor(tried, most) is None
