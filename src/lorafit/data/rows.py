"""A record of a data file and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it came from.

    record: column -> JSON value. origin: `file.jsonl:12`, lines from 1, or `file.json[11]`, items from 0 as jq counts.
    """

    record: dict[str, Any]
    origin: str
