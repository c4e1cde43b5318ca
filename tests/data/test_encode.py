"""A source as tokens: the same in memory, on disk and from the cache, with what cannot be used told or counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data import encode as encode_module
from lorafit.data.encode import Data, Reading, encode_source
from lorafit.data.formats import FormatReader
from lorafit.data.load import locate
from lorafit.data.mask import encode_all
from lorafit.data.store import Encoded, Tokens, Writer, opened
from lorafit.data.tokenise import CHECKED, Tokeniser
from lorafit.errors import DataError
from tests import tiny

TOKENIZER = tiny.tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))


def encoded(path: Path, **reading: Any) -> Data:
    return encode_source(locate(str(path)).train(), TOKENIZER, Reading(**reading), lambda rows: None)


def content(rows: Tokens) -> list[tuple[list[int], list[bool], int, str, int]]:
    return [
        (row.input_ids.tolist(), row.supervised.tolist(), row.prompt_length, row.origin, row.cut_tokens) for row in rows
    ]


def test_a_source_gives_what_its_examples_give(tmp_path: Path) -> None:
    path = tiny.write_chat(tmp_path / "rows.jsonl", 600)
    reader = FormatReader()
    examples = [reader.read(row) for row in locate(str(path)).train().rows()]
    data = encoded(path)
    assert content(encode_all(examples, TOKENIZER, 2048).encoded) == content(data.set.encoded)
    assert (data.format, data.set.rows, data.bad_rows, data.system) == ("messages", 600, 0, None)
    assert list(range(600)) == data.set.encoded.fact("row").tolist()


def test_a_large_source_is_tokenised_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.write_chat(tmp_path / "rows.jsonl", 300)
    in_memory = encoded(path)
    monkeypatch.setattr(encode_module, "LARGE_BYTES", 0)
    on_disk = encoded(path)
    assert content(in_memory.set.encoded) == content(on_disk.set.encoded)
    assert (in_memory.records == on_disk.records).all()

    def never(*given: Any) -> Any:
        raise AssertionError("it was kept")

    monkeypatch.setattr(FormatReader, "read", never)
    assert content(encoded(path).set.encoded) == content(in_memory.set.encoded)
    with pytest.raises(AssertionError, match="it was kept"):
        encoded(path, seq_len=40)
    path.write_text(path.read_text() + "\n" + json.dumps(tiny.chat_row("new", "row")))
    with pytest.raises(AssertionError, match="it was kept"):
        encoded(path)


def test_what_was_left_unfinished_is_never_taken_for_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "LARGE_BYTES", 0)
    path = tiny.write_rows(tmp_path / "rows.jsonl", [tiny.chat_row("a", "b"), {"messages": []}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: messages is an empty list"):
        encoded(path)
    assert not list((tmp_path / "cache").rglob("facts.json"))


def test_rows_that_cannot_be_used_stop_or_are_counted_with_their_lines(tmp_path: Path) -> None:
    good = tiny.chat_row("a", "one")
    rows = [good, {"messages": []}, good, tiny.chat_row("b", "tw<|im_end|>o"), tiny.chat_row("c" * 90, "x"), {"x": 1}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        encoded(path)
    data = encoded(path, skip_bad=True, seq_len=60)
    assert (data.set.rows, data.set.pieces, data.bad_rows) == (2, 2, 4)
    assert sorted(line.split()[0].rstrip(":") for line in data.bad) == [
        "rows.jsonl:2",
        "rows.jsonl:4",
        "rows.jsonl:5",
        "rows.jsonl:6",
    ]
    assert any("4 rows cannot be used and are left out" in line for line in data.remarks())
    assert any("1 rows are equal to an earlier one" in line for line in data.remarks())


def test_a_file_without_a_row_that_can_be_used_is_refused(tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": []}])
    with pytest.raises(DataError, match=r"not one row can be used; the first: .*rows\.jsonl:1"):
        encoded(path, skip_bad=True)


def test_held_out_records_take_all_their_pieces_with_them(tmp_path: Path) -> None:
    rows = [{"text": f"{number} " + "word " * 30} for number in range(20)] + [{"text": "0 " + "word " * 30}]
    data = encoded(tiny.write_rows(tmp_path / "rows.jsonl", rows), seq_len=50)
    held = data.held_out(0.2, seed=3)
    assert held.sum() == 4 and held[0] == held[20]
    inside, outside = data.part(held), data.part(~held)
    assert inside.rows + outside.rows == 21
    assert inside.pieces + outside.pieces == data.set.pieces > 21
    assert {row.row for row in inside.encoded} == set(np.flatnonzero(held).tolist())


def test_the_system_message_that_all_rows_share_is_known(tmp_path: Path) -> None:
    def rows(*systems: str) -> list[Any]:
        chats = [tiny.chat_row("a", str(number)) for number, _ in enumerate(systems)]
        for chat, system in zip(chats, systems, strict=True):
            chat["messages"].insert(0, {"role": "system", "content": system})
        return chats

    assert encoded(tiny.write_rows(tmp_path / "same.jsonl", rows("s", "s", "s"))).system == "s"
    assert encoded(tiny.write_rows(tmp_path / "other.jsonl", rows("s", "t"))).system is None


pieces = st.lists(
    st.tuples(st.integers(1, 20), st.integers(0, 19), st.text(max_size=8), st.integers(0, 9)), min_size=1, max_size=30
)


@given(pieces)
def test_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, given: list[tuple[int, int, str, int]]
) -> None:
    rows = [
        Encoded(np.arange(length, dtype=np.int32), np.arange(length) > first, first, origin, cut, number)
        for number, (length, first, origin, cut) in enumerate(given)
    ]
    directory = tmp_path_factory.mktemp("store")
    for writer in (Writer(), Writer(directory)):
        for row in rows:
            writer.add(row)
        tokens = writer.finish({"x": 1})
        assert content(Tokens(*_arrays(tokens))) == [
            (row.input_ids.tolist(), row.supervised.tolist(), row.prompt_length, row.origin, row.cut_tokens)
            for row in rows
        ]
        assert [len(row.input_ids) for row in rows] == tokens.lengths.tolist()
        odd = np.arange(len(rows)) % 2 == 1
        assert content(tokens.part(odd)) == content(tokens)[1::2]
    assert opened(directory)[1] == {"x": 1}


def _arrays(tokens: Tokens) -> tuple[Any, Any, Any]:
    return tokens._cells, tokens._all, tokens._origins


@given(st.lists(st.text(alphabet="ab \n<|im_start|>é", max_size=20), min_size=CHECKED, max_size=CHECKED + 40))
def test_the_end_of_a_prompt_tells_as_much_as_all_of_it(parts: list[str]) -> None:
    tokeniser, slow = Tokeniser(TOKENIZER), Tokeniser(TOKENIZER)
    slow._ends_suffice = False
    for part in parts:
        prompt = f"<|im_start|>user\n{part}<|im_end|>\n<|im_start|>assistant\n"
        (text,) = tokeniser.whole([prompt + part + "<|im_end|>"])
        assert slow.prompt_tokens(text, prompt) == tokeniser.prompt_tokens(text, prompt)
    assert tokeniser._ends_suffice
