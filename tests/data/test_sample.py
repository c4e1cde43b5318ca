"""Some rows of a source in the place of all of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lorafit.data import sample as sample_module
from lorafit.data.load import locate
from lorafit.data.sample import ROWS, sample
from lorafit.errors import DataError
from tests import tiny

COUNT = 4000


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows in the order of their numbers, the later the longer, in a file that is not read whole."""
    monkeypatch.setattr(sample_module, "SMALL_BYTES", 1000)
    monkeypatch.setattr(sample_module, "PIECE_BYTES", 2000)
    return tiny.write_rows(tmp_path / "rows.jsonl", [{"n": n, "text": "word " * (1 + n // 100)} for n in range(COUNT)])


def test_a_small_source_is_read_whole_and_its_rows_are_counted(tmp_path: Path) -> None:
    path = tiny.write_chat(tmp_path / "rows.jsonl", 30)
    found = sample(locate(str(path)).train())
    assert [row.record for row in found.rows] == [json.loads(line) for line in path.read_text().splitlines()]
    assert (found.total, found.counted, found.first_only) == (30, True, False)


def test_of_many_rows_some_are_taken_that_lie_evenly(tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"n": n, "text": "a"} for n in range(5 * ROWS)])
    found = sample(locate(str(path)).train())
    taken = [row.record["n"] for row in found.rows]
    assert (found.total, len(taken), taken[0], taken[-1]) == (5 * ROWS, ROWS, 0, 5 * ROWS - 1)
    assert {b - a for a, b in itertools.pairwise(taken)} == {5, 6}


def test_long_rows_are_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "CHARS", 1000)
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "a" * 99} for _ in range(50)])
    found = sample(locate(str(path)).train())
    assert (found.total, len(found.rows)) == (50, 10)


def test_a_large_file_of_lines_is_seen_in_all_its_parts(large: Path) -> None:
    found = sample(locate(str(large)).train())
    taken = [row.record["n"] for row in found.rows]
    assert not found.counted and not found.first_only
    assert taken == sorted(taken) and min(taken) < COUNT / 8 and max(taken) > COUNT * 7 / 8
    assert found.total == pytest.approx(COUNT, rel=0.1)


def test_what_is_not_lines_is_read_from_its_beginning_for_a_while(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_module, "SECONDS", 0.0)
    array = tmp_path / "array.jsonl"
    array.write_text(json.dumps([json.loads(line) for line in large.read_text().splitlines()]))
    found = sample(locate(str(array)).train())
    assert found.first_only and found.total is None and found.rows[0].record["n"] == 0
    monkeypatch.setattr(sample_module, "SECONDS", 60.0)
    found = sample(locate(str(array)).train())
    assert (found.total, found.counted, found.first_only) == (COUNT, True, False)


def test_lines_longer_than_a_piece_are_read_from_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "SMALL_BYTES", 1000)
    monkeypatch.setattr(sample_module, "PIECE_BYTES", 100)
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": "a" * 5000} for _ in range(9)])
    assert sample(locate(str(path)).train()).total == 9


def test_a_line_that_is_no_row_is_named_by_its_place(large: Path) -> None:
    lines = large.read_text().splitlines()
    lines[0] = "{broken"
    large.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, near byte 0 is not JSON"):
        sample(locate(str(large)).train())


def test_how_many_rows_parquet_files_have_is_read_from_their_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_module, "SMALL_BYTES", 1000)
    monkeypatch.setattr(sample_module, "SECONDS", 0.0)
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{n} {n * n}" for n in range(COUNT)]}), path)
    found = sample(locate(str(path)).train())
    assert (found.total, found.counted, found.first_only) == (COUNT, True, True)
    assert len(found.rows) < COUNT
