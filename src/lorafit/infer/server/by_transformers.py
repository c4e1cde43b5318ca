"""Answers by the models that `lorafit chat` computes with: one at a time, and for everything they can do."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import torch

from lorafit.infer.generate import Pieces, context_tokens, stream
from lorafit.infer.server.ask import Ask, Finish, Take
from lorafit.methods import table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model without adapters that shares every parameter and buffer with it.

    An adapter attached to the copy is in the copy alone; the frozen weights are in memory once.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, shared)


class ByTransformers:
    """models, tokenizers: one for each adapter, attached, and the base alone as the last. context: most tokens."""

    name = "transformers"
    parallel = 1  # the scale belongs to the model, not to a request
    unable = frozenset({"top_p", "presence_penalty", "frequency_penalty", "schema"})

    def __init__(
        self, models: list[PreTrainedModel], tokenizers: list[PreTrainedTokenizerBase], context: int, threads: int
    ) -> None:
        self._models, self._threads = models, threads
        # Copies: while one decodes, another thread prepares the original for the next prompt.
        self._tokenizers = [copy.deepcopy(tokenizer) for tokenizer in tokenizers]
        self.context = min(context, context_tokens(models[0]) or context)

    def answer(self, ask: Ask, take: Take) -> Finish:
        """As of `Backend`. While a prompt is read, nothing can end it."""
        torch.set_num_threads(self._threads)
        number = len(self._models) - 1 if ask.adapter is None else ask.adapter
        model, pieces = self._models[number], Pieces(self._tokenizers[number])
        if ask.adapter is not None:
            table.of(model).set_scale(model, ask.scale)
        if take("", 0):
            return "taken"
        tokens, limit = 0, ask.max_new_tokens
        for token in stream(
            model, self._tokenizers[number], ask.prompt, max_new_tokens=limit, temperature=ask.temperature,
            seed=ask.seed,
        ):  # fmt: skip
            tokens += 1
            if take(pieces.push(token), 1):
                return "taken"
        take(pieces.rest(), 0)
        return "length" if tokens == limit else "stop"

    def close(self) -> None:
        """Let the models go."""
        self._models = []
