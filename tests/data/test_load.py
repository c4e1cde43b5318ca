from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.load import Row, read_rows, split
from lorafit.errors import ConfigError, DataError

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(content: bytes) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content)
        return path

    return put


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    return str(caught.value)


def test_rows_carry_file_and_line_and_blank_lines_count(write: Write) -> None:
    path = write(b'{"text": "a"}\n\n  \n{"text": "b"}')
    assert [Row({"text": "a"}, "rows.jsonl:1"), Row({"text": "b"}, "rows.jsonl:4")] == read_rows(path)


@pytest.mark.parametrize(
    "content", [b'\xef\xbb\xbf{"a": 1}\n', b'{"a": 1}\r\n', b'\r\n{"a": 1}\r\n\r\n', b' {"a": 1} ']
)
def test_byte_order_mark_and_line_ends_do_not_matter(write: Write, content: bytes) -> None:
    assert [row.record for row in read_rows(write(content))] == [{"a": 1}]


def test_unicode_line_separators_stay_inside_a_string(write: Write) -> None:
    text = "one\u2028two\u2029three\x85four"
    assert text == read_rows(write(json.dumps({"text": text}, ensure_ascii=False).encode()))[0].record["text"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is 0 bytes long"),
        (b"\n \n\r\n", "all its lines are blank"),
        (b'{"a": 1}\n{"a": }\n', """rows.jsonl:2 is not JSON: Expecting value (column 7): '{"a": }'"""),
        (b'{"a": NaN}', "rows.jsonl:1 is not JSON: NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "rows.jsonl:1 is not JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b'{"a": 1}\n[1, 2]', "rows.jsonl:2 is an array, not an object: '[1, 2]'"),
        (b'{"a": 1}\n"text"', "rows.jsonl:2 is a string, not an object"),
        (b'{"a": 1}\nnull', "rows.jsonl:2 is null, not an object"),
        (b'{"a": 1}\n{"a": "\xff"}', "rows.jsonl:2 is not UTF-8: byte 0xff at column 8"),
        (b'{"a": 1}\n{"a": "\\ud83d"}', "rows.jsonl:2 holds half of a surrogate pair"),
        (b"[" * 100_000, "rows.jsonl:1 is nested too deeply"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16, and only UTF-8 is read. Convert it: iconv -f UTF-16 -t UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "is UTF-16"),
        ('{"a": 1}'.encode("utf-16-be"), "is UTF-16"),
        ('{"a": 1}'.encode("utf-32"), "is UTF-32"),
        (b'[{"a": 1}, {"a": 2}]', "is one JSON array of 2 items, not JSON Lines"),
        (b'[\n {"a": 1}\n]\n', "is one JSON array of 1 items, not JSON Lines"),
        (b'{\n "a": 1\n}\n', "is one JSON object over several lines, not JSON Lines"),
        (b"\x1f\x8b\x08\x00", "rows.jsonl:1 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(write: Write, content: bytes, said: str) -> None:
    message = refusal(write(content))
    assert said in message
    assert len(message) < 400


def test_long_lines_are_shortened_in_the_error(write: Write) -> None:
    assert "..." in refusal(write(b'{"text": "' + b"x" * 10_000))


def test_a_missing_file_is_refused_with_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1}')
    assert "does not exist. In" in refusal(tmp_path / "trian.jsonl")
    assert "train.jsonl" in refusal(tmp_path / "trian.jsonl")
    assert "does not exist either" in refusal(tmp_path / "nowhere" / "train.jsonl")


def test_directories_and_other_types_are_refused_with_what_is_read(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)
    for name in ("rows.csv", "rows"):
        (tmp_path / name).write_text("a,b")
        assert "only .jsonl is read now" in refusal(tmp_path / name)


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / ("x" * 300 + ".jsonl"))


@given(content=st.binary(max_size=60) | st.text(alphabet='[]{}":,\\u0dn1eE-. \n\r\ufeffa', max_size=60).map(str.encode))
def test_whatever_the_bytes_are_nothing_but_a_data_error_comes_out(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    try:
        rows = read_rows(path)
    except DataError as error:
        assert str(error)
    else:
        assert rows and all(isinstance(row.record, dict) for row in rows)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    records=st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=5), ascii=st.booleans()
)
def test_every_json_object_is_read_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, object]], ascii: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "back.jsonl"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=ascii) for record in records), encoding="utf-8")
    assert records == [row.record for row in read_rows(path)]


def rows_of(values: list[int]) -> list[Row]:
    return [Row({"text": str(value)}, f"f:{line}") for line, value in enumerate(values, 1)]


@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers(0, 2**63 - 1))
def test_split_keeps_every_row_once_and_equal_records_on_one_side(values: list[int], share: float, seed: int) -> None:
    rows = rows_of(values)
    if len(set(values)) == 1:
        with pytest.raises(DataError, match="cannot be split"):
            split(rows, share, seed)
        return
    train, held = split(rows, share, seed)
    assert rows == sorted(train + held, key=lambda row: int(row.origin[2:]))
    assert train and held
    assert not {str(row.record) for row in train} & {str(row.record) for row in held}
    assert (train, held) == split(rows, share, seed)


def test_split_holds_out_the_share_and_depends_on_the_seed() -> None:
    rows = rows_of(list(range(200)))
    assert len(split(rows, 0.1, 0)[1]) == 20
    assert split(rows, 0.1, 0) != split(rows, 0.1, 1)


def test_split_is_the_same_on_every_machine() -> None:
    assert [row.record["text"] for row in split(rows_of(list(range(10))), 0.3, 7)[1]] == ["3", "6", "8"]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 10.0, float("nan")])
def test_split_refuses_a_share_that_leaves_one_side_empty(share: float) -> None:
    with pytest.raises(ConfigError, match="Give a share between 0 and 1"):
        split(rows_of([1, 2, 3]), share, 0)
