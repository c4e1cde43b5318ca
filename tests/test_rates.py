"""What was measured on this machine, and how much of it counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafit import rates


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    return tmp_path


def test_a_run_that_other_work_slowed_down_does_not_change_what_is_expected() -> None:
    key = rates.run_key("bf16", 576)
    for speed in (5e11, 5.2e11, 3e9):
        rates.add_run(2, key, speed)
    assert rates.read(2).reached_by("bf16", 576) == 5e11
    for _ in range(rates.LAST_RUNS):
        rates.add_run(2, key, 4e11)
    assert rates.read(2).reached_by("bf16", 576) == 4e11
    assert rates.read(4).reached == {}


def test_what_is_measured_on_purpose_takes_the_place_of_earlier_runs() -> None:
    one, other = rates.run_key("bf16", 576), rates.run_key("fp32", 576)
    for speed in (1e9, 1e9, 1e9):
        rates.add_run(2, one, speed)
        rates.add_run(2, other, speed)
    rates.keep(2, rates.Rates(flop_per_s={"bf16": 1e12}, reached={one: 6e11}, number_s=1e-9))
    assert rates.read(2) == rates.Rates({"bf16": 1e12}, {one: 6e11, other: 1e9}, 1e-9)
    rates.add_run(2, one, 5e11)
    assert rates.read(2).reached[one] == 5e11 and rates.read(2).reached[other] == 1e9


def test_a_damaged_file_is_as_none(cache: Path) -> None:
    rates.add_run(2, "bf16/576", 5e11)
    (cache / "rates.json").write_text('{"x": [1')
    assert rates.read(2) == rates.Rates()
    rates.add_run(2, "bf16/576", 4e11)
    assert rates.read(2).reached == {"bf16/576": 4e11}
