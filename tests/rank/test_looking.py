"""How much of the rows and of the steps a look without training takes."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lorafit.config import RankConfig
from lorafit.data.store import Encoded
from lorafit.engine.engine import plain
from lorafit.rank import looking
from lorafit.rank.distance import evenly
from lorafit.rank.looking import _row_s, _steps, _within
from lorafit.trials.rows import KEEP
from tests import tiny


@given(st.integers(1, 3000), st.integers(2, 300))
def test_what_is_looked_at_lies_evenly_from_the_first_to_the_last(count: int, wanted: int) -> None:
    found = evenly(count, wanted)
    assert len(found) == min(count, wanted) and (found[0], found[-1]) == (0, count - 1)
    gaps = np.diff(found)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("count", "expected"), [(3, 64), (100, 100), (9000, 256)])
def test_it_is_within_its_bounds(count: int, expected: int) -> None:
    assert _within(count, 64, 256) == expected


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"epochs": 3}, 4),  # of 60 steps
        ({"epochs": 6}, 8),
        ({"epochs": 60}, 12),
        ({"epochs": 60, "max_steps": 75}, 5),
        ({"epochs": 60, "batch_size": 16}, 5),  # there are no more in an epoch
    ],
)
def test_a_longer_run_is_looked_at_in_more_steps(more: dict[str, Any], expected: int) -> None:
    rows = [Encoded(np.arange(2, 8, dtype=np.int32), np.arange(6) >= 3, 3, "row") for _ in range(80)]
    config = RankConfig(**{"model": "m", "data": "d", "output": "o", "batch_size": 4, **more})
    steps = _steps(config, plain(tiny.llama()), rows)
    assert len(steps) == expected
    assert all(sum(batch.rows for batch in step) == config.batch_size for step in steps)


def test_a_held_out_row_takes_its_share_of_the_first_passes_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Encoded(np.arange(2, 8, dtype=np.int32), np.arange(6) >= 3, 3, "row") for _ in range(80)]
    config = RankConfig(model="m", data="d", output="o", batch_size=4)
    engine = plain(tiny.llama())
    steps = _steps(config, engine, rows)
    clock = iter((10.0, 14.0))
    monkeypatch.setattr(looking.time, "perf_counter", lambda: next(clock))
    assert _row_s(engine, steps) == pytest.approx(4.0 / (looking.PACED_STEPS * config.batch_size))


def test_the_reference_text_is_cut_to_what_learned_positions_hold(tmp_path: Path) -> None:
    model = str(tiny.write_gpt2(tmp_path / "model", positions=96))
    rows = str(tiny.write_rows(tmp_path / "rows.jsonl", [tiny.chat_row(f"{n} odd?", "no") for n in range(8)]))
    config = RankConfig(model=model, data=rows, output="o", batch_size=4, precision="fp32", threads=1)
    found = looking.look(config, 2, rows, 2, str(KEEP), Console(file=io.StringIO()))
    assert math.isfinite(found["distance"]["reference"])


def test_a_look_says_what_the_run_will_compute_in(tmp_path: Path) -> None:
    model = str(tiny.write_model(tmp_path / "model"))
    rows = str(tiny.write_rows(tmp_path / "rows.jsonl", [tiny.chat_row(f"is {n} odd?", "no") for n in range(8)]))
    config = RankConfig(model=model, data=rows, output="o", batch_size=4, precision="int8", threads=1)
    found = looking.look(config, 2, rows, 2, str(KEEP), Console(file=io.StringIO()))
    assert (found["precision"], found["run_precision"]) == ("bf16", "int8")
