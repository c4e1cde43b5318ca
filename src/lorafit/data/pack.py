"""Encoded rows -> the order of an epoch, and batches of tensors. The only file of `data` that imports torch.

A packed batch is its rows one after the other. Rows that begin with the same tokens form a family: their common prefix
stands once, in front, and each row continues it. Everything a token sees is the same as in its row alone. Tokens that
no prediction depends on are left out.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from lorafit.data.store import Encoded
from lorafit.engine.batch import CHUNK, MAX_PAIRS, PAIRS_PER_CALL, WIDTH_STEP, Batch, Bucket, Packing

# Micro-batches of a step may be larger than their mean by so much, the least that does: rows are not cut.
EVENNESS = (1.02, 1.05, 1.1, 1.2, 1.4)
# A prefix is shared where that saves at least so many tokens: it takes products of its own in every layer.
MIN_SAVED_TOKENS = 32
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


def micro_batches(
    encoded: Sequence[Encoded], row_ids: Sequence[int], micro_tokens: int, packing: Packing
) -> list[Batch]:
    """The rows of one optimizer step as batches that compute at most micro_tokens tokens each.

    A row longer than micro_tokens stands alone. Longest first where padded, so that memory peaks at once.
    """
    if packing.padded:
        return [_pad(encoded, rows) for rows in _padded_groups(encoded, row_ids, micro_tokens)]
    families = _families(encoded, row_ids) if packing.share_prefix else [Family(0, [row]) for row in row_ids]
    return [_pack(encoded, parts) for parts in _share_out(encoded, families, micro_tokens)]


def read_tokens(row: Encoded) -> int:
    """How many of a row's tokens the model has to read: those before its last token with a loss, at least one.

    What comes after, and that token itself, is seen by nothing that is predicted: an end-of-turn token, a line break.
    """
    supervised = np.flatnonzero(row.supervised)
    return int(supervised[-1]) if len(supervised) else 1


def _read(row: Encoded) -> NDArray[np.int32]:
    return row.input_ids[: read_tokens(row)]


# --- packed ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Family:
    """Rows that begin with the same `prefix` tokens. Each goes on with at least one token of its own."""

    prefix: int
    rows: list[int]


def _families(encoded: Sequence[Encoded], row_ids: Sequence[int]) -> list[Family]:
    """The rows, grouped so that shared prefixes save the most tokens."""
    # Big-endian bytes sort as the token ids do; the row's number breaks ties, so the order depends on the rows alone.
    ordered = sorted(row_ids, key=lambda row: (_read(encoded[row]).astype(">i4").tobytes(), row))
    return [
        family
        for first in range(0, len(ordered), ROWS_COMPARED)
        for family in _best_split(encoded, ordered[first : first + ROWS_COMPARED])
    ]


def _best_split(encoded: Sequence[Encoded], ordered: list[int]) -> list[Family]:
    """Cut sorted rows into runs; a run of n rows with a common prefix of p tokens saves (n - 1) p. Exact, by DP."""
    common = [_common(_read(encoded[a]), _read(encoded[b])) for a, b in itertools.pairwise(ordered)]
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


def _share_out(encoded: Sequence[Encoded], families: list[Family], micro_tokens: int) -> list[list[Family]]:
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


@dataclass(frozen=True, slots=True)
class _Run:
    """Tokens first..first+length-1 of a batch: a row, or what it adds to a prefix, or a prefix itself."""

    first: int
    length: int
    prefix_start: int
    prefix: int


def _pack(encoded: Sequence[Encoded], families: list[Family]) -> Batch:
    ids: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int64]] = []
    owners: list[tuple[int, int]] = []
    runs: list[_Run] = []
    pairs = _Pairs()
    at = 0

    def place(row: int, begin: int, end: int, prefix_start: int) -> int:
        nonlocal at
        ids.append(encoded[row].input_ids[begin:end])
        positions.append(np.arange(begin, end))
        owners.append((row, end - begin))
        runs.append(_Run(at, end - begin, prefix_start, begin))
        at += end - begin
        return at - (end - begin)

    for family in families:
        shared = place(family.rows[0], 0, family.prefix, 0) if family.prefix else 0
        pairs.add_shared([encoded[row] for row in family.rows], family.prefix, shared)
        for row in family.rows:
            own = place(row, family.prefix, read_tokens(encoded[row]), shared)
            pairs.add_own(encoded[row], family.prefix, shared, own)
    filling = -at % _length_step(at)
    ids.append(np.zeros(filling, dtype=np.int32))
    positions.append(np.zeros(filling, dtype=np.int64))
    owners.append((0, filling))
    rows = [row for family in families for row in family.rows]
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        attention_mask=None,
        layout=tuple(_buckets(runs)),
        token_rows=torch.from_numpy(np.repeat(*np.array(owners, dtype=np.int64).T))[None],
        **pairs.tensors(),
        rows=len(rows),
        real_tokens=sum(len(encoded[row].input_ids) for row in rows),
        supervised_tokens=sum(int(encoded[row].supervised.sum()) for row in rows),
    )


def _length_step(tokens: int) -> int:
    """A packed batch is as long as a multiple of this, 16 to 64: at most a few percent longer, and far fewer shapes.

    oneDNN makes a primitive for every shape of a product that it meets (about 0.5 ms and 0.6 MB each, and kept).
    """
    return min(64, max(16, 1 << (max(tokens, 32) // 32).bit_length() - 1))


class _Pairs:
    """Which output position predicts which token, with how many rows that count it."""

    def __init__(self) -> None:
        self.predicts: list[NDArray[np.int64]] = []
        self.targets: list[NDArray[np.int32]] = []
        self.weights: list[NDArray[np.float32]] = []

    def add_shared(self, rows: list[Encoded], prefix: int, start: int) -> None:
        """Supervised tokens inside the common prefix: predicted once, counted once a row."""
        if prefix:
            counts = np.sum([row.supervised[:prefix] for row in rows], axis=0)
            self._add(np.flatnonzero(counts), start - 1, rows[0], counts)

    def add_own(self, row: Encoded, prefix: int, shared: int, own: int) -> None:
        """Supervised tokens after the prefix; the first of them is predicted by the prefix's last token."""
        supervised = np.flatnonzero(row.supervised[prefix:]) + prefix
        ones = np.ones(len(row.input_ids), dtype=np.int64)
        by_prefix = supervised[(supervised == prefix) & (prefix > 0)]
        self._add(by_prefix, shared - 1, row, ones)
        self._add(supervised[len(by_prefix) :], own - prefix - 1, row, ones)

    def _add(self, tokens: NDArray[np.int64], offset: int, row: Encoded, counts: NDArray[np.int64]) -> None:
        self.predicts.append(tokens + offset)
        self.targets.append(row.input_ids[tokens])
        self.weights.append(counts[tokens].astype(np.float32))

    def tensors(self) -> dict[str, torch.Tensor]:
        """As fields of a Batch."""
        return {
            "predicts": torch.from_numpy(np.concatenate(self.predicts).astype(np.int64)),
            "targets": torch.from_numpy(np.concatenate(self.targets).astype(np.int64)),
            "weights": torch.from_numpy(np.concatenate(self.weights).astype(np.float32)),
        }


def _buckets(runs: list[_Run]) -> Iterator[Bucket]:
    """Runs of one prefix and like length together, as many as keep the scores of a chunk of queries small."""
    prefixes = dict.fromkeys((run.prefix_start, run.prefix) for run in runs)
    for start, length in prefixes:
        mine = [run for run in runs if (run.prefix_start, run.prefix) == (start, length)]
        mine.sort(key=lambda run: (-run.length, run.first))
        cuts = _cuts([run.length for run in mine], length)
        yield from (_bucket(mine[a:b]) for a, b in itertools.pairwise(cuts))


def _cuts(lengths: list[int], prefix: int) -> list[int]:
    """Where to cut descending lengths, so that padding and calls together cost least. Exact, by DP."""
    best, start = [0.0] + [np.inf] * len(lengths), [0] * (len(lengths) + 1)
    for end in range(1, len(lengths) + 1):
        for first in range(end - 1, -1, -1):
            width = _width(lengths[first])
            if (end - first) * min(width, CHUNK) * (width + prefix) > MAX_PAIRS and end - first > 1:
                break
            cost = (end - first) * width * (width + prefix) + PAIRS_PER_CALL * -(-width // CHUNK)
            if best[first] + cost < best[end]:
                best[end], start[end] = best[first] + cost, first
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(start[cuts[-1]])
    return cuts[::-1]


def _width(length: int) -> int:
    return -(-length // WIDTH_STEP) * WIDTH_STEP


def _bucket(runs: list[_Run]) -> Bucket:
    width = _width(runs[0].length)
    tokens = np.full((len(runs), width), -1, dtype=np.int32)
    for number, run in enumerate(runs):
        tokens[number, : run.length] = np.arange(run.first, run.first + run.length)
    return Bucket(
        tokens=torch.from_numpy(tokens.ravel()),
        lengths=torch.tensor([run.length for run in runs], dtype=torch.int32),
        width=width,
        prefix_start=runs[0].prefix_start,
        prefix=runs[0].prefix,
    )


# --- padded ---------------------------------------------------------------------------------------------------------


def _padded_groups(encoded: Sequence[Encoded], row_ids: Sequence[int], micro_tokens: int) -> Iterator[list[int]]:
    order = sorted(row_ids, key=lambda row: (-read_tokens(encoded[row]), row))
    while order:
        count = max(1, micro_tokens // read_tokens(encoded[order[0]]))
        yield order[:count]
        order = order[count:]


def _pad(encoded: Sequence[Encoded], row_ids: list[int]) -> Batch:
    """Rows side by side, padded on the right to the longest. Padding is any token: it is masked by position."""
    rows = [encoded[row] for row in row_ids]
    lengths = np.array([read_tokens(row) for row in rows])
    width = int(lengths.max())
    input_ids = np.stack([np.pad(_read(row).astype(np.int64), (0, width - read_tokens(row))) for row in rows])
    places = [np.flatnonzero(row.supervised) for row in rows]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(width).expand(len(rows), -1),
        attention_mask=torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64)),
        layout=None,
        token_rows=torch.tensor(row_ids)[:, None].expand(-1, width),
        predicts=torch.from_numpy(np.concatenate([n * width + at - 1 for n, at in enumerate(places)])),
        targets=torch.from_numpy(
            np.concatenate([row.input_ids[at] for row, at in zip(rows, places, strict=True)]).astype(np.int64)
        ),
        weights=torch.ones(sum(map(len, places))),
        rows=len(rows),
        real_tokens=sum(len(row.input_ids) for row in rows),
        supervised_tokens=sum(map(len, places)),
    )
