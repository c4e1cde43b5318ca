"""Arithmetic over updates: sums of several, and the nearest one of a lower rank. Factors alone, no base weight.

An update is scaling * B A. A: (r, ...), B: (out, r, ...); what stands behind r in A, and around it in B, is flattened,
as it is for a convolution. Weights may be negative: -1 takes an update away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorafit.errors import RankError


class Factors(NamedTuple):
    """scaling * B A. A: (r, in), B: (out, r), float32."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def r(self) -> int:
        """The rank."""
        return len(self.A)


class Recipe(NamedTuple):
    """How updates become one. weights: of each. density: the share of numbers that is kept, where some are dropped.

    r: the rank of the result, where it is chosen. generator: draws what is dropped by chance.
    """

    weights: Sequence[float]
    density: float = 1.0
    r: int | None = None
    generator: torch.Generator | None = None


# --- sums that are exact, or as near as a rank allows ---------------------------------------------------------------


def cat(updates: Sequence[Factors], recipe: Recipe) -> Factors:
    """The exact sum: factors side by side, of a rank that is the sum of ranks."""
    A = torch.cat([weight * u.scaling * u.A for u, weight in zip(updates, recipe.weights, strict=True)])
    return Factors(A, torch.cat([u.B for u in updates], dim=1), 1.0)


def svd(updates: Sequence[Factors], recipe: Recipe) -> Factors:
    """The nearest to that sum of rank r, by default the largest of theirs. Source: Eckart and Young 1936."""
    whole = cat(updates, recipe)
    return truncated(whole, min(recipe.r or max(u.r for u in updates), whole.r))[0]


def truncated(update: Factors, r: int) -> tuple[Factors, float]:
    """(the nearest update of rank r in the Frobenius norm, the share of the norm that is lost).

    B A is never formed: both factors are made orthogonal first, and what is left to decompose is r x r.
    """
    if r > min(update.A.shape[1], update.B.shape[0]):
        raise RankError(
            f"rank {r} is more than a layer of {update.B.shape[0]} x {update.A.shape[1]} holds", "Lower --r"
        )
    Qb, Rb = torch.linalg.qr(update.B.double())
    Qa, Ra = torch.linalg.qr(update.A.double().T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    root = S[:r].sqrt()
    A, B = (root[:, None] * (Vh[:r] @ Qa.T)).float(), ((Qb @ U[:, :r]) * root).float()
    total = float(S.square().sum())
    return Factors(A, B, update.scaling), math.sqrt(float(S[r:].square().sum()) / total) if total else 0.0


def norm(update: Factors) -> float:
    """|scaling * B A| in the Frobenius norm, without B A."""
    A, B = update.A.double(), update.B.double()
    return abs(update.scaling) * math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


# --- sums of factors, which are not sums of updates -----------------------------------------------------------------


def linear(updates: Sequence[Factors], recipe: Recipe) -> Factors:
    """Factors added up with the roots of their weights: of the rank of one, with products of A and B across updates.

    Rough, as PEFT says of its own. It is exact for one update.
    """
    return _by_factor(updates, recipe, _weighted_sum)


def magnitude_prune(updates: Sequence[Factors], recipe: Recipe) -> Factors:
    """The same with the smallest numbers of each factor dropped."""

    def add(tensors: list[Tensor], weights: Tensor) -> Tensor:
        return _weighted_sum([_largest(tensor, recipe.density) for tensor in tensors], weights)

    return _by_factor(updates, recipe, add)


def dare(updates: Sequence[Factors], recipe: Recipe) -> Factors:
    """The same with numbers dropped by chance and the others scaled up. Source: Yu et al. 2024, DARE, section 3.1."""

    def add(tensors: list[Tensor], weights: Tensor) -> Tensor:
        return _weighted_sum([_by_chance(tensor, recipe) for tensor in tensors], weights)

    return _by_factor(updates, recipe, add)


def ties(updates: Sequence[Factors], recipe: Recipe) -> Factors:
    """The smallest dropped, a sign chosen for each number, and the mean of those that have it.

    Source: Yadav et al. 2023, TIES-Merging, algorithm 1; of the factors, as PEFT has it.
    """

    def add(tensors: list[Tensor], weights: Tensor) -> Tensor:
        kept = torch.stack([_largest(tensor, recipe.density) for tensor in tensors])
        sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
        agree = kept.sign() == sign
        weighted = kept * weights.view(-1, *[1] * (kept.dim() - 1))
        return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)

    return _by_factor(updates, recipe, add)


HOWS: dict[str, Callable[[Sequence[Factors], Recipe], Factors]] = {
    "linear": linear,
    "cat": cat,
    "svd": svd,
    "ties": ties,
    "dare": dare,
    "magnitude-prune": magnitude_prune,
}
# Those that drop numbers.
DROPPING = ("ties", "dare", "magnitude-prune")


def _by_factor(updates: Sequence[Factors], recipe: Recipe, add: Callable[[list[Tensor], Tensor], Tensor]) -> Factors:
    """Both factors added up with sqrt(|weight * scaling|), the sign on A's side alone."""
    ranks = {u.r for u in updates}
    if len(ranks) > 1:
        raise RankError(
            f"the ranks are {', '.join(map(str, sorted(ranks)))}, and factors of one rank alone can be added up",
            "Take --how cat or svd",
        )
    wholes = torch.tensor([weight * u.scaling for u, weight in zip(updates, recipe.weights, strict=True)])
    roots, signs = wholes.abs().sqrt(), torch.where(wholes >= 0, 1.0, -1.0)
    return Factors(add([u.A for u in updates], roots * signs), add([u.B for u in updates], roots), 1.0)


def _weighted_sum(tensors: list[Tensor], weights: Tensor) -> Tensor:
    return torch.stack([weight * tensor for tensor, weight in zip(tensors, weights, strict=True)]).sum(0)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with all but its largest numbers set to 0."""
    count = int(density * tensor.numel())
    kept = torch.zeros_like(tensor).view(-1)
    places = tensor.abs().reshape(-1).topk(count).indices
    kept[places] = tensor.reshape(-1)[places]
    return kept.view_as(tensor)


def _by_chance(tensor: Tensor, recipe: Recipe) -> Tensor:
    kept = torch.bernoulli(torch.full_like(tensor, recipe.density), generator=recipe.generator)
    return tensor * kept / recipe.density
