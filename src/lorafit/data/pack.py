"""Rows of a step -> batches of tensors. The only file of `data` that imports torch.

A packed batch is its rows one after the other. The prefix of a family (`batching`) stands once, in front, and each row
continues it. Everything a token sees is the same as in its row alone. What no prediction depends on is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lorafit.data.batching import Family, find_families, input_of, length_step, padded_groups, read_tokens, share_out
from lorafit.data.store import Encoded, Known
from lorafit.engine.batch import CHUNK, MAX_PAIRS, PAIRS_PER_CALL, Batch, Bucket
from lorafit.engine.packing import WIDTH_STEP, Packing


def micro_batches(
    encoded: Sequence[Encoded], row_ids: Sequence[int], micro_tokens: int, packing: Packing
) -> list[Batch]:
    """The rows of one optimizer step as batches that compute at most micro_tokens tokens each.

    A row longer than micro_tokens stands alone. Longest first where padded, so that memory peaks at once.
    """
    if isinstance(encoded, Known):
        lots = (row_ids[first : first + micro_tokens] for first in range(0, len(row_ids), micro_tokens))
        return [_of_known(encoded, lot) for lot in lots]
    if packing.padded:
        groups = padded_groups(encoded, row_ids, micro_tokens, packing)
        return [_pad(encoded, rows, packing) for rows in groups]
    found = find_families(encoded, row_ids, packing.share_prefix)
    return [_pack(encoded, parts) for parts in share_out(encoded, found, micro_tokens)]


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
    filling = -at % length_step(at)
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


def _of_known(rows: Known, chosen: Sequence[int]) -> Batch:
    """A token for each label, its number, which predicts it."""
    pairs = rows.pairs(chosen)
    ids = torch.from_numpy(pairs + rows.first)[:, None]
    return Batch(
        input_ids=ids,
        position_ids=torch.zeros_like(ids),
        attention_mask=torch.ones_like(ids),
        layout=None,
        token_rows=torch.from_numpy(np.repeat(chosen, np.diff(rows.starts)[chosen]))[:, None],
        predicts=torch.arange(len(ids)),
        targets=torch.from_numpy(rows.targets[pairs]),
        weights=torch.ones(len(ids)),
        rows=len(chosen),
        real_tokens=int(rows.tokens[chosen].sum()),
        supervised_tokens=len(ids),
    )


def pair_numbers(batch: Batch, starts: NDArray[np.int64]) -> torch.Tensor:
    """Of each of the batch's pairs its number among those of all rows: (pairs,). starts: as `store.starts_of`.

    For rows that have nothing predicted in common: a row's pairs stand one after the other, in its order.
    """
    rows = batch.token_rows.flatten()[batch.predicts].cpu()
    places = torch.arange(len(rows))
    begins = torch.cat([torch.ones(1, dtype=torch.bool), rows[1:] != rows[:-1]])
    first = torch.where(begins, places, 0).cummax(0).values
    return torch.from_numpy(starts)[rows] + places - first


# --- padded ---------------------------------------------------------------------------------------------------------


def _pad(encoded: Sequence[Encoded], row_ids: list[int], packing: Packing) -> Batch:
    """Rows side by side, padded on the right to the longest. Padding is any token: it is masked by position."""
    rows = [encoded[row] for row in row_ids]
    inputs, ats = [input_of(row, packing.apart) for row in rows], [np.flatnonzero(row.supervised) for row in rows]
    lengths = np.array([len(ids) for ids in inputs])
    width = packing.width(int(lengths.max()))
    input_ids = np.stack([np.pad(ids.astype(np.int64), (0, width - len(ids))) for ids in inputs])
    # Of cells that are no input, those before one's own are left out.
    places = [at - np.arange(len(at)) if packing.apart else at for at in ats]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(width).expand(len(rows), -1),
        attention_mask=torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64)),
        layout=None,
        token_rows=torch.tensor(row_ids)[:, None].expand(-1, width),
        predicts=torch.from_numpy(np.concatenate([n * width + at - 1 for n, at in enumerate(places)])),
        targets=torch.from_numpy(
            np.concatenate([row.input_ids[at] for row, at in zip(rows, ats, strict=True)]).astype(np.int64)
        ),
        weights=torch.ones(sum(map(len, places))),
        rows=len(rows),
        real_tokens=sum(len(row.input_ids) for row in rows),
        supervised_tokens=sum(map(len, places)),
    )
