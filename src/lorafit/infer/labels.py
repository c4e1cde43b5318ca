"""How well a model tells labels apart: loss, accuracy, F1 of each label, and which labels it takes for which."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafit.data.pack import micro_batches, pair_numbers
from lorafit.data.store import Encoded, led, starts_of
from lorafit.engine.engine import Engine
from lorafit.errors import NumericsError
from lorafit.infer.numbers import NumbersMeasured, judge_numbers
from lorafit.infer.tags import counted, is_bio
from lorafit.methods.labels import LabelHead, Labels, bits, label_head, numbers
from lorafit.methods.virtual import lead_of


@dataclass(frozen=True, slots=True)
class LabelResult:
    """One label. rows: that have it. precision, recall, f1: 0 where they have nothing to divide by."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class Confusion:
    """How many rows of one label were taken for another."""

    expected: str
    got: str
    rows: int


@dataclass(frozen=True, slots=True)
class Wrong:
    """A row that was told wrong, by its number among the rows."""

    row: int
    expected: str
    got: str


@dataclass(frozen=True, slots=True)
class LabelsMeasured:
    """loss: nats per row, the mean. macro_f1: the mean over labels that rows have or were given.

    confusions: the most frequent first. wrong: rows in their order. Where words are tagged, each word is a row.
    entities: of tags in BIO, as labels, with rows for how many there are; entity_f1: of all of them together.
    """

    loss: float
    accuracy: float
    macro_f1: float
    rows: int
    labels: tuple[LabelResult, ...]
    confusions: tuple[Confusion, ...]
    wrong: tuple[Wrong, ...]
    seconds: float
    entities: tuple[LabelResult, ...] = ()
    entity_f1: float | None = None

    @property
    def summary(self) -> dict[str, float]:
        """What decides, by name."""
        of_entities = {} if self.entity_f1 is None else {"entity_f1": self.entity_f1}
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1} | of_entities


def measure(
    engine: Engine,
    rows: Sequence[Encoded],
    labels: Labels,
    micro_tokens: int,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> LabelsMeasured | NumbersMeasured:
    """All of it. micro_tokens: most tokens of a forward pass. Raises NumericsError for scores that are not finite."""
    started = time.perf_counter()
    scores, targets = scores_of(engine, rows, micro_tokens, on_rows)
    head = label_head(engine.model)
    assert head is not None  # it has given scores
    return measure_scores(head, scores, targets, labels, starts_of(rows), started)


def measure_scores(
    head: LabelHead,
    scores: Tensor,
    targets: Tensor,
    labels: Labels,
    starts: NDArray[np.int64],
    started: float = 0.0,
) -> LabelsMeasured | NumbersMeasured:
    """As `measure`, of what `scores_of` gave. starts: as `store.starts_of`."""
    loss = float(head.nll(scores.double(), targets).mean())
    if not math.isfinite(loss):
        raise NumericsError(f"the loss is {loss}, not a finite number", "Use --precision fp32, or lower --scale")
    if labels.task == "regress":
        got, expected = (labels.mean + labels.deviation * x.double().numpy() for x in (scores[:, 0], numbers(targets)))
        return judge_numbers(got, expected, loss, started)
    if labels.several:
        return judge_sets(scores, targets, labels.names, loss, started)
    found = judge_labels(scores, targets, labels.names, loss, started)
    return _with_entities(found, scores.argmax(1), targets, labels.names, starts) if is_bio(labels.names) else found


def _with_entities(
    found: LabelsMeasured, got: Tensor, targets: Tensor, names: Sequence[str], starts: NDArray[np.int64]
) -> LabelsMeasured:
    ends = list(pairwise(starts.tolist()))
    wanted, given = ([[names[k] for k in x[a:b].tolist()] for a, b in ends] for x in (targets, got))
    counts = counted(wanted, given)
    all_of_them = (sum(count) for count in zip(*counts.values(), strict=True)) if counts else (0, 0, 0)
    return replace(
        found,
        entities=tuple(_shares(kind, *count) for kind, count in counts.items()),
        entity_f1=_shares("", *all_of_them).f1,
    )


def judge_labels(scores: Tensor, targets: Tensor, names: Sequence[str], loss: float, started: float) -> LabelsMeasured:
    """Where each row has one label."""
    got = scores.argmax(1)
    table = torch.bincount(targets * len(names) + got, minlength=len(names) ** 2).view(len(names), len(names))
    by_label = tuple(_label(table, number, name) for number, name in enumerate(names))
    known = [one.f1 for number, one in enumerate(by_label) if one.rows or int(table[:, number].sum())]
    return LabelsMeasured(
        loss=loss,
        accuracy=float((got == targets).double().mean()),
        macro_f1=sum(known) / len(known),
        rows=len(scores),
        labels=by_label,
        confusions=_confusions(table, names),
        wrong=tuple(
            Wrong(row, names[int(targets[row])], names[int(got[row])])
            for row in torch.nonzero(got != targets).flatten().tolist()
        ),
        seconds=time.perf_counter() - started,
    )


def judge_sets(scores: Tensor, targets: Tensor, names: Sequence[str], loss: float, started: float) -> LabelsMeasured:
    """Where any number of labels may hold: a row is right where all of them are. No label is taken for another."""
    wanted, got = bits(targets, scores).bool(), scores > 0
    right = (wanted == got).all(1)
    by_label = tuple(
        _shares(name, *(int(x.sum()) for x in (w & g, w, g))) for name, w, g in zip(names, wanted.T, got.T, strict=True)
    )
    known = [one.f1 for number, one in enumerate(by_label) if one.rows or int(got[:, number].sum())]

    def told(row: Tensor) -> str:
        return ", ".join(name for name, holds in zip(names, row.tolist(), strict=True) if holds) or "(none)"

    return LabelsMeasured(
        loss=loss,
        accuracy=float(right.double().mean()),
        macro_f1=sum(known) / len(known) if known else 0.0,
        rows=len(scores),
        labels=by_label,
        confusions=(),
        wrong=tuple(Wrong(n, told(wanted[n]), told(got[n])) for n in torch.nonzero(~right).flatten().tolist()),
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def scores_of(
    engine: Engine, rows: Sequence[Encoded], micro_tokens: int, on_rows: Callable[[int], None]
) -> tuple[Tensor, Tensor]:
    """The head's scores, (rows, labels) float32, and each row's label, (rows,) int64; or each tagged word's."""
    head = label_head(engine.model)
    if head is None:
        raise TypeError("the model has no head of labels")
    engine.model.eval()
    given = led(rows, lead_of(engine.model))
    starts = starts_of(rows)
    count = int(starts[-1])
    scores, targets = torch.empty(count, len(head.weight)), torch.empty(count, dtype=torch.int64)
    for batch in micro_batches(given, range(len(rows)), micro_tokens, engine.packing):
        places = pair_numbers(batch, starts)
        scores[places], targets[places] = head(engine.head_inputs(batch)).cpu(), batch.targets
        on_rows(batch.rows)
    return scores, targets


def _label(table: Tensor, number: int, name: str) -> LabelResult:
    """table: (labels, labels), rows of a label that were taken for another."""
    return _shares(name, *(int(x) for x in (table[number, number], table[number].sum(), table[:, number].sum())))


def _shares(name: str, right: int, rows: int, given: int) -> LabelResult:
    """given: rows that were told so. right: of them rightly."""
    precision, recall = right / given if given else 0.0, right / rows if rows else 0.0
    f1 = 2 * right / (rows + given) if rows + given else 0.0
    return LabelResult(name, rows, precision, recall, f1)


def _confusions(table: Tensor, names: Sequence[str]) -> tuple[Confusion, ...]:
    off = table.clone().fill_diagonal_(0)
    pairs = torch.nonzero(off).tolist()
    pairs.sort(key=lambda pair: (-int(off[pair[0], pair[1]]), pair))
    return tuple(Confusion(names[a], names[b], int(off[a, b])) for a, b in pairs)
