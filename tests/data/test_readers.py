"""Every type of file gives the rows that were written to it, and every fault of it one sentence."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.data import readers, text
from lorafit.data.load import locate
from lorafit.errors import DataError

RECORDS: list[dict[str, Any]] = [{"text": 'Grüße\n, "x"'}, {"text": "zwei; drei"}, {"text": "\u2028 four"}]


def read(path: Path) -> list[dict[str, Any]]:
    return [row.record for row in locate(str(path)).train().rows()]


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()


def table(records: list[dict[str, Any]], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue().encode()


def parquet(records: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue()


def arrow(records: list[dict[str, Any]], stream: bool) -> bytes:
    sink, rows = io.BytesIO(), pyarrow.Table.from_pylist(records)
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue()


FILES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.jsonl": jsonl,
    "rows.ndjson": jsonl,
    "array.json": lambda records: json.dumps(records, indent=1).encode(),
    "one_line.json": lambda records: json.dumps(records).encode(),
    "array_called.jsonl": lambda records: json.dumps(records).encode(),
    "lines_called.json": jsonl,
    "held.json": lambda records: json.dumps({"version": 1, "data": records}).encode(),
    "comma.csv": lambda records: table(records, ","),
    "semicolon.csv": lambda records: table([{**record, "id": "1"} for record in records], ";"),
    "tab.tsv": lambda records: table(records, "\t"),
    "rows.parquet": parquet,
    "file.arrow": lambda records: arrow(records, stream=False),
    "stream.arrow": lambda records: arrow(records, stream=True),
}


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", FILES)
def test_every_type_of_file_gives_back_its_rows_packed_or_not(name: str, packed: str, tmp_path: Path) -> None:
    content = FILES[name](RECORDS)
    path = tmp_path / (name + packed)
    if packed == ".gz":
        content = gzip.compress(content, mtime=0)
    if packed == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    assert [record["text"] for record in RECORDS] == [record["text"] for record in read(path)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "comma.csv", "rows.txt"])
def test_every_unicode_encoding_is_read_with_its_mark_or_without(name: str, encoding: str, tmp_path: Path) -> None:
    content = FILES[name](RECORDS) if name in FILES else b"one\ntwo Gr\xc3\xbc\xc3\x9fe\n"
    (tmp_path / name).write_bytes(content.decode().encode(encoding))
    found = read(tmp_path / name)
    expected = RECORDS if name in FILES else [{"text": "one\ntwo Grüße\n"}]
    assert expected == found


def test_origins_are_lines_where_there_are_lines_and_items_elsewhere(tmp_path: Path) -> None:
    def origins(name: str, content: bytes) -> list[str]:
        (tmp_path / name).write_bytes(content)
        return [row.origin for row in locate(str(tmp_path / name)).train().rows()]

    assert origins("a.jsonl", b'{"a": 1}\n\n{"a": 2}\n') == ["a.jsonl:1", "a.jsonl:3"]
    assert origins("a.json", b'[{"a": 1},\n {"a": 2}]') == ["a.json[0]", "a.json[1]"]
    assert origins("a.csv", b'a,b\n1,"two\nlines"\n3,4\n') == ["a.csv:2", "a.csv:4"]
    assert origins("a.parquet", parquet([{"a": 1}, {"a": 2}])) == ["a.parquet[0]", "a.parquet[1]"]


def test_an_object_that_is_a_row_itself_stays_one(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    assert read(tmp_path / "one.json") == [{"messages": [{"role": "user", "content": "a"}]}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[{"a": 1}, {"a": }]', "a.json:1 is not JSON: Expecting value"),
        ("a.json", b'[{"a": 1},\n{"a": 2}', "a.json:2 is not JSON: the file ends before its array does"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "']' is missing"),
        ("a.json", b'[{"a": 1}] x', "more follows the end of the array"),
        ("a.json", b"[1, 2]", "a.json[0] is no object: '1'"),
        ("a.json", b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("a.json", b'[{"a": NaN}]', "NaN is no JSON number"),
        ("a.json", b'[{"a": "\\ud83d"}]', "half of a surrogate pair"),
        ("a.json", b"[" * 100_000, "is nested too deeply"),
        ("a.json", b"", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv:2 has 3 cells under 2 columns: '1, 2, 3'"),
        ("a.csv", b"a,a\n1,2\n", "a.csv:1 names the column 'a' twice"),
        ("a.csv", b"a,\n1,2\n", "a.csv:1 leaves a column without a name"),
        ("a.csv", b'a,b\n1,"2\n', "a.csv:2 is no row of a table"),
        ("a.csv", b"a,b\n\xff,2\n", "a.csv:2 is not UTF-8: byte 0xff at column 1"),
        ("a.csv", b"a,b\n", "holds no rows"),
        ("a.txt", b" \n", "holds no rows"),
        ("a.jsonl", b"\xff\xfe{\x00\x00", "is not UTF-16-LE at byte"),
        ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read as Parquet"),
        ("a.arrow", b"ARROW1 and no more", "a.arrow cannot be read as Arrow"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 1000, mtime=0)[:-20], "cannot be unpacked"),
        ("a.jsonl.gz", b"{}", "cannot be unpacked"),
        ("a.jsonl.zst", b"{}", "cannot be"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert said in message
    assert len(message) < 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(
    records=st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=5),
    ascii=st.booleans(),
    indent=st.none() | st.integers(0, 2),
    chunk=st.integers(1, 40),
)
def test_a_json_array_is_read_back_however_it_is_written_and_wherever_reading_stops_for_a_while(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[dict[str, object]],
    ascii: bool,
    indent: int | None,
    chunk: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "back.json"
    path.write_text(json.dumps(records, ensure_ascii=ascii, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK_BYTES", chunk)
        assert records == read(path)


@settings(deadline=None)
@given(
    content=st.binary(max_size=60) | st.text(alphabet='[]{}":,;\\u0dn1eE-. \n\r\ufeffa\t', max_size=60).map(str.encode),
    name=st.sampled_from(["a.json", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.parquet", "a.arrow"]),
)
def test_whatever_the_bytes_are_nothing_but_a_data_error_comes_out(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz_{name}"
    path.write_bytes(content)
    try:
        rows = read(path)
    except DataError as error:
        assert str(error)
    else:
        assert rows and all(isinstance(record, dict) for record in rows)


def test_a_large_text_is_cut_at_ends_of_lines_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "TEXT_CHARS", 100)
    whole = "".join(f"line {number} of a long text\n" for number in range(40))
    (tmp_path / "a.txt").write_text(whole)
    parts = [str(record["text"]) for record in read(tmp_path / "a.txt")]
    assert len(parts) > 5
    assert all(part.endswith("\n") for part in parts)
    assert whole == "".join(parts)


def test_a_large_row_is_read_without_going_through_it_again_and_again(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * (20 << 20)}, {"text": "y"}]))
    assert [len(record["text"]) for record in read(tmp_path / "a.json")] == [20 << 20, 1]
