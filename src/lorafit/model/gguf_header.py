"""The header of a GGUF file: metadata and where each tensor lies, without reading the tensors.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
The package gguf reads the same, but builds an object for each of 100,000 token strings; here an array stays
unread until it is asked for.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lorafit.errors import ModelError
from lorafit.model.lfs import refuse_pointer

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # bytes; `general.alignment` overrides it
MAX_DIMS = 8
STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # type id -> struct


class _CorruptError(Exception):
    """The bytes contradict the format; turned into a ModelError where the path is known."""


@dataclass(frozen=True)
class Array:
    """An array in the metadata, not read yet. offset: of its first element, in bytes from the start of the file."""

    element_type: int
    count: int
    offset: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. shape: in torch's order, slowest first. offset: bytes from the start of the file. type: as `Q4_1`."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """metadata: key -> number, text, or Array. tensors: by name, in the file's order."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it, as `llama`."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `ARCHITECTURE.key`, or `default`. Arrays are read into lists."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        return self.read(value) if isinstance(value, Array) else value

    def array(self, key: str) -> list[Any]:
        """The elements of the array at the full `key`; empty where there is none. Raises ModelError if it is none."""
        value = self.metadata.get(key)
        if value is None:
            return []
        if not isinstance(value, Array):
            raise ModelError(f"{self.path}: {key} should be an array and is {value!r}", "Convert the model again")
        return self.read(value)

    def read(self, array: Array) -> list[Any]:
        """The elements of an array that stayed unread."""
        with _mapped(self.path) as blob, _explained(self.path):
            return _read_elements(_Cursor(blob, array.offset), array.element_type, array.count)


class _Cursor:
    """A position in the file that never leaves it."""

    def __init__(self, blob: mmap.mmap, position: int = 0) -> None:
        self.blob, self.position, self.size = blob, position, len(blob)

    def skip(self, count: int) -> int:
        """Move on by `count` bytes and return where they began."""
        start, self.position = self.position, self.position + count
        if self.position > self.size:
            raise _CorruptError(f"its header runs past the end of the file at byte {self.size:,}")
        return start

    def take(self, layout: str) -> tuple[Any, ...]:
        """Unpack little-endian values of a struct layout."""
        layout = "<" + layout
        return struct.unpack_from(layout, self.blob, self.skip(struct.calcsize(layout)))

    def string(self) -> str:
        (length,) = self.take("Q")
        start = self.skip(length)
        return self.blob[start : start + length].decode()


def read_header(path: Path) -> Header:
    """Read metadata and tensor table. Raises ModelError if the file is no GGUF, damaged, cut short or one of many."""
    with _mapped(path) as blob, _explained(path):
        cursor = _Cursor(blob)
        version, tensor_count, pair_count = _read_preamble(path, cursor)
        metadata = _read_metadata(cursor, pair_count)
        if not isinstance(metadata.get("general.architecture"), str):
            raise _CorruptError("it names no general.architecture")
        tensors = _read_tensor_table(cursor, tensor_count, metadata.get("general.alignment", DEFAULT_ALIGNMENT))
        _refuse_cut(path, tensors, cursor.size)
    if metadata.get("split.count", 1) > 1:
        raise ModelError(
            f"{path} is one of {metadata['split.count']} parts of a split GGUF",
            "Join them with `llama-gguf-split --merge FIRST_PART WHOLE.gguf`",
        )
    return Header(path, version, metadata, tensors)


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    try:
        with open(path, "rb") as file:
            refuse_pointer(path, file.read(64))
            if path.stat().st_size == 0:
                raise ModelError(f"{path} is empty", "Download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                yield blob
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "Check the path and its permissions") from error


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (_CorruptError, struct.error, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is a damaged GGUF file: {error}", "Download or convert it again") from error


def _read_preamble(path: Path, cursor: _Cursor) -> tuple[int, int, int]:
    magic = cursor.blob[:4]
    if magic != MAGIC:
        raise ModelError(
            f"{path} is not a GGUF file: it starts with {magic!r} instead of {MAGIC!r}", "Give a .gguf file"
        )
    cursor.skip(4)
    (version,) = cursor.take("I")
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        what = "written for a big-endian machine" if big_endian else f"of version {version}"
        raise ModelError(
            f"{path} is a GGUF file {what}; read here are versions 2 and 3, little-endian", "Convert it again"
        )
    tensor_count, pair_count = cursor.take("QQ")
    return version, tensor_count, pair_count


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            raise _CorruptError(f"the key {key} stands in it twice")
        (value_type,) = cursor.take("I")
        metadata[key] = _read_value(cursor, value_type)
    return metadata


def _read_value(cursor: _Cursor, value_type: int) -> Any:
    if value_type in SCALARS:
        return cursor.take(SCALARS[value_type])[0]
    if value_type == STRING:
        return cursor.string()
    if value_type == ARRAY:
        element_type, count = cursor.take("IQ")
        array = Array(element_type, count, cursor.position)
        _skip_elements(cursor, element_type, count)
        return array
    raise _CorruptError(f"a value has the unknown type {value_type}")


def _skip_elements(cursor: _Cursor, element_type: int, count: int) -> None:
    if element_type in SCALARS:
        cursor.skip(count * struct.calcsize("<" + SCALARS[element_type]))
    elif element_type == STRING:
        for _ in range(count):
            cursor.skip(cursor.take("Q")[0])
    else:
        raise _CorruptError(f"an array has elements of the unknown type {element_type}")


def _read_elements(cursor: _Cursor, element_type: int, count: int) -> list[Any]:
    if element_type == STRING:
        return [cursor.string() for _ in range(count)]
    return list(cursor.take(f"{count}{SCALARS[element_type]}"))


def _read_tensor_table(cursor: _Cursor, count: int, alignment: Any) -> dict[str, TensorInfo]:
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise _CorruptError(f"general.alignment is {alignment!r}, which is no multiple of 8")
    entries = [_read_tensor_entry(cursor) for _ in range(count)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise _CorruptError(f"the tensor {name} stands in it twice")
        if offset % alignment:
            raise _CorruptError(f"the tensor {name} is not aligned to {alignment} bytes")
        tensors[name] = TensorInfo(name, shape, kind.name, data_start + offset, _bytes_of(name, shape, kind))
    return tensors


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.string()
    (dims,) = cursor.take("I")
    if dims > MAX_DIMS:
        raise _CorruptError(f"the tensor {name} has {dims} dimensions")
    shape = tuple(reversed(cursor.take(f"{dims}Q")))
    type_id, offset = cursor.take("IQ")
    try:
        return name, shape, GGMLQuantizationType(type_id), offset
    except ValueError as error:
        raise _CorruptError(f"the tensor {name} has the unknown type {type_id}") from error


def _bytes_of(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or 0 in shape or shape[-1] % block:
        raise _CorruptError(f"the tensor {name} of shape {shape} does not divide into {kind.name} blocks of {block}")
    return prod(shape) // block * block_bytes


def _refuse_cut(path: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    needed = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=0)
    if needed > size:
        raise ModelError(
            f"{path} is cut short: it has {size:,} bytes and its header describes {needed:,}", "Download it again"
        )
