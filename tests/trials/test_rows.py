"""Rows of many runs: split once, the same for all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafit.config import CompareConfig, RankConfig
from lorafit.errors import ConfigError
from lorafit.trials.rows import MOST_VALID, Rows, split_in_three, split_in_two
from tests import tiny


def write(path: Path, first: int, count: int) -> str:
    return str(
        tiny.write_rows(path, [tiny.chat_row(f"what is {n}", f"it is {n}") for n in range(first, first + count)])
    )


def texts(rows: Rows, side: str) -> list[str]:
    return [json.loads(line)["messages"][0]["content"] for line in Path(rows.path(side)).read_text().splitlines()]


def two(data: str, directory: Path, **more: Any) -> Rows:
    return split_in_two(RankConfig(model="m", data=data, output="o", **more), directory / "rows")


def test_two_sides_hold_every_row_once_and_a_fifth_is_judged_by(tmp_path: Path) -> None:
    found = two(write(tmp_path / "data.jsonl", 0, 100), tmp_path)
    assert found.counts == {"train": 80, "valid": 20}
    assert sorted(texts(found, "train") + texts(found, "valid")) == sorted(f"what is {n}" for n in range(100))
    again = two(write(tmp_path / "data.jsonl", 0, 100), tmp_path)
    assert texts(again, "valid") == texts(found, "valid")
    other = two(write(tmp_path / "data.jsonl", 0, 100), tmp_path, seed=1)
    assert texts(other, "valid") != texts(again, "train")[:20]


def test_a_row_of_a_side_is_found_again_in_what_was_given(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", 0, 30)
    found = two(data, tmp_path)
    for side, count in found.counts.items():
        for number, text in enumerate(texts(found, side), 1):
            name, line = found.given(side, f"{side}.jsonl:{number}").rsplit(":", 1)
            assert (Path(name).name, f"what is {int(line) - 1}") == ("data.jsonl", text)
        assert len(found.origins[side]) == count


def test_no_more_rows_are_judged_by_than_tell_something_unless_they_are_asked_for(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", 0, 2 * 5 * MOST_VALID)
    assert two(data, tmp_path).counts["valid"] == MOST_VALID
    assert two(data, tmp_path, eval="30%").counts["valid"] == 0.3 * 10 * MOST_VALID


def test_rows_of_their_own_are_judged_by_whole_and_those_among_the_training_rows_are_told(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", 0, 60)
    found = two(data, tmp_path, eval=write(tmp_path / "other.jsonl", 50, 20))
    assert found.counts == {"train": 60, "valid": 20}
    assert any("10 of 20 valid rows are among the training rows" in note for note in found.notes)
    assert any("there are 20 valid rows" in note for note in found.notes)


def test_a_directory_with_a_valid_file_is_split_already(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", 0, 30)
    write(tmp_path / "data" / "valid.jsonl", 30, 8)
    found = two(str(tmp_path / "data"), tmp_path)
    assert found.counts == {"train": 30, "valid": 8}
    three = split_in_three(CompareConfig(model="m", data=str(tmp_path / "data"), output="o"), tmp_path / "three")
    assert three.counts == {"train": 24, "search": 4, "valid": 8, "test": 6}


def test_a_share_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a share"):
        two(write(tmp_path / "data.jsonl", 0, 30), tmp_path, eval="0%")
