"""Bytes -> lines and JSON values with where they stand; every fault of encoding and of JSON as one sentence."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from lorafit.errors import DataError

SHOWN_CHARS = 60
CHUNK_BYTES = 1 << 18
MARKS = {  # those of UTF-32 begin like those of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def encoding_of(start: bytes) -> tuple[str, int]:
    """(codec, bytes of its mark) by the first four bytes of a text. Without a mark, zeros tell UTF-16 and UTF-32."""
    for mark, name in MARKS.items():
        if start.startswith(mark):
            return name, len(mark)
    if len(start) == 4 and start.count(0) == 3:
        return ("utf-32-le" if start[0] else "utf-32-be"), 0
    if len(start) > 1 and start[:2].count(0) == 1:
        return ("utf-16-le" if start[0] else "utf-16-be"), 0
    return "utf-8", 0


def numbered_lines(file: BufferedReader, name: str) -> Iterator[tuple[int, str]]:
    """Lines from 1 with their ends, split at LF alone: U+2028 may stand inside a string. Raises DataError."""
    encoding, mark = encoding_of(file.peek(4)[:4])
    file.read(mark)
    if encoding != "utf-8":
        yield from enumerate(_wide_lines(file, name, encoding), start=1)
        return
    for number, line in enumerate(file, start=1):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            bad = line[error.start : error.start + 1].hex()
            where = f"byte 0x{bad} at column {error.start + 1}"
            raise DataError(f"{name}:{number} is not UTF-8: {where}", "Save the file as UTF-8") from None


def _wide_lines(file: BufferedReader, name: str, encoding: str) -> Iterator[str]:
    parts: list[str] = []
    for text in _decoded(file, name, encoding):
        first, *rest = text.split("\n")
        parts.append(first)
        for line in rest:
            yield "".join(parts) + "\n"
            parts = [line]
    if any(parts):
        yield "".join(parts)


def _decoded(file: BufferedReader, name: str, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    read = 0
    while True:
        chunk = file.read(CHUNK_BYTES)
        try:
            yield decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            at = read + error.start
            raise DataError(f"{name} is not {encoding.upper()} at byte {at}", "Save the file as UTF-8") from None
        if not chunk:
            return
        read += len(chunk)


# --- JSON -------------------------------------------------------------------------------------------------------------


def parse(text: str, origin: str) -> dict[str, Any]:
    """One text as an object. Raises DataError with the origin and what the parser said."""
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise _too_deep(origin, text) from None
    except ValueError as error:  # JSONDecodeError, a number of thousands of digits, or one of the two hooks
        raise DataError(f"{origin} is not JSON: {_reason(error)}: {shown(text)}", "Correct the line") from None
    if not isinstance(value, dict):
        names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
        kind = names.get(type(value), "a number")
        raise DataError(f"{origin} is {kind}, not an object: {shown(text)}", 'Write {"column": value, ...}')
    if "\\u" in text:
        _refuse_surrogates(value, origin)
    return value


def _too_deep(origin: str, text: str) -> DataError:
    return DataError(f"{origin} is nested too deeply: {shown(text)}", "Write flat objects")


def _reason(error: ValueError) -> str:
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Python would keep the last of two equal keys and drop the other without a word."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return record


def _refuse_surrogates(value: Any, origin: str) -> None:
    r"""Half of a surrogate pair, as in "\ud83d", is no character: no tokenizer can read it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{origin} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character",
            "Write the whole character, as UTF-8 or as both halves",
        ) from None


def shown(text: str) -> str:
    """The beginning of a text, quoted, for a sentence."""
    return repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "...")


DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique_keys)
# A fault this near to the end of what was read may only be that the rest is missing. The longest is a \u0000 escape.
NEAR_END = 16
SPACE = " \t\r\n"


class JSONTexts:
    """JSON values that follow one another in a file, with no more of it in memory than the largest of them needs."""

    def __init__(self, file: BufferedReader, name: str) -> None:
        encoding, mark = encoding_of(file.peek(4)[:4])
        file.read(mark)
        self._more = _decoded(file, name, encoding)
        self._name = name
        self._text, self._at = "", 0
        self._lines = 1  # lines up to the beginning of _text, from 1

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(1):
                return ""

    def items(self) -> Iterator[Any]:
        """The items of an array, up to the end of the file. Raises DataError."""
        self._take("[")
        if self.peek() == "]":
            self._at += 1
        else:
            yield self._value()
            while self.peek() == ",":
                self._at += 1
                yield self._value()
            self._take("]")
        if self.peek():
            raise self._fault("more follows the end of the array")

    def values(self) -> Iterator[Any]:
        """Values one after the other, up to the end of the file. Raises DataError."""
        while self.peek():
            yield self._value()

    def _take(self, expected: str) -> None:
        found = self.peek()
        if found != expected:
            raise self._fault(f"{expected!r} is missing" if found else "the file ends before its array does")
        self._at += 1

    def _value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                fault = self._fault(error.msg, error.pos)
                unfinished = error.msg.startswith("Unterminated") or error.pos + NEAR_END > len(self._text)
                # As much again, so that a large value is not gone through again and again.
                if not unfinished or not self._read(len(self._text) - self._at):
                    raise fault from None
            except RecursionError:
                raise _too_deep(self._place(self._at), self._text[self._at :]) from None
            except ValueError as error:
                raise self._fault(str(error)) from None
        if self._text.find("\\u", self._at, end) >= 0:
            _refuse_surrogates(value, self._place(self._at))
        self._at = end
        return value

    def _read(self, size: int) -> bool:
        """Read at least `size` characters more, and let go of those before the current place."""
        parts = [self._text[self._at :]]
        read = 0
        for text in self._more:
            parts.append(text)
            read += len(text)
            if read >= size:
                break
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = "".join(parts), 0
        return read > 0

    def _place(self, at: int) -> str:
        return f"{self._name}:{self._lines + self._text.count(chr(10), 0, at)}"

    def _fault(self, what: str, at: int | None = None) -> DataError:
        at = self._at if at is None else at
        return DataError(f"{self._place(at)} is not JSON: {what}: {shown(self._text[self._at :])}", "Correct the file")
