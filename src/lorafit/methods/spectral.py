"""Starting from what the base's weights, their inputs or their gradients mostly are, in the place of B = 0.

- `pissa`: the largest singular values and vectors of W0. Meng et al. 2024, PiSSA, eq. 2 to 4.
- `olora`: the first columns of Q and rows of R of W0 = Q R. Buyukakyuz 2024, OLoRA, eq. 4.
- `eva`: A as the directions in which inputs vary most; B = 0. Paischer et al. 2024, EVA, algorithm 1, without moving
  ranks between layers.
- `lora-ga`: A and B as singular vectors 1 to r and r + 1 to 2 r of the loss's gradient at W0. Wang et al. 2024,
  LoRA-GA, eq. 8 and algorithm 1.

Where B A is not 0 at the start, W0 gives it up: W0 - scaling * B A is trained on, so that a fresh adapter changes
nothing but by rounding. What is saved stands on W0 itself: the difference of two products is LoRA of twice the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafit.config import MethodConfig
from lorafit.errors import ConfigError
from lorafit.lora.base import LINEAR_KINDS, kind_name
from lorafit.lora.inject import attached_layers
from lorafit.lora.layer import LoRALayer
from lorafit.methods.method import Beginning
from lorafit.quant.modules import Quantized
from lorafit.slabs import trim_heap

# Singular values beyond the rank that are looked for too, and passes over the matrix.
MORE, PASSES = 16, 4
# Wang et al. 2024, section 3.3: gamma, which keeps the update's size free of the model's width.
GA_GAMMA = 16.0
Pair = tuple[Tensor, Tensor]


def check(config: MethodConfig) -> None:
    """Raise ConfigError for a variant that these say nothing of."""
    if config.init in STARTS and config.variant != "lora":
        raise ConfigError(f"--init {config.init} is given with --variant {config.variant}", "Give it with lora alone")
    if config.init in MOVING and config.dropout:
        raise ConfigError(
            f"--init {config.init} is given with --dropout", "It would drop what W0 gave up; leave it out"
        )


def start(model: nn.Module, beginning: Beginning) -> list[str]:
    """Give every adapted linear layer its A and B. Raises ConfigError where weights stay in fewer bits."""
    name = beginning.config.init
    layers = [layer for layer in attached_layers(model) if kind_name(layer.base) in LINEAR_KINDS]
    if name in MOVING and any(isinstance(layer.base, Quantized) for layer in layers):
        raise ConfigError(f"--init {name} changes weights, and those stay in fewer bits", "Leave out --base-storage")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(beginning.config.seed)
        told = STARTS[name](layers, beginning)
    trim_heap()  # decompositions leave it full of holes
    return [f"{len(layers)} layers start from {told}"]


# --- from the weights -----------------------------------------------------------------------------------------------


def _pissa(layers: Sequence[LoRALayer], beginning: Beginning) -> str:
    held = [_give_up(layer, *_principal(_weight(layer), layer.r)) for layer in layers]
    return f"the largest singular values of their weights, {_mean(held):.0%} of the norm"


def _olora(layers: Sequence[LoRALayer], beginning: Beginning) -> str:
    held = []
    for layer in layers:
        Q, R = torch.linalg.qr(_weight(layer))
        held.append(_give_up(layer, R[: layer.r], Q[:, : layer.r]))
    return f"the first directions of their weights, {_mean(held):.0%} of the norm"


def _principal(W: Tensor, r: int) -> Pair:
    """A: (r, in), B: (out, r), whose product is nearest to W."""
    U, S, V = torch.svd_lowrank(W, q=min(r + MORE, *W.shape), niter=PASSES)
    root = S[:r].sqrt()
    return (V[:, :r] * root).T, U[:, :r] * root


@torch.no_grad()
def _give_up(layer: LoRALayer, A: Tensor, B: Tensor) -> float:
    """Let scaling * B A be this product, and take it out of W0. Returns its share of the norm of W0."""
    factor = layer.scaling**-0.5
    layer.lora_A.copy_(factor * A)
    layer.lora_B.copy_(factor * B)
    W = _weight(layer)
    delta = layer.delta_weight()
    layer.kind.write_weight(W - delta)
    trim_heap()
    layer.started_at = (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
    size = float(W.norm())
    return float(delta.norm()) / size if size else 0.0


def _weight(layer: LoRALayer) -> Tensor:
    return layer.original_matrix().float()


def _mean(shares: list[float]) -> float:
    return sum(shares) / max(1, len(shares))


# --- from inputs and gradients ----------------------------------------------------------------------------------------


def _eva(layers: Sequence[LoRALayer], beginning: Beginning) -> str:
    """Of several batches one after the other: what was found so far, weighed, is put in front of the next inputs."""
    found: dict[LoRALayer, Tensor] = {}

    def note(layer: LoRALayer, x: Tensor) -> None:
        rows = torch.cat([found[layer], x]) if layer in found else x
        _, S, V = torch.svd_lowrank(rows, q=min(layer.r + MORE, *rows.shape), niter=2)
        found[layer] = (V * S).T

    with _given(layers, note):
        beginning.over_rows()
    with torch.no_grad():
        for layer in layers:
            directions = found[layer][: layer.r]
            layer.lora_A[: len(directions)] = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return "the directions in which their inputs vary most"


def _lora_ga(layers: Sequence[LoRALayer], beginning: Beginning) -> str:
    """One gradient at a time: of each layer only the factors are kept."""
    found: dict[LoRALayer, Pair] = {}
    held: list[float] = []

    def note(layer: LoRALayer, G: Tensor) -> None:
        U, S, V = torch.svd_lowrank(G, q=min(2 * layer.r + MORE, *G.shape), niter=PASSES)
        size = len(G) ** 0.25 / GA_GAMMA**0.5
        found[layer] = size * V[:, : layer.r].T, size * U[:, layer.r : 2 * layer.r]
        total = float(G.square().sum())
        held.append(float(S[: layer.r].square().sum()) / total if total else 0.0)

    with _gradients(layers, note):
        beginning.with_gradients()
    for layer in layers:
        A, B = found[layer]
        if A.shape[0] < layer.r or B.shape[1] < layer.r:
            raise ConfigError(
                f"--init lora-ga takes 2 r singular vectors, and {layer.name} has fewer than {2 * layer.r}", "Lower --r"
            )
        # A and B have the size that the paper derives, whatever the scaling is.
        _give_up(layer, A * layer.scaling**0.5, B * layer.scaling**0.5)
    return f"the gradient of the first rows, of which rank r holds {_mean(held):.0%}"


@contextmanager
def _given(layers: Sequence[LoRALayer], note: Callable[[LoRALayer, Tensor], None]) -> Iterator[None]:
    """While this holds, `note` is told what each layer is given: (n, in) float32."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        note(cast(LoRALayer, module), arguments[0].detach().float().flatten(0, -2))

    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _gradients(layers: Sequence[LoRALayer], note: Callable[[LoRALayer, Tensor], None]) -> Iterator[None]:
    """While this holds, `note` is told the gradient of each layer's weight in a backward pass: (out, in) float32."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:  # it runs again when its gradient has come, or not for its gradient at all
            return
        x = arguments[0].detach()

        def told(g: Tensor) -> None:
            note(cast(LoRALayer, module), g.float().flatten(0, -2).T @ x.float().flatten(0, -2))

        output.register_hook(told)  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


STARTS: dict[str, Callable[[Sequence[LoRALayer], Beginning], str]] = {
    "pissa": _pissa,
    "olora": _olora,
    "eva": _eva,
    "lora-ga": _lora_ga,
}
# Those that take something out of W0.
MOVING = ("pissa", "olora", "lora-ga")
