"""How far rows are from what a model knows already: its loss on them against that on text it finds unsurprising."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorafit.data.store import Encoded
from lorafit.engine.engine import Engine
from lorafit.infer.evaluate import row_losses
from lorafit.infer.generate import MOST_PROMPT_TOKENS, answer, context_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rows that the model itself goes on with, and the most tokens of each.
OWN_ROWS, OWN_TOKENS = 32, 48


@dataclass(frozen=True)
class Distance:
    """Losses of a model before any training, in nats per supervised token.

    data: on the rows. own: on what it writes in the place of their replies, drawn at temperature 1, which is the
    entropy of its own answers. reference: on plain text that is none of either. by_row: (rows,) the loss of each.
    tokens: (rows,) how many supervised tokens each has.
    """

    data: float
    own: float
    reference: float
    by_row: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def surprise(self) -> float:
        """Nats per token that the rows surprise it by, beyond what its own answers do."""
        return self.data - self.own

    def furthest(self, count: int) -> list[int]:
        """Numbers of the rows with the largest loss, the largest first."""
        return [int(number) for number in np.argsort(-self.by_row, kind="stable")[:count]]


def measure(
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    reference: Sequence[Encoded],
    micro_tokens: int,
    seed: int,
) -> Distance:
    """The distance of `rows`. model: as `engine` has it, an adapter on it without effect."""
    engine.model.eval()
    nats, tokens = row_losses(engine, rows, micro_tokens)
    own = own_answers(model, tokenizer, rows, seed)
    return Distance(
        data=float(nats.sum() / tokens.sum()),
        own=_loss(engine, own, micro_tokens),
        reference=_loss(engine, reference, micro_tokens),
        by_row=nats / tokens,
        tokens=tokens,
    )


def _loss(engine: Engine, rows: Sequence[Encoded], micro_tokens: int) -> float:
    nats, tokens = row_losses(engine, rows, micro_tokens)
    return float(nats.sum() / max(1, tokens.sum()))


def evenly(count: int, wanted: int) -> list[int]:
    """So many of the numbers below `count`, two at least, or all of them; the first and the last are among them."""
    return [int(n) for n in np.linspace(0, count - 1, min(count, wanted))]


def own_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    seed: int,
) -> list[Encoded]:
    """Some of the rows, evenly chosen, with what the model writes after their prompts in the place of their replies.

    As long as the reply, at most; running text is gone on with from its middle. Rows it says nothing to are left out,
    and those whose prompt leaves it no room.
    """
    room = context_tokens(model) or MOST_PROMPT_TOKENS
    fit = [row for row in rows if row.prompt_length < room]
    chosen = [fit[number] for number in evenly(len(fit), OWN_ROWS)]
    starts = [row.prompt_length or max(1, min(len(row.input_ids), room) // 2) for row in chosen]
    prompts = [[int(token) for token in row.input_ids[:start]] for row, start in zip(chosen, starts, strict=True)]
    most = [max(1, min(OWN_TOKENS, len(row.input_ids) - start)) for row, start in zip(chosen, starts, strict=True)]
    said = answer(
        model, tokenizer, prompts, batch_size=OWN_ROWS, max_new_tokens=most, temperature=1.0, seed=seed,
        on_answer=lambda: None,
    )  # fmt: skip
    found = []
    for row, start, prompt, one in zip(chosen, starts, prompts, said, strict=True):
        whole = np.array([*prompt, *one.ids], dtype=np.int32)
        if one.ids:
            found.append(Encoded(whole, np.arange(len(whole)) >= start, start, row.origin))
    return found
