"""Spectra of weights' gradients, and what follows from them: what a rank can hold, and where ranks belong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorafit.report.directions import effective_rank


@dataclass(frozen=True)
class Spectrum:
    """Of the gradients of one weight, step by step.

    shape: (out, in) of the weight. energies: (k,) of its leading directions, descending: the mean over steps of the
    squared norm of the gradient's part along each. rest: energy beyond them, estimated.
    """

    shape: tuple[int, int]
    energies: NDArray[np.float64]
    rest: float

    @property
    def total(self) -> float:
        """Mean over steps of the squared Frobenius norm of the gradient."""
        return float(self.energies.sum()) + self.rest

    def held(self, r: int) -> float:
        """Share of the energy along the first r directions: 0 to 1.

        1 for a weight that gets no gradient, or that has no more inputs or outputs: an update of rank r is any matrix.
        """
        return float(self.energies[:r].sum()) / self.total if self.total and r < min(self.shape) else 1.0

    @property
    def effective_rank(self) -> float:
        """Of the energies' shares, what lies beyond counted as one more direction; see `directions.effective_rank`."""
        return effective_rank(np.append(self.energies, self.rest)) or 0.0


def held(spectra: Mapping[str, Spectrum], r: int) -> float:
    """Share of the energy of all weights' gradients along the first r directions of each."""
    total = sum(one.total for one in spectra.values())
    return sum(one.held(r) * one.total for one in spectra.values()) / total if total else 1.0


def mean_effective_rank(spectra: Mapping[str, Spectrum]) -> float:
    """The mean over weights, weighed by their energy."""
    total = sum(one.total for one in spectra.values())
    return sum(one.effective_rank * one.total for one in spectra.values()) / total if total else 0.0


def allocate(spectra: Mapping[str, Spectrum], r: int, least: int = 0) -> dict[str, int]:
    """A rank for each weight, `least` or more, by energy: as many parameters together as rank r everywhere, at most.

    Direction after direction, the one that holds most energy for the in + out parameters it costs.
    """
    budget = (r - least) * sum(sum(one.shape) for one in spectra.values())
    offers = [
        (float(energy) / sum(one.shape), name)
        for name, one in spectra.items()
        for energy in one.energies[least : min(one.shape)]
    ]
    ranks = dict.fromkeys(spectra, least)
    for _, name in sorted(offers, key=lambda offer: -offer[0]):
        cost = sum(spectra[name].shape)
        if cost <= budget:
            budget -= cost
            ranks[name] += 1
    return ranks
