from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafit.data.encode import Reading, encode_rows
from lorafit.data.labels import MOST_OF_SEVERAL, Names, members, names_of, task_of
from lorafit.data.load import locate
from lorafit.data.preflight import counts_of, spans
from lorafit.data.rows import Row
from lorafit.errors import DataError
from tests import tiny

ROWS = [Row({"text": text, "label": label}, f"f:{n}") for n, (text, label) in enumerate([("ab", "x"), ("cde", "w")])]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "a", "label": "b"}, True),
        ({"sentence": "a", "label": 0}, True),
        ({"text": "a", "labels": 0}, True),
        ({"text": "a"}, False),
        (tiny.chat_row("a", "b"), False),
    ],
)
def test_labelled_rows_are_known_by_their_columns(record: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    source = locate(str(tiny.write_rows(tmp_path / "rows.jsonl", [record]))).train()
    assert (task_of(source, None, {}) == "classify") == expected


def test_other_columns_are_labelled_rows_once_renamed(tmp_path: Path) -> None:
    source = locate(str(tiny.write_rows(tmp_path / "rows.jsonl", [{"a": "x", "b": "y"}] * 2 + [{"a": "x", "b": "z"}])))
    rename = {"a": "text", "b": "label"}
    assert task_of(source.train(), None, rename) == "classify"
    assert names_of(source.train().rows(), None, rename, skip_bad=False).names == ("y", "z")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["spam", "ham", "spam"], ("ham", "spam")), ([10, 9, 10], ("9", "10")), (["10", "9", "x"], ("10", "9", "x"))],
)
def test_labels_are_sorted_as_numbers_where_all_are(labels: list[Any], expected: tuple[str, ...]) -> None:
    rows = [Row({"text": "a", "label": label}, f"f:{n}") for n, label in enumerate(labels)]
    assert names_of(rows, None, {}, skip_bad=False) == Names(expected)


def test_a_row_is_what_the_tokenizer_makes_of_it_and_its_label() -> None:
    fast = tiny.bert_tokenizer()
    data = encode_rows(ROWS, fast, Reading(labels=Names(("w", "x"))))
    assert [row.input_ids.tolist() for row in data.set.encoded] == [
        [*fast("ab").input_ids, 1],
        [*fast("cde").input_ids, 0],
    ]
    assert [row.supervised.tolist() for row in data.set.encoded] == [[False] * 4 + [True], [False] * 5 + [True]]
    assert (data.set.tokens, data.set.longest) == (9, 5)
    assert "each row with a label" in data.set.summary


def test_a_decoders_row_ends_with_end_of_sequence() -> None:
    fast = tiny.tokenizer()
    data = encode_rows(ROWS, fast, Reading(labels=Names(("w", "x"))))
    assert data.set.encoded[0].input_ids.tolist() == [*fast("ab", add_special_tokens=False).input_ids, 1, 1]


def test_a_row_that_is_too_long_loses_the_end_of_its_text_and_is_counted() -> None:
    fast = tiny.bert_tokenizer()
    data = encode_rows(
        [Row({"text": "abcdefgh", "label": "x"}, "f:1"), ROWS[1]], fast, Reading(labels=Names(("w", "x")), seq_len=6)
    )
    assert data.set.encoded[0].input_ids.tolist() == [*fast("abcd").input_ids, 1]
    assert data.set.encoded[0].supervised.tolist() == [False] * 6 + [True]
    assert (data.set.cut_rows, data.set.cut_tokens) == (1, 4)


def test_a_label_that_is_none_of_them_is_refused_or_counted() -> None:
    fast = tiny.bert_tokenizer()
    with pytest.raises(DataError, match="f:1 has the label 'w'"):
        encode_rows(ROWS, fast, Reading(labels=Names(("x", "y"))))
    data = encode_rows(ROWS, fast, Reading(labels=Names(("x", "y")), skip_bad=True))
    assert (data.set.rows, data.bad_rows) == (1, 1)


def test_a_labelled_row_is_shown_with_the_name_of_its_label() -> None:
    fast = tiny.bert_tokenizer()
    data = encode_rows(ROWS, fast, Reading(labels=Names(("w", "x"))))
    shown = spans(data.set.encoded[0], fast, data)
    assert [(span.text.strip(), span.supervised) for span in shown][1] == ("x", True)
    assert "ab" in shown[0].text


def test_lists_of_labels_are_sets_of_them() -> None:
    fast = tiny.bert_tokenizer()
    lists: list[Any] = [["x", "w"], [], "y", ["w", "w"]]
    rows = [Row({"text": "ab", "label": label}, f"f:{n}") for n, label in enumerate(lists)]
    found = names_of(rows, None, {}, skip_bad=False)
    assert found == Names(("w", "x", "y"), several=True)
    data = encode_rows(rows, fast, Reading(labels=found))
    sets = [int(row.input_ids[-1]) for row in data.set.encoded]
    assert [members(one, found) for one in sets] == [["w", "x"], [], ["y"], ["w"]]
    assert counts_of(data) == {"w": 2, "x": 1, "y": 1}
    assert spans(data.set.encoded[0], fast, data)[1].text == " w, x"
    with pytest.raises(DataError, match="f:0 has a list of labels, and a row is to have one"):
        encode_rows(rows, fast, Reading(labels=Names(found.names)))


def test_a_set_holds_so_many_labels_and_no_more() -> None:
    fast = tiny.bert_tokenizer()
    names = [f"{n:02}x" for n in range(MOST_OF_SEVERAL)]
    rows = [Row({"text": "ab", "label": names}, "f:0")]
    found = names_of(rows, None, {}, skip_bad=False)
    data = encode_rows(rows, fast, Reading(labels=found))
    assert members(int(data.set.encoded[0].input_ids[-1]), found) == names
    with pytest.raises(DataError, match="of 31 in all; at most 30"):
        names_of([*rows, Row({"text": "c", "label": ["more"]}, "f:1")], None, {}, skip_bad=False)
