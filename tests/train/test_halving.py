"""Which ranks a run leaves, what each of them is trained on, and what cannot be halved."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.config import TrainConfig
from lorafit.errors import ConfigError
from lorafit.train.halving import SHARE, check, ladder, plan


def config(**settings: Any) -> TrainConfig:
    base = {"model": "m", "data": "d", "output": "o", "r": 12, "alpha": 7.0, "rank_schedule": "halving"}
    return TrainConfig(**base | settings)


@pytest.mark.parametrize(
    ("r", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_the_ranks_are_powers_of_two_and_the_whole(r: int, expected: list[int]) -> None:
    assert ladder(r) == expected


def test_below_rank_1_nothing_is_planned() -> None:
    assert plan(config(), 1, 1000, 10.0) == []


@given(st.integers(2, 128), st.integers(1, 64), st.integers(1, 10**6), st.floats(1.0, 1e4))
def test_the_ranks_below_compute_less_than_half_of_what_the_run_has_and_smaller_ones_more(
    r: int, batch_size: int, run: int, step: float
) -> None:
    found = plan(config(batch_size=batch_size), r, run, step)
    assert [one.r for one in found] == ladder(r)[-2::-1]
    computed = sum(one.steps for one in found) * step
    assert abs(computed - SHARE * run) <= len(found) * step / 2 * (1 + 1e-9)  # each is rounded to whole steps
    for larger, smaller in pairwise(found):
        assert larger.steps <= smaller.steps and larger.lr < smaller.lr
    assert {one.batch_size for one in found} == {max(1, batch_size // 2)}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "ia3"}, "--method ia3, which has no rank"),
        ({"variant": "dora"}, "--variant dora"),
        ({"variant": "vera"}, "--variant vera"),
        ({"init": "pissa"}, "--init pissa"),
        ({"add_tokens": ["<call>"]}, "--add-tokens"),
        ({"r": 1}, "rank 1, below which there is none"),
    ],
)
def test_what_cannot_be_halved_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"--rank-schedule halving is given with {told}"):
        check(config(**settings), labelled=False)
    check(config(**settings, rank_schedule="none"), labelled=False)


def test_a_head_of_labels_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="rows with labels"):
        check(config(), labelled=True)
    check(config(variant="lora-fa", init="eva"), labelled=False)
