"""What any network takes, from the shapes of its parameters alone: its size, what LoRA trains of it, what is kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from lorafit.errors import TargetError, did_you_mean, listed
from lorafit.plan.counts import BYTES_FP32, RANKS
from lorafit.units import DTYPE_BITS, bytes_of

# In float32: value, gradient, two moments.
COPIES = 4


@dataclass(frozen=True)
class OfRank:
    """LoRA of rank r. params: that are trained. file_bytes: of their numbers in float32, as they are saved.

    state_bytes: with their gradients and AdamW's moments. too_high_for: weights that cannot hold the rank.
    """

    r: int
    params: int
    file_bytes: int
    state_bytes: int
    too_high_for: tuple[str, ...]


@dataclass(frozen=True)
class ModulePlan:
    """parameters: of the network. size_bytes: of them, by type; nf4 and int8 without scales.

    full_state_bytes: of full fine-tuning in float32: values, gradients, AdamW's moments. lora: by rank. Activations are
    in none of these: they depend on what the network computes.
    """

    parameters: int
    size_bytes: Mapping[str, int]
    full_state_bytes: int
    lora: Sequence[OfRank]


def plan_module(
    shapes: Mapping[str, Sequence[int]], adapted: Collection[str] | None = None, ranks: Sequence[int] = RANKS
) -> ModulePlan:
    """Count a network that nothing but its parameters' shapes is known of.

    shapes: as `{name: p.shape for name, p in module.named_parameters()}`, tied ones once. adapted: names of the weights
    that get an update; by default all of two or more dimensions, tables of embeddings among them. A weight (out, in,
    ...), a kernel's sizes behind, is taken as out x (in ...). Raises TargetError for a name that is not there or no
    matrix. Source: Hu et al. 2021, eq. 3: r (out + in) for each.
    """
    matrices = {name: (shape[0], prod(shape[1:])) for name, shape in shapes.items() if len(shape) > 1}
    names = list(matrices) if adapted is None else list(adapted)
    for name in names:
        if name not in matrices:
            raise TargetError(f"{name!r} is no weight of two or more dimensions", _known(name, list(matrices)))
    parameters = sum(map(prod, shapes.values()))
    return ModulePlan(
        parameters=parameters,
        size_bytes={dtype: bytes_of(parameters, dtype) for dtype in DTYPE_BITS},
        full_state_bytes=COPIES * BYTES_FP32 * parameters,
        lora=[_of_rank(r, {name: matrices[name] for name in names}) for r in ranks],
    )


def _of_rank(r: int, matrices: Mapping[str, tuple[int, int]]) -> OfRank:
    params = sum(r * (out + into) for out, into in matrices.values())
    too_high = tuple(name for name, shape in matrices.items() if min(shape) < r)
    return OfRank(r, params, BYTES_FP32 * params, COPIES * BYTES_FP32 * params, too_high)


def _known(name: str, names: list[str]) -> str:
    return did_you_mean(name, names) or f"There are {listed(names, 8)}"
