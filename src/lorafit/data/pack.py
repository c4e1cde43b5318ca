"""Encoded rows -> the order of an epoch, and padded batches of tensors. The only file of `data` that imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorafit.data.mask import Encoded

IGNORED = -100  # torch's cross_entropy leaves such labels out (its default ignore_index)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some rows side by side, padded on the right to the longest of them.

    input_ids: (rows, tokens) int64. attention_mask: (rows, tokens) int64, 1 for a real token, 0 for padding.
    supervised: (rows, tokens) bool; supervised[:, t]: token t has a loss, predicted from the tokens before t, so
    column 0 is False. row_ids: (rows,) int64, numbers of the rows in the encoded set.
    real_tokens: without padding. computed_tokens: with it. supervised_tokens: with a loss.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    supervised: torch.Tensor
    row_ids: torch.Tensor
    real_tokens: int
    computed_tokens: int
    supervised_tokens: int

    @property
    def labels(self) -> torch.Tensor:
        """(rows, tokens) int64: the token's id where it has a loss, else -100. Not shifted: transformers shifts."""
        return self.input_ids.masked_fill(~self.supervised, IGNORED)


def step_rows(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of each optimizer step of one epoch: every row once, in an order of `seed` and `epoch` alone.

    count rows in steps of batch_size; the last step may be smaller. seed, epoch: 0 to 2^64 - 1. The raw stream of a
    Philox counter is the same on every machine and in every numpy; its permutations are not promised to be.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    order = np.argsort(keys, kind="stable").tolist()
    return [order[first : first + batch_size] for first in range(0, count, batch_size)]


def micro_batches(encoded: Sequence[Encoded], row_ids: Sequence[int], micro_tokens: int, pad_id: int) -> list[Batch]:
    """The rows of one optimizer step as batches of at most micro_tokens tokens each, padding included.

    Longest rows first, so that rows of like length share a batch and memory peaks at once; a row longer than
    micro_tokens stands alone. pad_id: any valid id; padding is told by the attention mask and has no loss.
    """
    order = sorted(row_ids, key=lambda row: (-len(encoded[row].input_ids), row))
    batches = []
    first = 0
    while first < len(order):
        width = len(encoded[order[first]].input_ids)
        rows = order[first : first + max(1, micro_tokens // width)]
        batches.append(_pad([encoded[row] for row in rows], rows, width, pad_id))
        first += len(rows)
    return batches


def _pad(rows: list[Encoded], row_ids: list[int], width: int, pad_id: int) -> Batch:
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    supervised = np.zeros((len(rows), width), dtype=np.bool_)
    lengths = np.array([len(row.input_ids) for row in rows])
    for number, row in enumerate(rows):
        input_ids[number, : lengths[number]] = row.input_ids
        supervised[number, : lengths[number]] = row.supervised
    attention_mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        supervised=torch.from_numpy(supervised),
        row_ids=torch.tensor(row_ids, dtype=torch.int64),
        real_tokens=int(lengths.sum()),
        computed_tokens=input_ids.size,
        supervised_tokens=int(supervised.sum()),
    )
