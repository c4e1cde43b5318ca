"""Gates: an update as a sum of triplets, dW = scaling * sum of gate_i b_i a_i, each of which can be taken away.

a_i is a row of lora_A, b_i a column of lora_B. Fresh ones are about of length 1 and at right angles, as `crookedness`
would have them stay; gates begin at 0, so that nothing changes. What is left is folded into lora_A, and plain LoRA.
Source: Zhang et al. 2023 (AdaLoRA), eq. 3 to 5: P Lambda Q, with b_i, gate_i and a_i here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lorafit.lora.init import layer_generator
from lorafit.lora.layer import LoRALayer


@torch.no_grad()
def put_on(layers: Iterable[LoRALayer], seed: int) -> None:
    """Give fresh layers gates, and factors drawn anew by (seed, name). Tied layers have those of their owners."""
    owners: dict[str, nn.Parameter] = {}
    for layer in layers:
        if layer.tied_to is None:
            generator = layer_generator(seed, layer.name)
            silent = layer.lora_A.flatten(1) == 0  # what is never trained, such as padding
            _draw(layer.lora_A.flatten(1), generator)
            layer.lora_A.flatten(1)[silent] = 0
            _draw(layer.lora_B.flatten(1).T, generator)
            owners[layer.name] = nn.Parameter(layer.lora_A.new_zeros(layer.r))
        layer.register_parameter("gate", owners[layer.tied_to or layer.name])


def _draw(rows: Tensor, generator: torch.Generator) -> None:
    """Fill rows, in place, with numbers that make each of length 1 in the mean."""
    drawn = torch.empty(rows.shape).normal_(0.0, rows.shape[1] ** -0.5, generator=generator)
    rows.copy_(drawn.to(rows.device))


def crookedness(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(||M M^T - I||, its gradient), in the Frobenius norm: how far from orthonormal rows are. rows: M, (r, width).

    Zhang et al. 2023, eq. 4, has the square of it; the norm itself, as in the code of its authors, does not drown the
    loss where hundreds of layers are far from it.
    """
    off = rows @ rows.T
    off.diagonal().sub_(1)
    norm = torch.linalg.vector_norm(off)
    return norm, 2 * (off @ rows) / norm.clamp_min(torch.finfo(rows.dtype).tiny)


def rank(layer: LoRALayer) -> int:
    """How many triplets of a layer are in force: all of them where it has no gates."""
    return layer.r if layer.gate is None else int(torch.count_nonzero(layer.gate))


@torch.no_grad()
def fold(layer: LoRALayer, rule: str) -> None:
    """Make a layer with gates one of plain LoRA, of the rank that is left and with the same scaling. rule: of alpha."""
    assert layer.gate is not None, "nothing to fold"
    kept = layer.gate.nonzero().flatten()
    A, _ = layer.variant.factors(layer)
    gate = layer.gate[kept].view(-1, *[1] * (A.dim() - 1))
    layer.gate = None
    layer.replace(gate * A[kept], layer.lora_B[:, kept].clone(), rule)
