"""The speed tables of both READMEs are those that the committed results give."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "train_speed"


def test_the_speed_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARK))
    before = set(sys.modules)
    try:
        generated = importlib.import_module("table").generated()
    finally:
        for name in {"table", "engines", "growth"} - before:
            sys.modules.pop(name, None)
    assert len(generated) == 3
    for path, text in generated.items():
        assert path.read_text() == text, f"{path} is not up to date: run benchmarks/train_speed/table.py --write"
