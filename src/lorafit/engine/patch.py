"""Faster forwards in the place of modules' own, each only where it was seen to give the same numbers.

A module keeps its place, its name and its parameters; only `forward` is set on the instance, and taken off again.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.engine.elementwise import gated, rms_norm, rotate
from lorafit.engine.kernels.plain import GELU_TANH, SILU
from lorafit.engine.linear import is_frozen
from lorafit.lora.adapted import Adapted

ROTARY_FUNCTION = "apply_rotary_pos_emb"
GATED_PARTS = ("gate_proj", "up_proj", "down_proj")
PROBE_TOKENS = 5


@dataclass
class Patches:
    """What was replaced, so that it can be put back. functions: (module of code, name, replacement)."""

    modules: list[nn.Module] = field(default_factory=list)
    functions: list[tuple[ModuleType, str, Callable[..., Any]]] = field(default_factory=list)

    def set(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Put `forward` in the place of the module's own."""
        module.forward = forward
        self.modules.append(module)

    def undo(self) -> None:
        """Give every module its own forward back."""
        for module in self.modules:  # some were set twice
            module.__dict__.pop("forward", None)
        self.modules.clear()
        self.functions.clear()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """While this holds, functions of modelling code are replaced too. (They are shared by all models.)"""
        before = [(code, name, getattr(code, name)) for code, name, _ in self.functions]
        try:
            for code, name, replacement in self.functions:
                setattr(code, name, replacement)
            yield
        finally:
            for code, name, original in before:
                setattr(code, name, original)


def agrees(expected: Tensor, got: Tensor) -> bool:
    """Within two roundings of storage, element by element and against the largest."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    eps = torch.finfo(expected.dtype).eps
    size = float(expected.abs().max())
    return bool(torch.allclose(got.float(), expected.float(), rtol=2 * eps, atol=max(eps * size / 4, 1e-6 * size)))


# --- norms ----------------------------------------------------------------------------------------------------------


def patch_norms(model: nn.Module, patches: Patches) -> None:
    """RMS norms, known by their class's name and by what they compute."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and is_frozen(module):
            forward = _norm_forward(module)
            if forward is not None:
                patches.set(module, forward)


def norm_settings(module: nn.Module | None) -> dict[str, Any] | None:
    """The weight, eps and round_first of a norm that `patch_norms` replaced; None for any other module."""
    forward = getattr(module, "__dict__", {}).get("forward")
    return dict(forward.keywords) if isinstance(forward, functools.partial) and forward.func is rms_norm else None


def _norm_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = _random(weight, PROBE_TOKENS, len(weight))
    expected = module(x)
    for offset in (0.0, 1.0):  # Gemma stores weight - 1
        for round_first in (True, False):
            wide = weight.detach().float() + offset
            if agrees(expected, rms_norm(x, wide, eps, round_first)):
                return functools.partial(rms_norm, weight=wide, eps=eps, round_first=round_first)
    return None


def _random(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


# --- gated MLPs -----------------------------------------------------------------------------------------------------


def patch_gated_mlps(model: nn.Module, patches: Patches) -> None:
    """Modules that compute down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    kinds: dict[type, int | None] = {}
    for module in model.modules():
        if isinstance(module, Adapted) or not all(_has_module(module, name) for name in GATED_PARTS):
            continue  # what stands in the place of an MLP shows its parts, and does more
        if type(module) not in kinds:
            kinds[type(module)] = _gated_kind(module)
        kind = kinds[type(module)]
        if kind is not None:
            patches.set(module, functools.partial(_gated_forward, module, kind))


def _has_module(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


def gated_kind(module: nn.Module | None) -> int | None:
    """The activation of a gated MLP that `patch_gated_mlps` replaced; None for any other module."""
    forward = getattr(module, "__dict__", {}).get("forward")
    is_ours = isinstance(forward, functools.partial) and forward.func is _gated_forward
    return int(forward.args[1]) if isinstance(forward, functools.partial) and is_ours else None


def _gated_forward(module: Any, kind: int, x: Tensor) -> Tensor:
    y: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x), kind))
    return y


def _gated_kind(module: Any) -> int | None:
    act = getattr(module, "act_fn", None)
    if act is None:
        return None
    sample = torch.linspace(-8, 8, 200)
    known = {SILU: F.silu(sample), GELU_TANH: F.gelu(sample, approximate="tanh")}
    kind = next((kind for kind, values in known.items() if torch.allclose(act(sample), values, atol=1e-6)), None)
    if kind is None:
        return None
    weight = getattr(module.gate_proj, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    x = _random(weight, 1, PROBE_TOKENS, weight.shape[1])
    # Several roundings differ: the activation's and the product's are one here. The structure is what is asked.
    expected, got = module(x).float(), _gated_forward(module, kind, x).float()
    return (
        kind if float((expected - got).norm()) <= 8 * torch.finfo(weight.dtype).eps * float(expected.norm()) else None
    )


# --- rotary embeddings ----------------------------------------------------------------------------------------------


def patch_rotary(model: nn.Module, patches: Patches) -> None:
    """The function of the modelling code that rotates queries and keys, where it is the usual one."""
    for name in {type(module).__module__ for module in model.modules()}:
        code = sys.modules.get(name)
        original = getattr(code, ROTARY_FUNCTION, None) if code and name.startswith("transformers.") else None
        if code is not None and callable(original) and _is_usual_rotary(original):
            patches.functions.append((code, ROTARY_FUNCTION, _rotary_function(original)))


def _rotary_function(original: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        if more or named or q.shape[0] != 1 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype:
            return original(q, k, cos, sin, *more, **named)
        return rotate(q, k, cos, sin)

    return replacement


def _is_usual_rotary(function: Callable[..., Any]) -> bool:
    like = torch.empty(0)
    q, k = _random(like, 1, 4, PROBE_TOKENS, 8), _random(like, 1, 2, PROBE_TOKENS, 8)
    cos, sin = _random(like, 1, PROBE_TOKENS, 8), _random(like, 1, PROBE_TOKENS, 8)
    try:
        expected = function(q, k, cos, sin)
    except (TypeError, RuntimeError, ValueError):
        return False
    return all(agrees(e, g) for e, g in zip(expected, _rotary_function(function)(q, k, cos, sin), strict=True))
