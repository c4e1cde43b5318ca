"""What training will really see: counts, lengths, masks, duplicates, leaks and faults, as one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorafit.data.encode import Data
from lorafit.data.labels import members
from lorafit.data.near import NearRows
from lorafit.data.store import Encoded, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOKED_AT = 200_000  # rows among which near duplicates are sought
LOOKED_AT_QUICKLY = 10_000  # rows, before every run
SHOWN_LABELS = 5
SHOWN = 10  # pairs, faults and the like that are named one by one


@dataclass(frozen=True, slots=True)
class Same:
    """Rows that are there twice. count: how many. first: some of them, (row, row it is like, share in common)."""

    count: int
    first: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a row's text, and whether its tokens have a loss."""

    text: str
    supervised: bool


@dataclass(frozen=True, slots=True)
class Report:
    """See the module. lengths: (tokens at most, rows) for each bin. prefix: tokens that all rows begin with.

    shared_share: of all tokens, those that a shared prefix, computed once for all rows, saves. leaks: rows that the
    other data has too. looked_at: rows among which near duplicates were sought.
    """

    data: str
    format: str
    rows: int
    bad_rows: int
    bad: tuple[str, ...]
    pieces: int
    rewritten: int
    tokens: int
    supervised_tokens: int
    longest: int
    cut_rows: int
    cut_tokens: int
    lengths: tuple[tuple[int, int], ...]
    labels: dict[str, int]
    unused_columns: dict[str, int]
    odd_rows: int
    odd: tuple[str, ...]
    equal: Same
    near: Same
    leaks: Same | None
    near_leaks: Same | None
    looked_at: int
    prefix: int
    prefix_text: str
    shared_share: float
    samples: tuple[tuple[str, tuple[Span, ...]], ...]


def inspect(
    name: str, data: Data, tokenizer: PreTrainedTokenizerBase, against: Data | None = None, samples: int = 2
) -> Report:
    """Look at all of it. against: rows that must not be among them. samples: rows that are shown in full."""
    rows, encoded = data.set.encoded, data.set
    prefix = _prefix(rows)
    near = NearRows(prefix)
    return Report(
        data=name,
        format=data.format,
        rows=encoded.rows,
        bad_rows=data.bad_rows,
        bad=data.bad,
        pieces=encoded.pieces,
        rewritten=encoded.rewritten,
        tokens=encoded.tokens,
        supervised_tokens=encoded.supervised_tokens,
        longest=encoded.longest,
        cut_rows=encoded.cut_rows,
        cut_tokens=encoded.cut_tokens,
        lengths=_histogram(rows.lengths),
        labels=counts_of(data),
        unused_columns=dict(data.unused),
        odd_rows=data.odd_rows,
        odd=data.odd,
        equal=_equal(data),
        near=_near(data, near),
        leaks=_leaks(data, against) if against else None,
        near_leaks=_near_leaks(near, rows, against.set.encoded) if against else None,
        looked_at=min(len(rows), LOOKED_AT),
        prefix=prefix,
        prefix_text=str(tokenizer.decode(rows[0].input_ids[:prefix])) if prefix else "",
        shared_share=prefix * (len(rows) - 1) / max(1, encoded.tokens),
        samples=tuple((row.origin, spans(row, tokenizer, data)) for row in rows[:samples]),
    )


def spans(row: Encoded, tokenizer: PreTrainedTokenizerBase, data: Data | None = None) -> tuple[Span, ...]:
    """The row's text as the model sees it, cut where the mask changes. data: that it is of, where it has labels."""
    if data and data.told and data.told.task != "tag":
        text = str(tokenizer.decode(row.input_ids[:-1].tolist()))
        return Span(text, False), Span(f" {', '.join(members(int(row.input_ids[-1]), data.told))}", True)
    parts = groupby(zip(row.input_ids.tolist(), row.supervised.tolist(), strict=True), key=lambda pair: pair[1])
    runs = [(mask, [token for token, _ in pairs]) for mask, pairs in parts]
    if data and data.told:  # a tag behind each word
        names = data.told.names
        return tuple(Span(f"/{names[ids[0]]}" if mask else str(tokenizer.decode(ids)), mask) for mask, ids in runs)
    return tuple(Span(str(tokenizer.decode(ids)), mask) for mask, ids in runs)


def _prefix(rows: Tokens) -> int:
    """Tokens that all rows, or the first LOOKED_AT of them, begin with."""
    first = rows[0].input_ids
    common = len(first)
    for number in range(1, min(len(rows), LOOKED_AT)):
        ids = rows[number].input_ids[:common]
        differ = np.flatnonzero(ids != first[: len(ids)])
        common = int(differ[0]) if len(differ) else len(ids)
        if not common:
            break
    return common if len(rows) > 1 else 0


def _histogram(lengths: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Rows of up to 16, 32, 64, .. tokens."""
    tops = [16]
    while tops[-1] < int(lengths.max()):
        tops.append(2 * tops[-1])
    counts = np.histogram(lengths, bins=[0, *(top + 1 for top in tops)])[0]
    return tuple(zip(tops, counts.tolist(), strict=True))


def counts_of(data: Data) -> dict[str, int]:
    """How many records have each label, the most frequent first."""
    if data.told and data.told.task == "tag":
        tags = np.concatenate([row.input_ids[row.supervised] for row in data.set.encoded])
        found = {name: int((tags == number).sum()) for number, name in enumerate(data.told.names)}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))
    if data.told and data.told.several:
        sets = np.array([row.input_ids[-1] for row in data.set.encoded])
        found = {name: int((sets >> number & 1).sum()) for number, name in enumerate(data.told.names)}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))
    counts = np.bincount(data.records["label"] + 1, minlength=len(data.labels) + 1)[1:]
    return dict(sorted(zip(data.labels, counts.tolist(), strict=True), key=lambda pair: -pair[1]))


def told_counts(counts: dict[str, int]) -> str:
    """All of a few labels; of many, the most and the least frequent."""
    lines = [f"{name} {count:,}" for name, count in counts.items()]
    return ", ".join(
        lines if len(lines) <= 2 * SHOWN_LABELS else [*lines[:SHOWN_LABELS], "...", *lines[-SHOWN_LABELS:]]
    )


# --- rows that are there twice ----------------------------------------------------------------------------------------


def _origins(data: Data) -> dict[int, str]:
    """Where some records came from, as far as they became rows."""
    numbers = data.set.encoded.fact("row")
    return {int(number): data.set.encoded[at].origin for at, number in enumerate(numbers)}


def _equal(data: Data) -> Same:
    digests = data.records["digest"]
    _, firsts, group = np.unique(digests, return_index=True, return_inverse=True)
    again = np.flatnonzero(firsts[group] != np.arange(len(digests)))
    return Same(len(again), _named(data, again, data, firsts[group[again]]))


def _leaks(data: Data, against: Data) -> Same:
    theirs, places = np.unique(against.records["digest"], return_index=True)
    found = np.flatnonzero(np.isin(data.records["digest"], theirs))
    where = places[np.searchsorted(theirs, data.records["digest"][found])]
    return Same(len(found), _named(data, found, against, where))


def _named(
    data: Data, rows: NDArray[np.int64], other: Data, others: NDArray[np.int64]
) -> tuple[tuple[str, str, float], ...]:
    if not len(rows):
        return ()
    own, theirs = _origins(data), _origins(other)
    pairs = ((own.get(int(a)), theirs.get(int(b))) for a, b in zip(rows, others, strict=True))
    return tuple((a, b, 1.0) for a, b in pairs if a and b)[:SHOWN]


def _near(data: Data, near: NearRows) -> Same:
    """Without those that are equal."""
    rows, digests = data.set.encoded, data.records["digest"][data.set.encoded.fact("row")]
    found = [p for p in near.pairs(islice(rows, LOOKED_AT)) if digests[p.first] != digests[p.second]]
    first = tuple((rows[pair.second].origin, rows[pair.first].origin, pair.alike) for pair in found[:SHOWN])
    return Same(len(found), first)


def _near_leaks(near: NearRows, rows: Tokens, others: Tokens) -> Same:
    """The other side's rows that are nearly the same as one of these."""
    found = [(number, hit) for number in range(min(len(others), LOOKED_AT)) if (hit := near.find(others[number]))]
    first = tuple((rows[hit[0]].origin, others[number].origin, hit[1]) for number, hit in found[:SHOWN])
    return Same(len(found), first)


def as_json(report: Report) -> dict[str, Any]:
    """For `--json`."""
    from dataclasses import asdict

    return asdict(report) | {"supervised_share": report.supervised_tokens / max(1, report.tokens)}


def before_training(name: str, data: Data, tokenizer: PreTrainedTokenizerBase, held_out: Data | None) -> Sequence[str]:
    """What is likely to be a mistake, a sentence each, as far as it is found in a second or two.

    held_out: rows of a source of their own; what both have makes an evaluation look better than it is.
    """
    if len(data.set.encoded) <= LOOKED_AT_QUICKLY:
        return needs_look(inspect(name, data, tokenizer, held_out, samples=0))
    same = data.also_in(held_out) if held_out else 0
    said = [f"{same:,} rows are in the other data too"] if same else []
    return [*said, f"nearly equal rows were not looked for; `lorafit data {name} --model MODEL` does"]


def needs_look(report: Report) -> Sequence[str]:
    """What is likely to be a mistake, a sentence each."""
    said = []
    if report.near.count:
        said.append(f"{report.near.count:,} rows are nearly the same as an earlier one")
    for same, what in ((report.leaks, "are"), (report.near_leaks, "are nearly")):
        if same and same.count:
            said.append(f"{same.count:,} rows {what} in the other data too")
    if report.odd_rows:
        said.append(f"{report.odd_rows:,} rows hold characters that are no text (control characters, U+FFFD)")
    if report.labels and max(report.labels.values()) > 20 * min(report.labels.values()):
        most, *_, least = report.labels
        said.append(f"label {most!r} has {report.labels[most]:,} rows, {least!r} has {report.labels[least]:,}")
    if report.cut_tokens:
        said.append(f"{report.cut_rows:,} rows lose {report.cut_tokens:,} tokens at --seq-len")
    return said
