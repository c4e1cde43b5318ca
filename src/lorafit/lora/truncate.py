"""The updates of a model brought to a lower rank, in place."""

from __future__ import annotations

import torch
from torch import nn

from lorafit.lora.combine import Factors, truncated
from lorafit.lora.inject import attached_layers, owners


@torch.no_grad()
def truncate(model: nn.Module, r: int, rule: str) -> None:
    """Give every layer of a larger rank the nearest update of rank r (Eckart and Young 1936), at the same scaling.

    rule: of alpha. What holds the parameters, such as an optimizer, has to be made anew. Raises TargetError if no
    adapter is attached.
    """
    own = owners(model)
    for layer in own.values():
        if layer.r > r:
            A, B = layer.lora_A, layer.lora_B
            near = truncated(Factors(A.flatten(1), B.flatten(1), layer.scaling), r)[0]
            layer.replace(near.A.view(r, *A.shape[1:]), near.B.view(len(B), r, *B.shape[2:]), rule)
    for layer in attached_layers(model):
        if layer.tied_to is not None:
            layer.share(own[layer.tied_to])
