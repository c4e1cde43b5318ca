"""Which rows make up a step, and which of those go through the model together: numbers alone, no tensors.

Rows that begin with the same tokens form a family: their common prefix is computed once, and each row continues it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorafit.data.store import Encoded
from lorafit.engine.packing import Packing

# Micro-batches of a step may be larger than their mean by so much, the least that does: rows are not cut.
EVENNESS = (1.02, 1.05, 1.1, 1.2, 1.4)
# A prefix is shared where that saves at least so many tokens: it takes products of its own in every layer.
MIN_SAVED_TOKENS = 32
# What one more pass over rows side by side costs in calls, as tokens that could be computed meanwhile.
TOKENS_PER_PASS = 64
# Families are sought among so many rows at a time: the search is quadratic.
ROWS_COMPARED = 128


def step_rows(count: int, batch_size: int, seed: int | None, epoch: int, step: int) -> list[int]:
    """Row numbers of one optimizer step of an epoch: every row once, in an order of `seed` and `epoch` alone.

    count rows in steps of batch_size; the last step may be smaller. seed, epoch: 0 to 2^64 - 1; without a seed the rows
    keep the order they came in. step: from 0, of the epoch; beyond the last one there are no rows.
    """
    first, end = step * batch_size, min((step + 1) * batch_size, count)
    if seed is None:
        return list(range(first, end))
    rows: list[int] = _order(count, seed, epoch)[first:end].tolist()
    return rows


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """All rows of an epoch in their order.

    The raw stream of a Philox counter is the same on every machine and in every numpy; its permutations are not
    promised to be.
    """
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    return np.argsort(keys, kind="stable")


def read_tokens(row: Encoded) -> int:
    """How many of a row's tokens the model has to read: those before its last token with a loss, at least one.

    What comes after, and that token itself, is seen by nothing that is predicted: an end-of-turn token, a line break.
    """
    supervised = np.flatnonzero(row.supervised)
    return int(supervised[-1]) if len(supervised) else 1


def read(row: Encoded) -> NDArray[np.int32]:
    """Those tokens."""
    return row.input_ids[: read_tokens(row)]


def input_of(row: Encoded, apart: bool) -> NDArray[np.int32]:
    """What the model reads of a row. apart: whether what is predicted is no input: it is left out then."""
    return row.input_ids[~row.supervised] if apart else read(row)


@dataclass(frozen=True, slots=True)
class Family:
    """Rows that begin with the same `prefix` tokens. Each goes on with at least one token of its own."""

    prefix: int
    rows: list[int]


def find_families(encoded: Sequence[Encoded], row_ids: Sequence[int], share_prefix: bool) -> list[Family]:
    """The rows, grouped so that shared prefixes save the most tokens; each alone where none is to be shared."""
    if not share_prefix:
        return [Family(0, [row]) for row in row_ids]
    # Big-endian bytes sort as the token ids do; the row's number breaks ties, so the order depends on the rows alone.
    ordered = sorted(row_ids, key=lambda row: (read(encoded[row]).astype(">i4").tobytes(), row))
    return [
        family
        for first in range(0, len(ordered), ROWS_COMPARED)
        for family in _best_split(encoded, ordered[first : first + ROWS_COMPARED])
    ]


def _best_split(encoded: Sequence[Encoded], ordered: list[int]) -> list[Family]:
    """Cut sorted rows into runs; a run of n rows with a common prefix of p tokens saves (n - 1) p. Exact, by DP."""
    common = [_common(read(encoded[a]), read(encoded[b])) for a, b in itertools.pairwise(ordered)]
    best, start = [0] * (len(ordered) + 1), [0] * (len(ordered) + 1)
    prefixes = [0] * (len(ordered) + 1)
    for end in range(1, len(ordered) + 1):
        best[end], start[end], prefix = best[end - 1], end - 1, 1 << 62
        for first in range(end - 2, -1, -1):
            prefix = min(prefix, common[first])
            saved = (end - first - 1) * prefix
            if saved >= MIN_SAVED_TOKENS and best[first] + saved - MIN_SAVED_TOKENS > best[end]:
                best[end], start[end], prefixes[end] = best[first] + saved - MIN_SAVED_TOKENS, first, prefix
            if prefix == 0:
                break
    families: list[Family] = []
    end = len(ordered)
    while end:
        families.append(Family(prefixes[end] if end - start[end] > 1 else 0, ordered[start[end] : end]))
        end = start[end]
    return families[::-1]


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens two rows begin with in common, one less than the shorter row at most."""
    length = min(len(a), len(b)) - 1
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else max(length, 0)


def share_out(encoded: Sequence[Encoded], families: list[Family], micro_tokens: int) -> list[list[Family]]:
    """Families into as few batches of micro_tokens as `_fill` makes, of like size: the largest takes the memory."""
    batches = list(_fill(encoded, families, micro_tokens))
    computed = sum(map(partial(_tokens, encoded), itertools.chain(*batches)))
    for slack in EVENNESS if len(batches) > 1 else ():
        even = list(_fill(encoded, families, min(micro_tokens, math.ceil(slack * computed / len(batches)))))
        if len(even) == len(batches):
            return even
    return batches


def _tokens(encoded: Sequence[Encoded], family: Family) -> int:
    return family.prefix + sum(read_tokens(encoded[row]) - family.prefix for row in family.rows)


def _fill(encoded: Sequence[Encoded], families: list[Family], micro_tokens: int) -> Iterator[list[Family]]:
    """Families into batches of micro_tokens; one that does not fit goes on in the next, its prefix computed again."""
    batch: list[Family] = []
    free = micro_tokens
    for family in families:
        taken: list[int] = []
        for row in sorted(family.rows, key=lambda row: (-read_tokens(encoded[row]), row)):
            cost = read_tokens(encoded[row]) - (family.prefix if taken else 0)
            if cost > free and (batch or taken):
                yield [*batch, Family(family.prefix, taken)] if taken else batch
                batch, taken, free = [], [], micro_tokens
                cost = read_tokens(encoded[row])
            taken.append(row)
            free -= cost
        batch.append(Family(family.prefix if len(taken) > 1 else 0, taken))
    yield batch


def length_step(tokens: int) -> int:
    """A packed batch is as long as a multiple of this, 16 to 64: at most a few percent longer, and far fewer shapes.

    oneDNN makes a primitive for every shape of a product that it meets (about 0.5 ms and 0.6 MB each, and kept).
    """
    return min(64, max(16, 1 << (max(tokens, 32) // 32).bit_length() - 1))


def padded_groups(
    encoded: Sequence[Encoded], row_ids: Sequence[int], micro_tokens: int, packing: Packing
) -> Iterator[list[int]]:
    """Rows that stand side by side, padded to the first of them, the longest; of micro_tokens at most, or one row.

    Short rows stand apart from long ones where that saves more tokens than one more pass is worth.
    """
    length = {row: len(input_of(encoded[row], packing.apart)) for row in row_ids}
    order = sorted(row_ids, key=lambda row: (-length[row], row))
    for alike in _alike(order, [packing.width(length[row]) for row in order], micro_tokens):
        count = max(1, micro_tokens // packing.width(length[alike[0]]))
        yield from (alike[at : at + count] for at in range(0, len(alike), count))


def _alike(order: list[int], widths: list[int], micro_tokens: int) -> list[list[int]]:
    """The rows of `order`, the widest first, cut where their width changes: least tokens, passes counted as tokens."""
    starts = [at for at, width in enumerate(widths) if at == 0 or width != widths[at - 1]]
    ends = [*starts[1:], len(order)]
    best = [(0, 0)]  # of the rows before each end: (tokens, where their last group begins)
    for last, end in enumerate(ends):
        tried = []
        for first in range(last + 1):
            rows, width = end - starts[first], widths[starts[first]]
            passes = -(-rows // max(1, micro_tokens // width))
            tried.append((best[first][0] + rows * width + passes * TOKENS_PER_PASS, first))
        best.append(min(tried))
    groups, last = list[list[int]](), len(ends)
    while last:
        first = best[last][1]
        groups.append(order[starts[first] : ends[last - 1]])
        last = first
    return groups[::-1]


# --- counted --------------------------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """What one packed batch takes.

    tokens: that the model runs on. predicted: whose logits are computed. predicting: different positions that predict
    something. pairs: of a query and a key that attention multiplies. As `engine.batch.Batch` has them.
    """

    tokens: int
    predicted: int
    predicting: int
    pairs: int


def counted(
    encoded: Sequence[Encoded], row_ids: Sequence[int], micro_tokens: int, share_prefix: bool = True
) -> list[Counted]:
    """What `pack.micro_batches` would make of these rows, without making it."""
    found = find_families(encoded, row_ids, share_prefix)
    return [_count(encoded, own) for own in share_out(encoded, found, micro_tokens)]


def counted_side_by_side(
    encoded: Sequence[Encoded], row_ids: Sequence[int], micro_tokens: int, packing: Packing
) -> list[Counted]:
    """The same of rows that stand side by side, padded to the longest."""
    found = []
    for group in padded_groups(encoded, row_ids, micro_tokens, packing):
        width = packing.width(len(input_of(encoded[group[0]], packing.apart)))
        predicted = sum(int(encoded[row].supervised.sum()) for row in group)
        found.append(Counted(len(group) * width, predicted, predicted, len(group) * width**2))
    return found


def _count(encoded: Sequence[Encoded], batch: list[Family]) -> Counted:
    tokens = sum(_tokens(encoded, family) for family in batch)
    predicted = predicting = pairs = 0
    for family in batch:
        rows, prefix = [encoded[row] for row in family.rows], family.prefix
        shared = int(np.any([row.supervised[:prefix] for row in rows], axis=0).sum()) if prefix else 0
        own = [int(row.supervised[prefix:].sum()) for row in rows]
        by_prefix = sum(bool(row.supervised[prefix]) for row in rows) if prefix else 0  # all by the prefix's last token
        predicted += shared + sum(own)
        predicting += shared + sum(own) - max(0, by_prefix - 1)
        pairs += _causal(prefix) + sum(_causal(length) + length * prefix for length in _own_lengths(rows, prefix))
    return Counted(tokens + -tokens % length_step(tokens), predicted, predicting, pairs)


def _own_lengths(rows: list[Encoded], prefix: int) -> list[int]:
    return [read_tokens(row) - prefix for row in rows]


def _causal(length: int) -> int:
    return length * (length + 1) // 2
