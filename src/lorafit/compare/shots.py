"""Rows with examples in front of them: what the base model can do without training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorafit.data.example import Chat, Completion, Example, Message
from lorafit.data.template import as_chat


def with_examples(
    rows: Sequence[Example], drawn_from: Sequence[Example], shots: int, seed: int, templated: bool
) -> list[Example] | None:
    """Each row after `shots` examples, the same for all, which are only read; None for running text, which has none.

    drawn_from: training rows, from which the seed draws those of different replies first. templated: whether the model
    has a chat template, by which prompts and completions become conversations.
    """
    both = [_as_used(row, templated) for row in (*drawn_from, *rows)]
    chosen = _draw(both[: len(drawn_from)], shots, seed)
    own = both[len(drawn_from) :]
    if all(isinstance(row, Chat) for row in both):
        return [_chat_after(row, chosen) for row in own if isinstance(row, Chat)]
    if all(isinstance(row, Completion) for row in both):
        return [_completion_after(row, chosen) for row in own if isinstance(row, Completion)]
    return None


def _as_used(row: Example, templated: bool) -> Example:
    return as_chat(row) if templated and isinstance(row, Completion) else row


def _draw(rows: Sequence[Example], shots: int, seed: int) -> list[Example]:
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    first: list[int] = []
    replies = set[str]()
    for number in order:  # of each reply one, as long as there are such
        reply = _reply(rows[number])
        if reply not in replies:
            first.append(number)
            replies.add(reply)
    rest = [number for number in order if number not in set(first)]
    return [rows[number] for number in (*first, *rest)[:shots]]


def _reply(row: Example) -> str:
    if isinstance(row, Chat):
        return str(row.messages[-1]["content"])
    return row.completion if isinstance(row, Completion) else ""


def _chat_after(row: Chat, chosen: Sequence[Example]) -> Chat:
    """The row's own system message stays in front; those of the examples are left out."""
    head = row.messages[:1] if row.messages and row.messages[0]["role"] == "system" else ()
    before: list[Message] = []
    for example in chosen:
        if isinstance(example, Chat):
            before += [message for message in example.messages if message["role"] != "system"]
    messages = (*head, *before, *row.messages[len(head) :])
    unlearned = frozenset(number + len(before) for number in row.unlearned)
    context = max(row.context, len(head)) + len(before)
    return Chat(messages, row.origin, context, row.tools, unlearned)


def _completion_after(row: Completion, chosen: Sequence[Example]) -> Completion:
    told = "".join(f"{one.prompt}{one.completion}\n\n" for one in chosen if isinstance(one, Completion))
    return Completion(told + row.prompt, row.completion, row.origin)
