"""Where tensors lie, so that the allocator leaves few holes (docs/log.md: a third of the process was holes).

Batches differ a little in length, and a block that is a little larger than the last hole leaves a hole of its own: what
holds a row per token is allocated for the largest batch so far, and used in part. And what lasts as long as the engine
lies together, not between the weights that it was made from, whose memory could never be joined otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Above glibc's largest threshold (32 MiB), so a slab comes from the system and goes back to it.
SLAB_BYTES = 64 << 20
ALIGNMENT = 64

_largest = 0
_slab: Tensor | None = None
_used = 0


def rows(like: Tensor, count: int, *rest: int) -> Tensor:
    """Uninitialised (count, *rest), contiguous, in the type and on the device of `like`."""
    global _largest
    _largest = max(_largest, count)
    # What is far shorter is no batch of tokens, and would waste more than holes do.
    reserved = _largest if 4 * count > 3 * _largest else count
    return like.new_empty(reserved, *rest)[:count]


def lasting(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised, contiguous, on the device of `like`; for what lives as long as the engine."""
    global _slab, _used
    size = torch.Size(shape).numel() * dtype.itemsize
    if like.device.type != "cpu" or size > SLAB_BYTES // 2:
        return like.new_empty(shape, dtype=dtype)
    if _slab is None or _used + size > SLAB_BYTES:
        _slab, _used = torch.empty(SLAB_BYTES, dtype=torch.uint8), 0
    place = _slab[_used : _used + size]
    _used += -(-size // ALIGNMENT) * ALIGNMENT
    return place.view(dtype).view(shape)


def expect(count: int) -> None:
    """Say how many tokens the largest batch to come has."""
    global _largest
    _largest = max(_largest, count)
