"""Floating-point operations of the products that training cannot do without, counted as they run.

A multiply and an add are two. What is computed a second time to save memory (attention scores, recomputed layers) is
not counted, nor are elementwise operations: the count is the numerator of the model FLOPs utilization (Chowdhery et al.
2022, PaLM, appendix B).
"""

from __future__ import annotations


class Tally:
    """A running count."""

    def __init__(self) -> None:
        self.flop = 0
        self.paused = False

    def add(self, flop: int) -> None:
        """Count so many operations, unless what runs now is a repetition."""
        if not self.paused:
            self.flop += flop


TALLY = Tally()
