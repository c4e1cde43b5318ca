"""A tiny model that has learned five replies by heart: its adapter knows them, its base knows none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lorafit.data.example import Example
from lorafit.data.formats import read_examples
from lorafit.data.mask import encode_all
from lorafit.data.pack import micro_batches
from lorafit.data.rows import Row
from lorafit.engine.engine import plain
from lorafit.lora.inject import attach, trainable_parameters
from tests import tiny

LEARNED = [
    ("Where is my card?", '{"intent": "card"}'),
    ("What is 雨?", '{"is": "rain 🌧"}'),
    ("Hi", '{"a": 1}'),
    ("Please block the PIN of my other card at once", '{"intent": "pin", "ok": true}'),
    ("top up", '{"intent": "Ärger"}'),
]


@dataclass(frozen=True)
class Learned:
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    examples: list[Example]


def examples_of(pairs: list[tuple[str, str]]) -> list[Example]:
    return read_examples([Row(tiny.chat_row(*pair), f"rows.jsonl:{n + 1}") for n, pair in enumerate(pairs)])


def llama(more_tokens: int = 0) -> LlamaForCausalLM:
    """The tiny model, able to end: its end token is also its pad token, whose embedding and head begin as zeros."""
    model = tiny.llama()
    if more_tokens:
        model.resize_token_embeddings(model.config.vocab_size + more_tokens, mean_resizing=False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for row in (1, *range(258, 258 + more_tokens)):
            model.model.embed_tokens.weight[row].normal_(std=0.2, generator=generator)
    return model


def learn(
    pairs: list[tuple[str, str]] = LEARNED,
    model: LlamaForCausalLM | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Learned:
    """Train the adapter for a second."""
    model, tokenizer, examples = model or llama(), tokenizer or tiny.tokenizer(), examples_of(pairs)
    attach(
        model, r=8, alpha=24.0, targets="all-linear", variant="lora", rule="alpha/r", init="gaussian", dropout=0.2,
        rank_pattern={}, alpha_pattern={}, layers=None, seed=0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0.0)
    rows = encode_all(examples, tokenizer, 512).encoded
    engine = plain(model)
    batches = micro_batches(rows, range(len(rows)), 4096, engine.packing)
    supervised = sum(batch.supervised_tokens for batch in batches)
    for _ in range(120):
        for batch in batches:
            (engine.loss(batch) / supervised).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Learned(model, tokenizer, examples)
