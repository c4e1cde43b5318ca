"""How many directions a matrix uses, from its singular values or their energies."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def effective_rank(values: ArrayLike) -> float | None:
    """exp(-sum p ln p), p the values over their sum; None where all are 0. Source: Roy & Vetterli 2007."""
    all_of_them = np.asarray(values, dtype=np.float64)
    total = float(all_of_them.sum())
    if not total:
        return None
    shares = all_of_them[all_of_them > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def stable_rank(values: ArrayLike) -> float | None:
    """Sum of the squared singular values over the largest squared; None where all are 0."""
    squares = np.asarray(values, dtype=np.float64) ** 2
    largest = float(squares.max())
    return float(squares.sum()) / largest if largest else None
