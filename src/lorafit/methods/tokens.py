"""Added tokens, beside whatever method: the embeddings of just those tokens are trained with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorafit.lora.tokens import attach_rows
from lorafit.methods.method import Attached
from lorafit.units import format_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach_tokens(
    model: PreTrainedModel, ids: Sequence[int], pieces: Sequence[Sequence[int]], attached: Attached
) -> Attached:
    """Train the rows of these tokens too; `lora.tokens.make_room` must have given the model as many as they need.

    pieces: of each, the tokens that its text was before; it starts as their mean. Returns `attached` with what this
    adds. Raises TargetError where the embedding or the output head is adapted already.
    """
    made = attach_rows(model, ids, pieces)
    count = sum(rows.rows.numel() for rows in made.values() if rows.tied_to is None)
    summary = f"{attached.summary}, and the embeddings of {format_count(len(ids))} tokens"
    return replace(attached, trainable_params=attached.trainable_params + count, summary=summary)
