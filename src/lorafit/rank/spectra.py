"""How many directions the loss gradients of each adapted weight need, without a gradient of a weight ever being formed.

A LoRA layer's own backward pass is a sketch of the gradient G (out, in) of its weight. With B = 0 and A drawn at random
the model is the base, and dL/dB = scaling * G A^T: the range of G, nearly (Halko et al. 2011, algorithm 4.1). With
B = Q, an orthonormal basis of that, and A = 0 the model is the base again, and dL/dA = scaling * Q^T G: the gradient in
that basis (algorithm 5.1). A is drawn anew for every step's rows, so that what is found is the range of the gradients
of all steps side by side, [G_1 ... G_n], and not of their sum alone: an update that training adds up of these has no
larger rank than they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorafit.config import LoRAConfig
from lorafit.engine.batch import Batch
from lorafit.engine.engine import Engine
from lorafit.lora.base import make_kind
from lorafit.lora.inject import attached_layers
from lorafit.lora.layer import LoRALayer
from lorafit.lora.targets import ALL_LINEAR, select
from lorafit.methods import lora
from lorafit.rank.energies import Spectrum

# Columns of a sketch that only serve to estimate what its basis misses, and those beyond the largest rank that is asked
# for, which make the leading directions exact (Halko et al. 2011, section 4.2).
PROBES, BEYOND = 8, 8


def attach(model: nn.Module, most: int) -> list[LoRALayer]:
    """Put layers on all linear weights that can hold sketches of ranks up to `most`. scaling is 1."""
    width = most + BEYOND + PROBES
    kinds = {name: make_kind(model.get_submodule(name)) for name in select(model, ALL_LINEAR).names}
    least = {name: min(kind.in_features, kind.out_features) for name, kind in kinds.items()}
    ranks = {name: r for name, r in least.items() if r < width}
    alphas = {name: float(r) for name, r in ranks.items()}
    lora.attach(model, LoRAConfig(r=width, alpha=width, rank_pattern=ranks, alpha_pattern=alphas))
    return list(attached_layers(model))


def measure(
    engine: Engine,
    layers: Sequence[LoRALayer],
    steps: Sequence[Sequence[Batch]],
    seed: int,
    on_step: Callable[[], None],
) -> dict[str, Spectrum]:
    """The spectrum of every layer over the rows of these steps, each of which is one or more micro-batches.

    Leaves A and B at 0 and no gradients. on_step: called after each of the 2 * len(steps) passes. The spectra depend
    on the seed by the error of the sketch alone.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> None:
        for layer in layers:
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator))
            layer.lora_B.zero_()

    sketches = {layer.name: torch.zeros_like(layer.lora_B) for layer in layers}
    for step in steps:
        with torch.no_grad():
            draw()
        for name, (_, of_B) in _gradients(engine, layers, step).items():
            sketches[name] += of_B
        on_step()
    return _in_bases(engine, layers, steps, sketches, on_step)


def _in_bases(
    engine: Engine,
    layers: Sequence[LoRALayer],
    steps: Sequence[Sequence[Batch]],
    sketches: Mapping[str, Tensor],
    on_step: Callable[[], None],
) -> dict[str, Spectrum]:
    rests = dict[str, float]()
    for layer in layers:
        rests[layer.name] = _set_basis(layer, sketches[layer.name]) / len(steps)
    grams = {layer.name: torch.zeros(layer.r, layer.r, dtype=torch.float64) for layer in layers}
    for step in steps:
        for name, (of_A, _) in _gradients(engine, layers, step).items():
            grams[name] += (of_A @ of_A.T).double() / len(steps)
        on_step()
    found = {}
    for layer in layers:
        energies = torch.linalg.eigvalsh(grams[layer.name]).flip(0).clamp_min(0)
        shape = (layer.out_features, layer.in_features)
        found[layer.name] = Spectrum(shape, energies.numpy(), rests[layer.name])
        with torch.no_grad():
            layer.lora_B.zero_()
    return found


def _gradients(engine: Engine, layers: Sequence[LoRALayer], step: Iterable[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer (dL/dA, dL/dB) of the mean loss per supervised token of a step. Leaves none behind."""
    batches = list(step)
    supervised = sum(batch.supervised_tokens for batch in batches)
    for batch in batches:
        (engine.loss(batch) / supervised).backward()  # type: ignore[no-untyped-call]
    found = {}
    for layer in layers:
        pair = layer.lora_A, layer.lora_B
        of_A, of_B = (torch.zeros_like(p) if p.grad is None else p.grad for p in pair)
        found[layer.name] = of_A.detach(), of_B.detach()
        for parameter in pair:
            parameter.grad = None
    return found


@torch.no_grad()
def _set_basis(layer: LoRALayer, sketch: Tensor) -> float:
    """B = an orthonormal basis of the sketch but for its probes, A = 0. Returns the energy that the basis misses.

    The probes are no part of the basis, and independent of it: the mean of the squared norms of what is left of them is
    an unbiased estimate. A sketch as wide as the weight has outputs misses nothing.
    """
    probes = 0 if layer.r >= layer.out_features else PROBES
    basis = torch.linalg.qr(sketch[:, : layer.r - probes]).Q
    layer.lora_A.zero_()
    layer.lora_B.zero_()
    layer.lora_B[:, : basis.shape[1]] = basis
    if not probes:
        return 0.0
    left = sketch[:, layer.r - probes :]
    left = left - basis @ (basis.T @ left)
    return float(left.square().sum()) / probes
