"""The report counts what was put into the data on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorafit.data.encode import Reading, encode_source
from lorafit.data.load import locate
from lorafit.data.preflight import Report, inspect, needs_look
from lorafit.data.show import page, print_report
from tests import tiny

TOKENIZER = tiny.tokenizer()
LONG = "The quick brown fox jumps over the lazy dog and then it sleeps all day long in the sun"


def report(directory: Path, rows: list[Any], against: list[Any] | None = None, **reading: Any) -> Report:
    def data(name: str, rows: list[Any]) -> Any:
        source = locate(str(tiny.write_rows(directory / name, rows))).train()
        return encode_source(source, TOKENIZER, Reading(**reading), lambda rows: None)

    other = None if against is None else data("other.jsonl", against)
    return inspect("rows.jsonl", data("rows.jsonl", rows), TOKENIZER, other)


@pytest.fixture
def full(tmp_path: Path) -> Report:
    rows = [tiny.chat_row(f"{LONG} {number}" * 2, f"It sleeps {number}") for number in range(5)]
    rows = [{**row, "label": "a"} for row in rows] + [{**tiny.chat_row("What?", "No\x07thing."), "label": "b"}]
    rows += [rows[5], {**tiny.chat_row(f"Quite another thing that nobody said before {LONG[::-1]}", "x"), "label": "a"}]
    return report(tmp_path, [*rows, {"messages": []}], [rows[5], tiny.chat_row("new", "row")], skip_bad=True)


def test_rows_lengths_labels_and_faults_are_counted(full: Report) -> None:
    assert (full.rows, full.bad_rows, full.format) == (8, 1, "messages")
    assert sum(count for _, count in full.lengths) == full.pieces == 8
    assert full.labels == {"a": 6, "b": 2}
    assert full.unused_columns == {"label": 8}
    assert (full.odd_rows, full.odd[0]) == (2, "rows.jsonl:6 holds U+0007")
    assert "rows.jsonl:9: messages is an empty list" in full.bad[0]
    assert 0 < full.supervised_tokens < full.tokens


def test_equal_and_nearly_equal_rows_and_leaks_are_found(full: Report) -> None:
    assert (full.equal.count, full.equal.first) == (1, (("rows.jsonl:7", "rows.jsonl:6", 1.0),))
    assert full.near.count == 4
    assert all(first == "rows.jsonl:1" for _, first, _ in full.near.first)
    assert full.leaks is not None and full.leaks.count == 2
    assert full.leaks.first[0] == ("rows.jsonl:6", "other.jsonl:1", 1.0)


def test_what_all_rows_begin_with_is_shown(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "system", "content": LONG}, *tiny.chat_row(f"{n}?", f"{n}!")["messages"]]}
        for n in range(4)
    ]
    found = report(tmp_path, rows)
    assert found.prefix_text == f"<|im_start|>system\n{LONG}<|im_end|>\n<|im_start|>user\n"
    assert found.near.count == 0
    assert found.shared_share == pytest.approx(found.prefix * 3 / found.tokens)


def test_samples_show_what_has_a_loss(tmp_path: Path) -> None:
    ((origin, spans), *_) = report(tmp_path, [tiny.chat_row("a", "one"), tiny.chat_row("b", "two")]).samples
    assert origin == "rows.jsonl:1"
    assert [(span.text, span.supervised) for span in spans] == [
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        ("one<|im_end|>", True),
        ("\n", False),
    ]


def test_what_is_cut_is_told(tmp_path: Path) -> None:
    found = report(tmp_path, [tiny.chat_row("a", "x" * 100), tiny.chat_row("a", "y")], seq_len=60)
    assert found.cut_rows == 1
    assert any("1 rows lose" in line for line in needs_look(found))


def test_the_page_and_the_terminal_show_it_all_and_quote_what_is_no_markup(full: Report, tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    print_report(full, console)
    printed = console.export_text()
    for shown in ("rows equal to an earlier one", "rows.jsonl:9: messages is an empty list", "U+0007", "up to 16"):
        assert shown in printed
    written = page(full, "a model <b>")
    assert "a model &lt;b&gt;" in written
    assert "&lt;|im_start|&gt;" in written and "<mark>" in written
    assert "<script" not in written and "http" not in written
