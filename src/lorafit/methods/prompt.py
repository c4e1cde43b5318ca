"""Prompt tuning: the embeddings of virtual tokens in front of every row are trained, and nothing else.

Source: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, section 2.
"""

from __future__ import annotations

import torch
from torch import nn

from lorafit.config import MethodConfig
from lorafit.methods import wrapped
from lorafit.methods.method import Attached, Beginning
from lorafit.methods.virtual import first_ids, virtual_embedding


def attach(model: nn.Module, config: MethodConfig) -> Attached:
    """Virtual tokens that start as random ones of the vocabulary, until `start`."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    ids = first_ids([], config.virtual_tokens, int(embedding.num_embeddings), config.seed)  # type: ignore[arg-type]
    name, made = virtual_embedding(model, config.virtual_tokens, _rows(embedding, ids))
    return wrapped.attached(model, {name: made}, f"a prompt of {config.virtual_tokens} virtual tokens")


def start(model: nn.Module, beginning: Beginning) -> list[str]:
    """Let them start as --prompt-text, or as tokens that stand in the rows. Source: Lester et al., section 3.2.1."""
    made = model._lorafit_lead
    ids = first_ids(beginning.first_ids, made.tokens, made.known, beginning.config.seed)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        made.rows.copy_(_rows(made.base, ids))  # type: ignore[union-attr, operator, arg-type]
    return [f"virtual tokens start as {beginning.told}"]


@torch.no_grad()
def _rows(embedding: nn.Module, ids: list[int]) -> torch.Tensor:
    """What the embedding gives for these tokens, its own scale included: (tokens, width) float32."""
    device = next((p.device for p in embedding.parameters()), torch.device("cpu"))
    rows: torch.Tensor = embedding(torch.tensor(ids, device=device))
    return rows.float()


METHOD = wrapped.method(attach, start)
