"""Records: what was done is not done again, unless it may go better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafit.trials.records import record


def test_work_is_done_once_and_says_how_long_it_took(tmp_path: Path) -> None:
    done = list[Path]()

    def work(log: Path) -> dict[str, Any]:
        done.append(log)
        return {"loss": 0.25}

    first = record(tmp_path, "one/lr-0.1", work)
    assert first == record(tmp_path, "one/lr-0.1", work, together=True)
    assert first["loss"] == 0.25 and first["wall_s"] >= 0 and first["together"] is False
    assert done == [tmp_path / "one" / "lr-0.1.log"]


def test_what_may_go_better_another_time_is_not_kept(tmp_path: Path) -> None:
    tried = list[int]()

    def work(log: Path) -> dict[str, Any]:
        tried.append(len(tried))
        return {"refused": "no memory", "again": True}

    record(tmp_path, "one", work)
    record(tmp_path, "one", work)
    assert tried == [0, 1]
