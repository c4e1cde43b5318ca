"""The loss of a causal language model over supervised positions only.

Logits are the largest tensor of a step (tokens x vocabulary), and a chat row is supervised on a tenth of its tokens.
So the output head sees just the hidden states that predict a supervised token. A hook in front of the head does this
for any architecture, and whatever the model does to logits afterwards (soft-capping, scaling) still happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.errors import ModelError


def supervised_nll(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, supervised: Tensor) -> Tensor:
    """Negative log-likelihood of each supervised token, in nats.

    input_ids, attention_mask: (rows, tokens) int64. supervised: (rows, tokens) bool, true where the token is to be
    predicted from those before it; the first column must be false. Returns (supervised tokens,) float32 in row-major
    order. Raises ModelError if the model has no output head.
    """
    device = next(model.parameters()).device
    input_ids, attention_mask, supervised = (t.to(device) for t in (input_ids, attention_mask, supervised))
    predicts = torch.zeros_like(supervised)
    predicts[:, :-1] = supervised[:, 1:]
    with _head_sees(model, predicts):
        # A column of ids alone would let some models build a cache; training and scoring never need one.
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    targets = input_ids[:, 1:][supervised[:, 1:]]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


@contextmanager
def _head_sees(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """While this holds, the output head gets (count, hidden), for the true `positions`, not (rows, tokens, hidden)."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    if not isinstance(head, nn.Module):
        raise ModelError("this model has no output head, so it predicts no tokens", "Choose a causal language model")

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = arguments
        return (hidden[positions], *rest)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
