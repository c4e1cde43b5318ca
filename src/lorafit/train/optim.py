"""AdamW over the adapter, and how its rate goes over the steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lorafit import slabs


def adamw(
    parameters: Iterable[Tensor],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    factors: Iterable[float] | None = None,
) -> torch.optim.AdamW:
    """The fused AdamW. Source: Loshchilov and Hutter 2019, algorithm 2.

    factors: of each parameter, what `set_rate` multiplies the rate by; 1 without. Those of one factor must follow each
    other.
    Its moments exist from the beginning, together: made at the first step, as torch would, they would lie scattered
    among activations, whose memory could never be joined again.
    """
    given = list(parameters)
    own = list(factors) if factors is not None else [1.0] * len(given)
    groups = [
        {"params": [given[at] for at, _ in some], "factor": factor}
        for factor, some in itertools.groupby(enumerate(own), key=lambda pair: pair[1])
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    for parameter, first, second in zip(given, _zeros_like(given), _zeros_like(given), strict=True):
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next step, times each group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def _zeros_like(tensors: list[Tensor]) -> list[Tensor]:
    """Zeros shaped like each, in one piece of memory where they are of one kind."""
    if len({(t.dtype, t.device) for t in tensors}) != 1:
        return [torch.zeros_like(t) for t in tensors]
    count = sum(t.numel() for t in tensors)
    on_cpu = tensors[0].device.type == "cpu"
    whole = slabs.empty((count,), tensors[0].dtype).zero_() if on_cpu else tensors[0].new_zeros(count)
    return [
        part.view(t.shape) for part, t in zip(torch.split(whole, [t.numel() for t in tensors]), tensors, strict=True)
    ]


def clip_gradients(parameters: list[Tensor], limit: float) -> float:
    """Scale all gradients down to a norm of `limit` where theirs, which is returned, is above it.

    As torch's clip_grad_norm_, which goes over all of them even where there is nothing to scale.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not float(norm) <= limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return float(norm)


def rate(step: int, total_steps: int, peak: float, schedule: str, warmup: float) -> float:
    """The learning rate of step 0 <= step < total_steps.

    Rises linearly over the first ceil(warmup * total_steps) steps, the first of which is above 0 already; then
    `constant`, or falls to 0 one step after the last as `linear` or `cosine`.
    """
    rising = math.ceil(warmup * total_steps)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    done = (step - rising) / max(1, total_steps - rising)
    return peak * SCHEDULES[schedule](done)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def optimizer_state(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """AdamW's moments and step counts as named tensors, in the order of its parameters; its own, not copies."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, names: list[str], state: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_state`; parameters without an entry start fresh."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        own = {key: state[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in state}
        if own:
            optimizer.state[parameter] = own
