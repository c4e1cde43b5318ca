from __future__ import annotations

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


def test_the_machine_is_measured_once_and_a_broken_cache_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    first = precision.flop_per_s()
    assert all(1e8 < rate < 1e15 for rate in first.values()) and first.keys() == {"fp32", "bf16", "int8"}
    assert precision.flop_per_s() == first
    (tmp_path / "machine.json").write_text("{broken")
    assert precision.flop_per_s() != first
