"""The header of a safetensors file: name, dtype and shape of each tensor, without torch.

Source: https://github.com/huggingface/safetensors#format: eight bytes of length, then JSON, then the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError
from lorafit.model.lfs import refuse_pointer

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor: dtype as the file names it (`BF16`), shape, its size in bytes, and where in the file it begins."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def read_header(path: Path) -> dict[str, Entry]:
    """Tensor name -> Entry. Raises ModelError if the file is damaged, cut short or a git-lfs pointer."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(64)
            refuse_pointer(path, prefix)
            length = int.from_bytes(prefix[:8], "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, f"it has {size:,} bytes, and its header should have {length:,}")
            file.seek(8)
            table = json.loads(file.read(length))
        entries = {name: _entry(path, name, value, 8 + length, size) for name, value in _tensors(path, table)}
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "Check the path and its permissions") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"its header is no table of tensors ({error})") from error
    return entries


def _tensors(path: Path, table: Any) -> list[tuple[str, Any]]:
    if not isinstance(table, dict):
        raise _damaged(path, "its header is no JSON object")
    return [(name, value) for name, value in table.items() if name != "__metadata__"]


def _entry(path: Path, name: str, value: Any, data_start: int, file_bytes: int) -> Entry:
    start, end = value["data_offsets"]
    data_bytes = file_bytes - data_start
    shape = tuple(int(size) for size in value["shape"])
    if end > data_bytes:
        raise ModelError(
            f"{path} is cut short: {name} should end at byte {end:,} of the data, and there are {data_bytes:,}",
            "Download it again",
        )
    if start > end or prod(shape) * DTYPE_BITS[value["dtype"]] != (end - start) * 8:
        raise _damaged(path, f"{name} of shape {shape} and dtype {value['dtype']} does not take {end - start:,} bytes")
    return Entry(value["dtype"], shape, end - start, data_start + start)


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is a damaged safetensors file: {why}", "Download it again")
