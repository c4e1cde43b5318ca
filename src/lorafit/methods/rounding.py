"""Starting from what rounding took away: a base in nf4 or int8, and B A as near as its rank can come to W - W'.

`loftq` makes the difference of the weights small: B A of W - W', by its largest singular values (Li et al. 2023, LoftQ,
algorithm 1 with one step; further steps would round another matrix, and the base would no longer be the model's own).
`qera` makes the difference of the outputs small: columns weigh by how large their inputs are, sqrt(E[x^2]), measured on
the first rows (Zhang et al. 2024, QERA, the approximate solution, which takes inputs to be uncorrelated).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorafit.config import ROUNDED
from lorafit.errors import ConfigError, ModelError
from lorafit.lora.inject import attached_layers
from lorafit.lora.layer import LoRALayer
from lorafit.model.spec import ModelSpec
from lorafit.quant.modules import QuantizedLinear

INITS = ("loftq", "qera")
# Singular values beyond the rank that are looked for too, and passes over the matrix: the sum that is left is within a
# percent of the least one, for errors whose singular values fall slowly.
MORE, PASSES = 16, 4
SMALLEST = 1e-6  # share of the largest input below which a column counts as this


def check(init: str, storage: str, variant: str) -> None:
    """Raise ConfigError where there is no rounding to start from."""
    if init not in INITS:
        return
    if storage not in ROUNDED:
        raise ConfigError(
            f"--init {init} starts from what rounding the base changes, and nothing is rounded here",
            "Give --base-storage nf4 or int8 with it, or leave it out",
        )
    if variant != "lora":
        raise ConfigError(f"--init {init} is given with --variant {variant}", "Give it with --variant lora")


def start(model: nn.Module, spec: ModelSpec, init: str, run: Callable[[], Any]) -> str:
    """Give every adapted layer over a rounded weight its A and B. run: takes the model over some rows, for `qera`.

    Returns one line of what is left of the rounding. Raises ModelError where the weights are no longer there.
    """
    layers = [layer for layer in attached_layers(model) if isinstance(layer.base, QuantizedLinear)]
    with _inputs(layers if init == "qera" else []) as squares:
        if init == "qera":
            run()
    before = after = 0.0
    weights = _weights(spec)
    with torch.no_grad():
        for layer in layers:
            error = weights(f"{layer.name}.weight") - layer.base.stored.decode(torch.float32)  # type: ignore[union-attr, operator]
            columns = _sizes(squares[layer]) if layer in squares else None
            A, B = nearest(error, layer.r, columns)
            factor = layer.scaling**-0.5
            layer.lora_A.copy_(factor * A)
            layer.lora_B.copy_(factor * B)
            weight = 1.0 if columns is None else columns
            before += float((error * weight).square().sum())
            after += float(((error - B @ A) * weight).square().sum())
    share = (after / before) ** 0.5 if before else 0.0
    what = "of the outputs" if init == "qera" else "of the weights"
    return f"{len(layers)} layers start from what rounding took away: {share:.0%} of its change {what} is left"


def nearest(error: Tensor, r: int, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A: (r, in) and B: (out, r) whose product is nearest to `error`, (out, in) float32, in the Frobenius norm.

    columns: (in,), what the columns of the difference count; all the same by default. Source: Eckart and Young 1936.
    """
    weighted = error if columns is None else error * columns
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same for the same weights, whatever was drawn before
        U, S, V = torch.svd_lowrank(weighted, q=min(r + MORE, *error.shape), niter=PASSES)
    root = S[:r].sqrt()
    A = (V[:, :r] * root).T
    return (A if columns is None else A / columns), U[:, :r] * root


def _sizes(squares: Tensor) -> Tensor:
    """The root of the mean square of each column of the inputs; one that was never used counts a little."""
    sizes = squares.sqrt()
    return sizes.clamp_min(float(sizes.max()) * SMALLEST + torch.finfo(sizes.dtype).tiny)


@contextmanager
def _inputs(layers: list[LoRALayer]) -> Iterator[dict[LoRALayer, Tensor]]:
    """While this holds, the sum of squares of each column of what the layers are given: (in,) float32."""
    found: dict[LoRALayer, Tensor] = {}

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].detach().float().flatten(0, -2)
        found[module] = found.get(module, 0) + x.square().sum(0)  # type: ignore[index, call-overload]

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _weights(spec: ModelSpec) -> Callable[[str], Tensor]:
    """Reads a weight of the model's files, in float32."""
    places: dict[str, Path] = {}
    for file in (file for file in spec.files if file.suffix == ".safetensors"):
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)

    def read(name: str) -> Tensor:
        if name not in places:
            raise ModelError(f"{spec.name} holds no {name}", "Its rounding cannot be started from: leave --init out")
        with safe_open(places[name], framework="pt") as opened:
            W: Tensor = opened.get_tensor(name).float()
        return W

    return read
