"""Rows that are nearly the same, by their tokens: MinHash over runs of tokens, then the share that is really common.

Source: Broder 1997, On the resemblance and containment of documents; bands as in Leskovec, Rajaraman and Ullman 2014,
Mining of Massive Datasets, section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorafit.data.store import Encoded

RUN = 5  # tokens of a shingle
BANDS, DEEP = 16, 4  # two rows with 80% in common agree in a band with probability 0.9998, with 30% in common 0.12
ALIKE = 0.8  # the share of shingles that near duplicates have in common at least (Jaccard)
SHORTEST = 12  # tokens; what is shorter is alike by chance


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows, by number, and the share of their shingles that both have."""

    first: int
    second: int
    alike: float


class NearRows:
    """Finds, for one row after the other, an earlier row that is nearly the same.

    skip: tokens that all rows begin with, which say nothing.
    """

    def __init__(self, skip: int) -> None:
        self.skip = skip
        generator = np.random.Generator(np.random.Philox(key=0))
        self._factors = generator.integers(1, 1 << 63, (BANDS * DEEP, 1), dtype=np.uint64) | np.uint64(1)
        self._mix = generator.integers(1, 1 << 63, RUN, dtype=np.uint64) | np.uint64(1)
        self._bands: list[dict[bytes, int]] = [{} for _ in range(BANDS)]
        self._shingles: dict[int, NDArray[np.uint64]] = {}

    def find(self, row: Encoded) -> tuple[int, float] | None:
        """(number, share in common) of the row remembered that is most like this one, where one is alike."""
        shingles = self._of(row)
        return None if shingles is None else self._find(shingles, self._keys(shingles))

    def pairs(self, rows: Iterable[Encoded]) -> Iterator[Pair]:
        """Each row that is nearly the same as an earlier one, with that one."""
        for number, row in enumerate(rows):
            shingles = self._of(row)
            if shingles is None:
                continue
            keys = self._keys(shingles)
            found = self._find(shingles, keys)
            if found:
                yield Pair(found[0], number, found[1])
            else:
                self._remember(number, shingles, keys)

    def _of(self, row: Encoded) -> NDArray[np.uint64] | None:
        ids = row.input_ids[self.skip :].astype(np.uint64)
        if len(ids) < SHORTEST:
            return None
        runs = np.lib.stride_tricks.sliding_window_view(ids, RUN)
        mixed = (runs * self._mix).sum(axis=1, dtype=np.uint64)
        return np.unique(mixed ^ (mixed >> np.uint64(29)))

    def _keys(self, shingles: NDArray[np.uint64]) -> list[bytes]:
        least = (shingles * self._factors).min(axis=1).reshape(BANDS, DEEP)
        return [band.tobytes() for band in least]

    def _find(self, shingles: NDArray[np.uint64], keys: list[bytes]) -> tuple[int, float] | None:
        candidates = {band[key] for band, key in zip(self._bands, keys, strict=True) if key in band}
        shares = [(_common(shingles, self._shingles[number]), -number) for number in candidates]
        share, number = max(shares, default=(0.0, 0))
        return (-number, share) if share >= ALIKE else None

    def _remember(self, number: int, shingles: NDArray[np.uint64], keys: list[bytes]) -> None:
        self._shingles[number] = shingles
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, number)


def _common(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
