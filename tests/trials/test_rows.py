"""Rows of many runs: split once, the same for all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafit.config import CompareConfig, RankConfig
from lorafit.errors import ConfigError, DataError
from lorafit.trials.rows import MOST_VALID, PART_CHARS, Rows, split_in_three, split_in_two
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
    other = two(write(tmp_path / "data.jsonl", 0, 100), tmp_path / "other", seed=1)
    assert set(texts(other, "valid")) != set(texts(found, "valid"))


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


@pytest.mark.parametrize(("more", "column"), [({}, "text"), ({"rename": {"body": "text"}}, "body")])
def test_a_few_long_texts_are_cut_at_ends_of_lines_whatever_else_a_row_has(
    more: dict[str, Any], column: str, tmp_path: Path
) -> None:
    text = "".join(f"line {n} of a long text\n" for n in range(400)) + 2 * PART_CHARS * "\n" + "its end\n"
    rows = [{"title": f"no. {n}", column: text.replace("line", f"line {n}")} for n in range(3)]
    data = str(tiny.write_rows(tmp_path / "texts.jsonl", rows))
    found = two(data, tmp_path, **more)
    parts = [json.loads(own) for side in found.counts for own in Path(found.path(side)).read_text().splitlines()]
    assert sum(found.counts.values()) == len(parts) > 20 and all(own[column].strip() for own in parts)
    for row in rows:
        own = sorted((own[column] for own in parts if own["title"] == row["title"]), key=row[column].index)
        assert "".join(own) == row[column]


def test_running_text_is_cut_without_blank_parts(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {n}\n" for n in range(900)) + 3000 * "\n" + "the end\n")
    found = two(str(path), tmp_path)
    parts = [
        json.loads(own)["text"] for side in found.counts for own in Path(found.path(side)).read_text().splitlines()
    ]
    assert len(parts) > 5 and all(own.strip() for own in parts)


def test_a_label_beside_a_reply_that_no_other_row_has_keeps_no_row_from_being_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"what is {n}?", "completion": f"it is {n}", "label": f"id{n}"} for n in range(50)]
    assert two(str(tiny.write_rows(tmp_path / "rows.jsonl", rows)), tmp_path).counts == {"train": 40, "valid": 10}


def test_labels_that_each_have_one_row_leave_none_to_judge_by(tmp_path: Path) -> None:
    rows = [{"text": f"what is {n}?", "label": f"id{n}"} for n in range(50)]
    with pytest.raises(DataError, match=r"the only ones with their label\. Give rows to judge by with --eval FILE"):
        two(str(tiny.write_rows(tmp_path / "rows.jsonl", rows)), tmp_path)


def test_what_is_named_and_neither_split_nor_cut_is_as_given(tmp_path: Path) -> None:
    data, other = write(tmp_path / "data.jsonl", 0, 30), write(tmp_path / "other.jsonl", 30, 20)
    assert two(data, tmp_path, eval=other).as_given
    assert not two(data, tmp_path).as_given and not two(data, tmp_path, eval="20%").as_given
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {n}\n" for n in range(900)))
    assert not two(str(book), tmp_path, eval=str(book)).as_given
