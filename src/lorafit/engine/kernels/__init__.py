"""The elementwise operations of a training step: `native` in C++, compiled once; `plain` in torch, the same results."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def of(x: Tensor) -> ModuleType:
    """The module whose kernels take tensors like x."""
    from lorafit.engine.kernels import native, plain

    return native if x.device.type == "cpu" and x.dtype in native.SUFFIX and native.available() else plain
