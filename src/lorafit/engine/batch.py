"""What the engine computes on: the tokens of some rows, which of them predict what, and who sees whom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Queries of one attention product. A longer row is cut into chunks, so that a query is not multiplied with every later
# key; 128 keeps the products large enough for the matrix units.
CHUNK = 128
# (query, key) pairs of one product: its scores stay within a few MB, near the cores.
MAX_PAIRS = 1 << 18
# What one more group of rows costs in calls, as pairs that could be computed meanwhile.
PAIRS_PER_CALL = 16_000


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Rows of like length whose attention is one batched product, padded to the longest of them.

    tokens: (rows * width,) int32, positions in the batch, -1 for padding. lengths: (rows,) int32.
    prefix_start, prefix: the run of tokens that all rows continue; they see it whole. prefix is 0 where there is none.
    """

    tokens: Tensor
    lengths: Tensor
    width: int
    prefix_start: int
    prefix: int

    @property
    def rows(self) -> int:
        """How many rows stand side by side."""
        return len(self.lengths)

    @property
    def attended_pairs(self) -> int:
        """(query, key) pairs that a causal attention needs: with the prefix, itself and what stands before it."""
        lengths = self.lengths.long()
        return int((lengths * self.prefix + lengths * (lengths + 1) // 2).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some rows, one after the other without padding (`layout` says who sees whom), or padded side by side.

    input_ids, position_ids: (1, tokens) or (rows, width) int64; where packed, a few tokens at the end may belong to no
    row, so that shapes repeat from batch to batch. attention_mask: (rows, width) int64, None where packed.
    layout: the attention's buckets, None where padded.
    token_rows: like input_ids: the number of the row in the data set that a token stands in, for dropout's masks.
    predicts: (pairs,) int64, flat positions whose output predicts a supervised token; targets: (pairs,) int64, that
    token; weights: (pairs,) float32, in how many rows (more than 1 only inside a prefix that rows share).
    rows: how many. real_tokens: of all rows. supervised_tokens: of them with a loss, the sum of weights.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    layout: tuple[Bucket, ...] | None
    token_rows: Tensor
    predicts: Tensor
    targets: Tensor
    weights: Tensor
    rows: int
    real_tokens: int
    supervised_tokens: int

    def row_places(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Each row's number with the flat positions of its tokens in order, those of a shared prefix included."""
        rows = self.token_rows
        if self.layout is None:
            lengths = self.attention_mask.sum(1).tolist() if self.attention_mask is not None else []
            for number, length in enumerate(lengths):
                first = number * rows.shape[1]
                yield int(rows[number, 0]), np.arange(first, first + length)
            return
        prefixes = {(bucket.prefix_start, bucket.prefix) for bucket in self.layout if bucket.prefix}
        for bucket in self.layout:
            before = np.arange(bucket.prefix_start, bucket.prefix_start + bucket.prefix)
            for tokens, length in zip(
                bucket.tokens.view(bucket.rows, -1).tolist(), bucket.lengths.tolist(), strict=True
            ):
                if (tokens[0], length) not in prefixes:  # a prefix is no row
                    yield int(rows[0, tokens[0]]), np.concatenate([before, tokens[:length]])

    @property
    def predicting(self) -> Tensor:
        """(p,) int64: the flat positions that predict something, each once, in order."""
        places: Tensor = torch.unique(self.predicts)
        return places

    @property
    def computed_tokens(self) -> int:
        """Tokens that the model runs on: with padding, and with a shared prefix counted once."""
        return self.input_ids.numel()

    @property
    def attended_pairs(self) -> int:
        """(query, key) pairs that attention is computed for: causal ones where packed, all of a row where padded."""
        if self.layout is None:
            return self.input_ids.numel() * self.input_ids.shape[1]
        return sum(bucket.attended_pairs for bucket in self.layout)
