"""How far rows are from what a model knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lorafit.data.formats import read_examples
from lorafit.data.mask import encode_all
from lorafit.data.rows import Row
from lorafit.engine.engine import prepare
from lorafit.rank import distance
from tests import tiny


def encoded(records: list[dict[str, Any]], seq_len: int = 512) -> Any:
    examples = read_examples([Row(record, f"row {n}") for n, record in enumerate(records)])
    return encode_all(examples, tiny.tokenizer(), seq_len).encoded


def test_the_models_own_answers_are_nearer_than_rows_of_another_kind_and_their_loss_is_its_entropy() -> None:
    model, tokenizer = tiny.llama().requires_grad_(False), tiny.tokenizer()
    rows = encoded([tiny.chat_row(f"what is {n}", "it is said " * (1 + n % 3)) for n in range(40)])
    reference = encoded([{"text": "the ferry left at seven"}])
    found = distance.measure(prepare(model, share_prefix=True), model, tokenizer, rows, reference, 256, 0)
    assert found.surprise > 1  # a random model says nothing like it
    own = distance.own_answers(model, tokenizer, rows, 0)
    entropies, variance, tokens = 0.0, 0.0, 0
    for row in own:
        with torch.no_grad():
            chances = torch.log_softmax(model(torch.tensor(row.input_ids)[None].long()).logits[0, :-1], -1)
        at = torch.tensor(np.flatnonzero(row.supervised)) - 1
        each = -(chances[at].exp() * chances[at]).sum(-1)
        entropies += float(each.sum())
        variance += float((chances[at].exp() * (-chances[at] - each[:, None]).square()).sum())
        tokens += len(at)
    # What is drawn from a distribution has its entropy as its mean loss, and this variance.
    assert found.own == pytest.approx(entropies / tokens, abs=4 * variance**0.5 / tokens)


def test_the_rows_that_are_furthest_come_first() -> None:
    model, tokenizer = tiny.llama().requires_grad_(False), tiny.tokenizer()
    rows = encoded([{"text": text} for text in ("aaaa aaaa", "zqzq xjxj", "aaaa bbbb")])
    found = distance.measure(prepare(model, share_prefix=True), model, tokenizer, rows, rows, 256, 0)
    assert found.reference == pytest.approx(found.data, rel=1e-5)
    order = found.furthest(2)
    assert len(order) == 2 and found.by_row[order[0]] == found.by_row.max()
    assert found.data == pytest.approx((found.by_row * found.tokens).sum() / found.tokens.sum())


def test_rows_longer_than_the_context_are_gone_on_with_where_there_is_room() -> None:
    model, tokenizer = tiny.llama().requires_grad_(False), tiny.tokenizer()  # reads 512 tokens
    (text,) = encoded([{"text": "it is said " * 100}], 2048)
    (own,) = distance.own_answers(model, tokenizer, [text], 0)
    assert len(text.input_ids) > 1024 and own.prompt_length == 256
    long, short = encoded([tiny.chat_row("a" * 600, "no"), tiny.chat_row("is 1 odd?", "yes")], 2048)
    (own,) = distance.own_answers(model, tokenizer, [long, short], 0)
    assert own.prompt_length == short.prompt_length
