"""What the one run of all ranks is expected to take."""

from __future__ import annotations

import time
from typing import Any

import pytest

from lorafit.config import RankConfig
from lorafit.rank.expected import Expected, Pace, expect


def expected(rows: int = 320, held_out: int = 200, **given: Any) -> Expected:
    config = RankConfig(**{"model": "m", "data": "d", "output": "o", "batch_size": 16, "epochs": 3, **given})
    return expect(config, 64, rows, held_out, load=5.0, step=2.0, row=0.1)


def test_it_is_the_steps_a_race_what_lower_ranks_compute_and_the_evaluations() -> None:
    found = expected()
    assert (found.load, found.train, found.lower) == (5.0, 120.0, pytest.approx(0.4 * 120))
    # Five steps of the losing rate, and for both a pass forward of one step, which is a third of it.
    assert found.race == pytest.approx(2.0 * (5 + 2 / 3))
    # After each epoch, at each of the 6 ranks below, and at a glance before steps at 8, 4, 2 and 1.
    assert found.evaluations == pytest.approx((3 + 6 + 4 / 4) * 200 * 0.1)


def test_there_is_no_race_of_a_given_rate_or_in_a_short_run() -> None:
    assert expected(lr=1e-3).race == 0.0
    assert expected(epochs=2).race == 0.0


def test_steps_that_are_given_are_what_counts() -> None:
    found = expected(max_steps=30)
    assert found.train == 60.0
    assert found.evaluations == pytest.approx((2 + 6 + 1) * 200 * 0.1)


def test_without_held_out_rows_nothing_is_measured() -> None:
    assert expected(held_out=0).evaluations == 0.0


def test_a_pace_is_the_median_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((10.0, 19.0, 20.0, 22.0, 25.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    pace = Pace()
    for _ in range(4):
        pace()
    assert pace.usual == 2.5
