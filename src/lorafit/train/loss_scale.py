"""A factor on the loss, so that gradients of activations in float16 neither vanish nor overflow.

Numbers below 6e-8 are 0 in float16, those above 65,504 infinite; gradients are often smaller than the one. The loss
times a power of two moves them all, and dividing the adapter's gradients, which are float32, by it moves them back
without an error. Source: Micikevicius et al. 2018, Mixed precision training, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lorafit.train.checkpoint import Progress

FIRST, LARGEST = 2.0**14, 2.0**16
# After so many steps without an overflow a larger factor is tried.
STEPS_TO_GROW = 200


def begin(progress: Progress, dtype: torch.dtype) -> None:
    """Set the factor of a run whose activations are in `dtype`: 1 in all but float16. Leaves that of a resumed run."""
    if dtype == torch.float16 and progress.step == 0:
        progress.loss_scale = FIRST


def scaled(progress: Progress, parameters: Iterable[Tensor], accumulate: Callable[[], float]) -> float:
    """Gradients of a step's loss, which is returned; `accumulate` makes them, of the loss times progress.loss_scale.

    Where they overflow they are made again at half the factor, so that no step is lost; a loss that is not finite
    itself is returned as it is.
    """
    given = list(parameters)
    while True:
        loss, scale = accumulate(), progress.loss_scale
        gradients = [p.grad for p in given if p.grad is not None]
        if scale != 1 and gradients:
            torch._foreach_mul_(gradients, 1 / scale)
        if scale == 1 or not math.isfinite(loss):
            return loss
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            _grow(progress)
            return loss
        progress.loss_scale, progress.steps_at_scale = scale / 2, 0
        for parameter in given:
            parameter.grad = None


def _grow(progress: Progress) -> None:
    progress.steps_at_scale += 1
    if progress.steps_at_scale == STEPS_TO_GROW:
        progress.loss_scale, progress.steps_at_scale = min(LARGEST, 2 * progress.loss_scale), 0
