"""Rows for a head of labels, and what an evaluation says of them, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from lorafit.config import EvalConfig, RowsConfig
from lorafit.data.encode import Data, Reading, encode_rows
from lorafit.data.labels import Names
from lorafit.data.preflight import spans
from lorafit.data.rows import Row
from lorafit.data.store import Encoded, starts_of
from lorafit.infer.evaluate import counter, progress_bar
from lorafit.infer.labels import LabelsMeasured, Wrong, measure
from lorafit.infer.numbers import NumbersMeasured
from lorafit.methods.labels import Labels, Pooled, engine_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MICRO_TOKENS = 1024  # of a forward pass over rows with labels, as in training


def encode_labelled(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, labels: Labels, config: RowsConfig, whole: bool
) -> Data:
    """Rows for a head of these labels. whole: whether it reads a row side by side with others, which has a limit.

    Raises DataError for a row that cannot be used, or has another label.
    """
    limit = min(config.seq_len, tokenizer.model_max_length) if whole else config.seq_len
    told = Names.of(asdict(labels))
    return encode_rows(rows, tokenizer, Reading(config.format, config.rename, seq_len=limit, labels=told))


def evaluate_labels(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels,
    rows: Iterable[Row],
    config: EvalConfig,
    console: Console,
) -> tuple[LabelsMeasured | NumbersMeasured, dict[str, Any]]:
    """What was measured, and what `lorafit eval` says of it; there what is of text alone is None.

    Raises DataError, NumericsError.
    """
    data = encode_labelled(rows, tokenizer, labels, config, isinstance(model, Pooled))
    engine, encoded = engine_of(model, share_prefix=True), data.set.encoded
    with progress_bar(console) as bar:
        count = counter(bar, "rows", len(encoded))
        found = measure(engine, encoded, labels, MICRO_TOKENS, count)
    samples = _samples(found, data, tokenizer, config.samples)
    of_text = {"perplexity": None, "exact_match": None, "accuracy": None}
    told = asdict(found) | {"pooling": labels.pooling, "several": labels.several, "cut_rows": data.set.cut_rows}
    told |= {"wrong": len(found.wrong)} if isinstance(found, LabelsMeasured) else {}
    return found, {"task": labels.task} | of_text | told | {"samples": samples}


def _samples(
    found: LabelsMeasured | NumbersMeasured, data: Data, tokenizer: PreTrainedTokenizerBase, most: int
) -> list[dict[str, Any]]:
    """The first rows that were told wrong; of numbers, the first rows."""
    encoded = data.set.encoded
    told: Sequence[tuple[int, str, str, bool | None]]
    if isinstance(found, NumbersMeasured):
        pairs = islice(zip(found.expected, found.got, strict=True), most)
        told = [(row, f"{expected:.6g}", f"{got:.6g}", None) for row, (expected, got) in enumerate(pairs)]
    else:
        told = _told_wrong(found, starts_of(encoded))[:most]
    return [
        {"prompt": _text_of(encoded[row], data, tokenizer), "expected": expected, "got": got, "right": right}
        for row, expected, got, right in told
    ]


def _told_wrong(found: LabelsMeasured, starts: NDArray[np.int64]) -> list[tuple[int, str, str, bool | None]]:
    """Rows; where words are tagged, each row with all tags of it that are wrong."""
    rows = np.searchsorted(starts, [one.row for one in found.wrong], side="right") - 1
    wrong: dict[int, list[Wrong]] = {}
    for row, one in zip(rows.tolist(), found.wrong, strict=True):
        wrong.setdefault(row, []).append(one)
    return [
        (row, ", ".join(one.expected for one in some), ", ".join(one.got for one in some), False)
        for row, some in wrong.items()
    ]


def _text_of(row: Encoded, data: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row's text; tagged words with their tags."""
    if data.told and data.told.task == "tag":
        return "".join(span.text for span in spans(row, tokenizer, data))
    return str(tokenizer.decode(row.input_ids[~row.supervised].tolist(), skip_special_tokens=True))
