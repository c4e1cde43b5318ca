from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from lorafit.engine import precision


@pytest.mark.parametrize("asked", ["fp32", "bf16", "int8"])
def test_what_is_asked_for_is_taken(asked: str) -> None:
    assert precision.choose(asked) == asked


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"fp32": 500.0, "bf16": 1000.0, "int8": 2000.0}, "int8"),
        ({"fp32": 500.0, "bf16": 1000.0, "int8": 1200.0}, "bf16"),
        ({"fp32": 500.0, "bf16": 100.0, "int8": 600.0}, "fp32"),
        ({"fp32": 500.0, "bf16": 100.0, "int8": 700.0}, "int8"),
    ],
)
def test_auto_takes_fewer_bits_where_they_pay(
    rates: dict[str, float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "flop_per_s", lambda: rates)
    assert precision.choose("auto") == expected


def test_the_best_rate_ever_measured_is_kept_and_a_broken_cache_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    path = tmp_path / "rates.json"
    path.write_text("{broken")
    rates = []
    for measured in (2e11, 1e11, 3e11):
        precision._best_rate.cache_clear()
        monkeypatch.setattr(precision, "_measure", lambda name, most_s, rate=measured: rate)
        rates.append(precision.flop_per_s())
        (kept,) = json.loads(path.read_text()).values()
        assert kept == {"flop_per_s": rates[-1], "reached": {}, "number_s": 0.0, "runs": {}}
    precision._best_rate.cache_clear()
    assert [rate["int8"] for rate in rates] == [2e11, 2e11, 3e11]


def test_a_rate_is_that_of_a_machine() -> None:
    rates = precision.flop_per_s()
    assert all(1e8 < rate < 1e15 for rate in rates.values()) and rates.keys() == {"fp32", "bf16", "int8"}


@pytest.mark.parametrize(("asked", "told"), [("auto", None), ("fp32", None), ("bf16", None), ("int8", "40.0 times as")])
def test_a_type_that_is_far_slower_here_is_warned_of(
    asked: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "flop_per_s", lambda names: {"fp32": 8e10, "bf16": 6e10, "int8": 2e9})
    found = precision.warning(asked)
    assert (found is None) if told is None else (found is not None and told in found)


def test_what_is_warned_of_is_what_was_measured() -> None:
    rate = precision.flop_per_s()
    for name in ("bf16", "int8"):
        assert (precision.warning(name) is not None) == (rate["fp32"] >= 2 * rate[name])


def test_a_type_that_is_hopeless_here_is_not_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[str]()

    class Slow:
        def forward(self, x: object) -> None:
            calls.append("a product")
            time.sleep(0.002)

    monkeypatch.setattr(precision, "_product", lambda name, W: Slow())
    rate = precision._measure("int8", most_s=0.001)
    assert len(calls) == 2 and rate <= precision.FLOP / 0.002
    assert precision._measure("int8", most_s=math.inf) <= precision.FLOP / 0.002
    assert len(calls) == 2 + precision.REPEATS


def test_only_what_is_asked_for_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    measured = list[str]()

    def measure(name: str, most_s: float) -> float:
        measured.append(name)
        return 1e11

    precision._best_rate.cache_clear()
    monkeypatch.setattr(precision, "_measure", measure)
    assert precision.flop_per_s(("fp32",)) == {"fp32": 1e11} and measured == ["fp32"]
    assert precision.flop_per_s(("int8",)) == {"int8": 1e11} and measured == ["fp32", "int8"]
    precision._best_rate.cache_clear()
