from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.load import locate
from lorafit.data.rows import Row
from lorafit.errors import DataError

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(content: bytes) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content)
        return path

    return put


def read_rows(path: Path) -> list[Row]:
    return list(locate(str(path)).train().rows())


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
        (b"", "holds no rows"),
        (b"\n \n\r\n", "holds no rows"),
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
        (b'{"a": ' + b"[" * 100_000, "rows.jsonl:1 is nested too deeply"),
        (b'{\n "a": 1\n}\n', "rows.jsonl:1 is not JSON"),
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


def test_other_types_are_refused_with_what_is_read(tmp_path: Path) -> None:
    for name in ("rows.docx", "rows", "rows.gz"):
        (tmp_path / name).write_text("a,b")
        assert ".csv" in refusal(tmp_path / name) and "are read" in refusal(tmp_path / name)


def fill(directory: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n" + json.dumps({"text": str(number)}))


def test_a_directory_has_its_sides_by_their_names(tmp_path: Path) -> None:
    fill(tmp_path, "train.jsonl", "validation.jsonl", "my_test.jsonl", "README.md")
    located = locate(str(tmp_path))
    assert {"train", "valid", "test"} == set(located.sides)
    valid = located.held_out()
    assert valid is not None
    assert [next(source.rows()).origin for source in (located.train(), valid, located.unseen())] == [
        "train.jsonl:1",
        "validation.jsonl:1",
        "my_test.jsonl:1",
    ]


def test_parts_of_a_side_are_read_one_after_the_other(tmp_path: Path) -> None:
    fill(tmp_path / "data", "train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "test-00000-of-00001.jsonl")
    rows = [row.origin for row in locate(str(tmp_path)).train().rows()]
    assert rows[::2] == ["train-00000-of-00002.jsonl:1", "train-00001-of-00002.jsonl:1"]


def test_the_only_file_of_a_directory_is_what_is_meant(tmp_path: Path) -> None:
    fill(tmp_path, "rows.jsonl")
    located = locate(str(tmp_path))
    assert located.held_out() is None
    assert [row.origin for row in located.unseen().rows()] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_a_directory_in_which_it_is_not_clear_what_is_what_is_refused(tmp_path: Path) -> None:
    assert "is a directory without data files" in refusal(tmp_path)
    fill(tmp_path, "a.jsonl", "b.jsonl")
    assert "holds a.jsonl, b.jsonl, and none is called train" in refusal(tmp_path)
    fill(tmp_path, "chat_train.jsonl", "cls_train.jsonl")
    assert "several files for train: chat_train.jsonl, cls_train.jsonl" in refusal(tmp_path)


def test_a_name_on_the_hub_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing is no file here, and cannot be had from the hub"):
        locate("nobody/nothing")


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
