"""Dropout on the adapter's input whose mask does not depend on how rows are batched.

Every element's fate is a hash of (seed, step, layer, row, token, feature). A row keeps its mask whatever stands beside
it, however far it is padded or packed, in every micro-batching, when a checkpointed block is run again, and on every
device: no generator is advanced. (A generator's stream would fill a longer row differently, and is slower here.)

The hashes are public ones: SplitMix64 (Steele, Lea, Flood 2014) for the keys, and the 32-bit finaliser of MurmurHash3
(Appleby) for the elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafit.errors import ConfigError

_MASK64 = (1 << 64) - 1


@dataclass
class DropoutKey:
    """What the masks of one forward pass are keyed by. All layers of a model share one; the loop sets it every step.

    rows: an id per row of the batch (batch,), such as the row's number in the data set; None means 0, 1, 2, ...
    For packed batches rows and tokens are (batch, tokens): each token's row id, and its position within that row.
    tokens: None means 0, 1, 2, ... along the row.
    """

    seed: int = 0
    step: int = 0
    rows: Tensor | Sequence[int] | None = None
    tokens: Tensor | None = None


def drop(x: Tensor, *, p: float, key: DropoutKey, layer: int, feature_dim: int) -> Tensor:
    """Dropout: x with a share p of its elements set to zero and the others divided by 1 - p.

    x: (rows, ..., features) with the features at feature_dim (negative). layer: the layer's own number.
    Raises ConfigError if key.rows does not have the rows of x. Source: Srivastava et al. 2014; the keys are ours.
    """
    dropped = drop_mask(x.movedim(feature_dim, -1).shape, p=p, key=key, layer=layer, device=x.device)
    return x.masked_fill(dropped.movedim(-1, feature_dim), 0) * (1 / (1 - p))


# Compiled, the key's step would be a constant of the graph, and inductor overflows when it folds the hash's constants.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
def drop_mask(shape: Sequence[int], *, p: float, key: DropoutKey, layer: int, device: torch.device) -> Tensor:
    """True where an element is dropped. shape: (rows, ..., features); the middle axes are tokens in their order."""
    *lead, features = shape
    rows = lead[0] if lead else 1
    head = _mix(_mix(_mix(key.seed & _MASK64) ^ (key.step & _MASK64)) ^ (layer & _MASK64))
    tokens = _token_keys(rows, _product(lead[1:]), key, head, device)
    channels = _mix64(torch.arange(features, device=device) + _signed(_mix(head)))
    z = _low32(tokens)[..., None] ^ _low32(channels)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        z = (z ^ _shift32(z, shift)) * _signed(factor, 32)
    z = z ^ _shift32(z, 16)
    return (z < round(p * 2**32) - 2**31).reshape(tuple(shape))


def _token_keys(rows: int, tokens: int, key: DropoutKey, head: int, device: torch.device) -> Tensor:
    """One 64-bit key a token: (rows, tokens)."""
    ids = torch.arange(rows) if key.rows is None else torch.as_tensor(key.rows, dtype=torch.int64)
    ids = ids.to(device)
    if ids.dim() == 1:
        ids = ids[:, None]
    if ids.shape not in ((rows, 1), (rows, tokens)):
        raise ConfigError(
            f"dropout is keyed by row, and a layer got {rows} x {tokens} rows x tokens where the batch has "
            f"{tuple(torch.as_tensor(key.rows).shape)} row ids",
            "Set dropout to 0: this model mixes rows inside its layers",
        )
    position = torch.arange(tokens, device=device) if key.tokens is None else key.tokens.to(device)
    return _mix64(_mix64(ids + _signed(head)) + position)


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _mix(z: int) -> int:
    """SplitMix64 of one number: 64 bits to 64 bits, each depending on all."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _mix64(z: Tensor) -> Tensor:
    """SplitMix64 of a tensor of int64, whose arithmetic wraps as that of unsigned numbers does."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift64(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift64(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift64(z, 31)


def _signed(value: int, bits: int = 64) -> int:
    """The signed number with the same bits: torch has no arithmetic on unsigned ones."""
    return value - (1 << bits) if value >> (bits - 1) else value


def _shift64(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # torch shifts the sign in; this takes it out again


def _shift32(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (32 - by)) - 1)


def _low32(z: Tensor) -> Tensor:
    return z.to(torch.int32)  # the low 32 bits: a narrowing conversion wraps
