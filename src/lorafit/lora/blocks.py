"""Which transformer blocks `layers` means. Without torch, so that a plan can ask too."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorafit.errors import TargetError


def wanted_blocks(layers: str | Sequence[int], count: int, longest: int) -> set[int]:
    """Block numbers below count. layers: "last:K", "first:K", "0-3,7" or numbers. longest: blocks of the longest stack.

    Raises TargetError if layers can't be read or goes beyond the longest stack.
    """
    if isinstance(layers, str):
        ends = re.fullmatch(r"\s*(first|last):(\d+)\s*", layers)
        if ends:
            k = int(ends[2])
            if not 1 <= k <= longest:
                raise TargetError(
                    f"layers {layers!r} is out of range: the model has {longest} blocks", f"Choose from 1 to {longest}"
                )
            return set(range(min(k, count))) if ends[1] == "first" else set(range(max(count - k, 0), count))
        numbers = _ranges(layers)
    else:
        numbers = list(layers)
    beyond = [n for n in numbers if not 0 <= n < longest]
    if beyond or not numbers:
        what = f"layers {layers!r} is out of range: the model has {longest} blocks"
        raise TargetError(what, f"Choose from 0 to {longest - 1}")
    return {n for n in numbers if n < count}


def _ranges(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if bounds is None or int(bounds[2] or bounds[1]) < int(bounds[1]):
            raise TargetError(
                f"layers {text!r} can't be read", "Write last:K, first:K, or numbers and ranges like 0-3,7"
            )
        numbers += range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1)
    return numbers
