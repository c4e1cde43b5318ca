"""The loss of a causal language model over supervised tokens only, with logits of a few rows at a time.

Logits are the largest tensor of a step (tokens x vocabulary), and a chat row is supervised on a tenth of its tokens. So
the output head sees just the hidden states that predict a supervised token, CHUNK of them at a time, and each chunk's
gradient takes the place of its logits at once: softmax minus one-hot needs nothing from later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafit.engine import kernels, workspace
from lorafit.engine.batch import Batch
from lorafit.engine.tally import TALLY
from lorafit.errors import ModelError
from lorafit.lora.tokens import TokenRows
from lorafit.quant.modules import QuantizedLinear
from lorafit.quant.stored import Stored

CHUNK = 256
DECODED = 8192  # tokens whose rows of a head in blocks are decoded together; see plan/memory.py


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
    return (whole_nll(model, batch) * batch.weights).sum()


def whole_nll(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of each of the batch's targets in nats: (pairs,) float32. For every model, as `whole_loss`."""
    return whole_reading(model, batch, _nll(head_of(model)))


# What is wanted of some rows' logits, float32: (rows, vocabulary), (rows,) targets -> (rows, ...).
Reading = Callable[[Tensor, Tensor], Tensor]


def nll_and_likeliest(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, and whether it is the likeliest token, as 0 or 1: (rows, 2)."""
    nll = F.cross_entropy(logits, targets, reduction="none")
    return torch.stack([nll, (logits.argmax(-1) == targets).float()], -1)


def whole_reading(model: nn.Module, batch: Batch, read: Reading) -> Tensor:
    """What `read` says of the logits of all targets: (pairs, ...)."""
    head = head_of(model)

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = arguments
        return (hidden.flatten(0, -2)[batch.predicts], *rest)

    with _hook(head.register_forward_pre_hook(select)):
        logits = run(model, batch).logits
    return read(logits.float(), batch.targets)


def chunked_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The same as `whole_loss` for a model whose logits are its head's output: CHUNK rows of logits at a time."""
    head, hidden = head_of(model), head_inputs(model, batch)
    frozen = head.base if isinstance(head, TokenRows) else head
    if (W := _frozen_weight(frozen)) is not None:
        rows = head if isinstance(head, TokenRows) and head.is_active else None
        return _frozen_head(hidden, W, batch, rows)
    return _by_module(head, hidden, batch)


def chunked_nll(model: nn.Module, batch: Batch) -> Tensor:
    """The same as `whole_nll` for such a model."""
    return chunked_reading(model, batch, _nll(head_of(model)))


def chunked_reading(model: nn.Module, batch: Batch, read: Reading) -> Tensor:
    """The same as `whole_reading` for such a model."""
    head, hidden = head_of(model), head_inputs(model, batch)
    parts = zip(torch.split(hidden, CHUNK), torch.split(batch.targets, CHUNK), strict=True)
    return torch.cat([read(head(rows).float(), targets) for rows, targets in parts])


def head_inputs(model: nn.Module, batch: Batch) -> Tensor:
    """What the head is given where something is predicted: (pairs, hidden)."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = arguments
        kept.append(hidden.flatten(0, -2)[batch.predicts])
        return (kept[0][:0], *rest)  # the model goes on with the logits of no row

    with _hook(head_of(model).register_forward_pre_hook(keep)):
        run(model, batch)
    (hidden,) = kept
    return hidden


def run(model: nn.Module, batch: Batch) -> Any:
    """One forward pass of the model. A column of ids alone would let some models build a cache; training needs none."""
    return model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    )


def _nll(head: nn.Module) -> Reading:
    """(logits, targets) -> nats of each row: the head's own where it has one, else of one target among all."""
    own: Reading | None = getattr(head, "nll", None)
    return own if own is not None else partial(F.cross_entropy, reduction="none")


def _frozen_weight(head: nn.Module) -> Tensor | Stored | None:
    """The weight of a head that is a product and nothing else; None for any other."""
    if isinstance(head, QuantizedLinear):
        return head.stored if head.bias is None and head.dense is None else None
    plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    return head.weight if plain else None  # type: ignore[return-value]  # a parameter of nn.Linear is a tensor


def _by_module(head: nn.Module, hidden: Tensor, batch: Batch) -> Tensor:
    """For a head that is adapted or trained: each chunk's logits are computed again in the backward pass."""

    def loss(rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (_nll(head)(head(rows).float(), targets) * weights).sum()

    parts = zip(*(torch.split(x, CHUNK) for x in (hidden, batch.targets, batch.weights)), strict=True)
    return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()


def _frozen_head(hidden: Tensor, W: Tensor | Stored, batch: Batch, own: TokenRows | None) -> Tensor:
    rows, ids = (own.rows_in_force(), own.ids) if own is not None else (None, None)
    loss: Tensor = _FrozenHead.apply(hidden, W, batch.targets, batch.weights, rows, ids)  # type: ignore[no-untyped-call]
    return loss


class _FrozenHead(torch.autograd.Function):
    """Sum of weights * -log softmax(hidden W^T)[target]. Its gradient is computed with it.

    own: (tokens, hidden) float32, trained rows in the place of those of W at `ids`, (tokens,); both None without.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        W: Tensor | Stored,
        targets: Tensor,
        weights: Tensor,
        own: Tensor | None,
        ids: Tensor | None,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[4]
        gradient = torch.empty_like(hidden) if wanted else None
        columns = None if own is None or ids is None else _OwnColumns(own, ids, hidden.dtype)
        vocabulary = W.shape[0]
        TALLY.add(2 * hidden.numel() * (vocabulary + (0 if own is None else len(own))) * (2 if wanted else 1))
        total = hidden.new_zeros((), dtype=torch.float64)
        whole = workspace.block(hidden, CHUNK, vocabulary)
        for first in range(0, len(hidden), CHUNK):
            rows = slice(first, first + CHUNK)
            logits = whole[: len(hidden[rows])]
            for tokens, part in _parts(W, hidden):
                torch.mm(hidden[rows], part.T, out=logits[:, tokens])
            if columns is not None:
                columns.put(hidden[rows], logits)
            nll = kernels.of(logits).cross_entropy_(logits, targets[rows], weights[rows], wanted)
            total += (nll.double() * weights[rows]).sum()
            if gradient is not None:
                more = columns.take(hidden[rows], logits) if columns is not None else None
                for tokens, part in _parts(W, hidden):
                    if tokens.start == 0:
                        torch.mm(logits[:, tokens], part, out=gradient[rows])
                    else:
                        gradient[rows].addmm_(logits[:, tokens], part)
                if more is not None:
                    gradient[rows] += more
        ctx.save_for_backward(gradient, columns.gradient if columns is not None else None)
        return total.float()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_own = (None if t is None else t.mul(g.to(t.dtype)) for t in ctx.saved_tensors)
        return of_hidden, None, None, None, of_own, None


def _parts(W: Tensor | Stored, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight by rows; where it stays in blocks, a few thousand tokens at a time, decoded in the type of `like`."""
    if isinstance(W, Tensor):
        yield slice(0, len(W)), W
        return
    decoded = workspace.block(like, min(DECODED, len(W.data)), W.width)
    for first in range(0, len(W.data), DECODED):
        part = W.part(slice(first, first + DECODED))
        kernels.of(decoded).decode_(part, decoded[: len(part.data)])
        yield slice(first, first + len(part.data)), decoded[: len(part.data)]


class _OwnColumns:
    """The logits of tokens with rows of their own. gradient: of the rows, (tokens, hidden) float32, added up."""

    def __init__(self, own: Tensor, ids: Tensor, dtype: torch.dtype) -> None:
        self.rows, self.ids, self.gradient = own.to(dtype), ids, torch.zeros_like(own)

    def put(self, x: Tensor, logits: Tensor) -> None:
        """Write them over those that the frozen rows gave. x: (n, hidden). logits: (n, vocabulary)."""
        logits[:, self.ids] = x @ self.rows.T

    def take(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Take their part out of the logits' gradient, which is the frozen rows' then. Returns what it means for x."""
        part = gradient[:, self.ids]
        gradient[:, self.ids] = 0
        self.gradient += part.float().T @ x.float()
        return part @ self.rows


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
