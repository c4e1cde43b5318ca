"""How rows become batches. Nothing here needs torch, so that a plan can count them."""

from __future__ import annotations

from dataclasses import dataclass

# Widths of rows side by side are a multiple of this: oneDNN makes a primitive for every shape that it meets.
WIDTH_STEP = 8


@dataclass(frozen=True, slots=True)
class Packing:
    """How rows become batches. padded: side by side. share_prefix: what rows begin with in common is computed once.

    width_step: rows side by side are as wide as a multiple of this, so that shapes repeat; not beyond widest. apart:
    whether what is predicted is no token, as a label, and so no input of what comes after it.
    """

    padded: bool = False
    share_prefix: bool = True
    width_step: int = 1
    widest: int = 1 << 62
    apart: bool = False

    def width(self, longest: int) -> int:
        """Of rows side by side, the longest of which has so many tokens."""
        width = -(-longest // self.width_step) * self.width_step
        return width if width <= self.widest else longest


# Of rows that are pooled: few widths, as oneDNN keeps what it makes for each shape (0.6 MB).
SIDE_BY_SIDE = Packing(padded=True, share_prefix=False, width_step=WIDTH_STEP, apart=True)
