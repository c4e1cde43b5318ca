"""The loss of a causal language model over supervised tokens only, with logits of a few rows at a time.

Logits are the largest tensor of a step (tokens x vocabulary), and a chat row is supervised on a tenth of its tokens. So
the output head sees just the hidden states that predict a supervised token, CHUNK of them at a time, and each chunk's
gradient takes the place of its logits at once: softmax minus one-hot needs nothing from later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafit.engine import kernels, workspace
from lorafit.engine.batch import Batch
from lorafit.engine.tally import TALLY
from lorafit.errors import ModelError

CHUNK = 256


def head_of(model: nn.Module) -> nn.Module:
    """The output head. Raises ModelError if the model has none."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    if not isinstance(head, nn.Module):
        raise ModelError("this model has no output head, so it predicts no tokens", "Choose a causal language model")
    return head


def whole_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of weight x nll in nats, with the logits of all supervised tokens at once and torch's own operations.

    Works with every model, whatever it does to its logits after the head (soft-capping, scaling).
    """
    head = head_of(model)

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = arguments
        return (hidden.flatten(0, -2)[batch.predicts], *rest)

    with _hook(head.register_forward_pre_hook(select)):
        logits = run(model, batch).logits
    return (F.cross_entropy(logits.float(), batch.targets, reduction="none") * batch.weights).sum()


def chunked_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The same for a model whose logits are its head's output: CHUNK rows of logits at a time."""
    head = head_of(model)
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = arguments
        kept.append(hidden.flatten(0, -2)[batch.predicts])
        return (kept[0][:0], *rest)  # the model goes on with the logits of no row

    with _hook(head.register_forward_pre_hook(keep)):
        run(model, batch)
    (hidden,) = kept
    if type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad:
        return _frozen_head(hidden, head.weight, batch)
    return _by_module(head, hidden, batch)


def run(model: nn.Module, batch: Batch) -> Any:
    """One forward pass of the model. A column of ids alone would let some models build a cache; training needs none."""
    return model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    )


def _by_module(head: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
    """For a head that is adapted or trained: each chunk's logits are computed again in the backward pass."""

    def loss(rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (F.cross_entropy(head(rows).float(), targets, reduction="none") * weights).sum()

    parts = zip(*(torch.split(x, CHUNK) for x in (hidden, batch.targets, batch.weights)), strict=True)
    return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()


def _frozen_head(hidden: Tensor, W: Tensor, batch: Batch) -> Tensor:
    loss: Tensor = _FrozenHead.apply(hidden, W, batch.targets, batch.weights)  # type: ignore[no-untyped-call]
    return loss


class _FrozenHead(torch.autograd.Function):
    """Sum of weights * -log softmax(hidden W^T)[target]. Its gradient is computed with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, W: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        TALLY.add(2 * hidden.numel() * len(W) * (2 if wanted else 1))
        total = hidden.new_zeros((), dtype=torch.float64)
        whole = workspace.block(hidden, CHUNK, len(W))
        for first in range(0, len(hidden), CHUNK):
            rows = slice(first, first + CHUNK)
            logits = torch.mm(hidden[rows], W.T, out=whole[: len(hidden[rows])])
            nll = kernels.of(logits).cross_entropy_(logits, targets[rows], weights[rows], wanted)
            total += (nll.double() * weights[rows]).sum()
            if gradient is not None:
                torch.mm(logits, W, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul(g.to(gradient.dtype)), None, None, None


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
