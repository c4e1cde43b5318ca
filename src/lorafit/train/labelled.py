"""What a run on labelled rows decides and does otherwise: which task it is, its types, and features computed once.

Below a head alone nothing is trained, so what it is given is the same in every epoch. `look_once` runs the model over
all rows and keeps their features; training then goes on with them in the place of the model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from lorafit.config import TrainConfig, parse_bytes
from lorafit.data.encode import Data
from lorafit.data.labels import Names, is_labelled, names_of
from lorafit.data.load import Source
from lorafit.data.pack import micro_batches
from lorafit.data.preflight import counts_of
from lorafit.data.store import Encoded, Known, lengths
from lorafit.engine import precision
from lorafit.engine.engine import Engine
from lorafit.engine.tally import TALLY
from lorafit.errors import ConfigError, DataError
from lorafit.methods.labels import ATTRIBUTE, LabelHead, Labels, Scores, label_head
from lorafit.units import format_bytes, format_count

# Rows whose batches are made at a time.
ROWS_AT_ONCE = 2048
# What means something for rows that a model writes, and nothing here: setting -> what it is about.
OF_TEXT = {"template": "conversations", "loss_on": "conversations", "add_tokens": "text that a model writes"}


def find_labels(config: TrainConfig, train: Source) -> Names | None:
    """The labels of the training rows, sorted; None where the model is to write text.

    Raises ConfigError for settings of the other task, DataError for rows that cannot be used.
    """
    labelled = is_labelled(train, config.format, config.rename)
    if config.task == "classify" and not labelled:
        raise DataError(f"--task classify: the rows of {train.name} have no label", "Give rows with text and label")
    if config.task == "generate" or not labelled:
        if config.method == "head":
            raise ConfigError(
                "--method head trains a head of labels, and the model is to write text",
                "Give rows with text and label, or another method",
            )
        if config.pooling != "auto":
            raise ConfigError("--pooling is given, and there is no head of labels", "Leave it out")
        return None
    for name, what in OF_TEXT.items():
        if getattr(config, name) != TrainConfig.model_fields[name].get_default(call_default_factory=True):
            raise ConfigError(f"--{name.replace('_', '-')} is for {what}, and these rows have labels", "Leave it out")
    return names_of(train.rows(), config.format, config.rename, config.skip_bad)


def precision_of(config: TrainConfig, is_encoder: bool) -> str:
    """The type of products. int8 is calibrated on a backward pass, which a head alone does not make.

    `auto` is fp32 for an encoder: between its products there is more that takes time; fewer bits save a third at most.
    """
    if config.precision == "int8" and config.method == "head":
        raise ConfigError("--precision int8 is not for a head alone", "Give fp32 or bf16, or leave it out")
    if is_encoder and config.precision == "auto":
        return "fp32"
    found = precision.choose(config.precision, config.base_storage)
    return "bf16" if found == "int8" and config.method == "head" else found


class Cached(nn.Module):
    """Rows' features in the place of a model: its ids are the numbers of rows. features: (rows, hidden) float32."""

    def __init__(self, features: Tensor, head: LabelHead, config: Any) -> None:
        super().__init__()
        self.features, self.head, self.config = features, head, config
        object.__setattr__(self, ATTRIBUTE, head)

    def forward(self, input_ids: Tensor, **unused: Any) -> Scores:
        """input_ids: (rows, 1)."""
        return Scores(self.head(self.features[input_ids]))

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head


@dataclass(frozen=True)
class Once:
    """What takes the place of model and rows where features are computed once. tokens, flop: what this took."""

    engine: Engine
    rows: Sequence[Encoded]
    held_out: Sequence[Encoded] | None
    tokens: int
    flop: int


def look_once(
    engine: Engine,
    rows: Sequence[Encoded],
    held_out: Sequence[Encoded] | None,
    config: TrainConfig,
    micro_tokens: int,
    directory: Path,
    console: Console,
) -> Once | None:
    """Compute what the head is given for every row; None, with a line that says so, where that is too large to keep.

    directory: where it is kept, in a mapped file, while the run lasts.
    """
    head = label_head(engine.model)
    if head is None:
        raise TypeError("only a model with a head of labels has features")
    count = len(rows) + (len(held_out) if held_out else 0)
    size = count * engine.hidden * np.dtype(np.float32).itemsize
    if size > parse_bytes(config.feature_cache, "--feature-cache"):
        console.print(
            f"features of {format_count(count)} rows would take {format_bytes(size)}, above the {config.feature_cache} "
            "of --feature-cache: the model runs in every epoch",
            style="yellow",
            highlight=False,
        )
        return None
    directory.mkdir(parents=True, exist_ok=True)
    kept = np.memmap(directory / "features.bin", dtype=np.float32, mode="w+", shape=(count, engine.hidden))
    table = torch.from_numpy(kept)
    started, counted = time.perf_counter(), TALLY.flop
    tokens = _fill(engine, rows, micro_tokens, table[: len(rows)])
    spent, flop = time.perf_counter() - started, TALLY.flop - counted
    if held_out:
        _fill(engine, held_out, micro_tokens, table[len(rows) :])
    console.print(
        f"features of {format_count(count)} rows are computed once and kept on disk ({format_bytes(size)})",
        highlight=False,
    )
    cached = Engine(Cached(table, head, engine.model.config), chunked=True, notes=engine.notes)
    cached.prepare_s = engine.prepare_s + spent
    torch.set_num_threads(1)  # a step is a product of a few rows: a second thread only waits for the first
    return Once(cached, Known(rows, 0), Known(held_out, len(rows)) if held_out else None, tokens, flop)


def _fill(engine: Engine, rows: Sequence[Encoded], micro_tokens: int, into: Tensor) -> int:
    """Rows of like length together. Returns how many tokens the model ran on."""
    order, tokens = np.argsort(-lengths(rows), kind="stable"), 0
    for first in range(0, len(order), ROWS_AT_ONCE):
        for batch in micro_batches(rows, order[first : first + ROWS_AT_ONCE].tolist(), micro_tokens, engine.packing):
            into[batch.token_rows.flatten()[batch.predicts]] = engine.head_inputs(batch).float()
            tokens += batch.computed_tokens
    return tokens


def labelled_facts(
    labels: Labels | None, data: Data, tokens_seen: int, quality: tuple[float, float] | None, once: Once | None
) -> dict[str, Any]:
    """What run.json says of the task, in the place of or beside what it says of every run.

    tokens_seen: with a cell for the label of each row. quality: accuracy and macro-F1 on held-out rows.
    """
    if labels is None:
        return {"task": "generate"}
    found: dict[str, Any] = {
        "task": "classify",
        "labels": list(labels.names),
        "label_counts": counts_of(data),
        "pooling": labels.pooling,
        "several": labels.several,
        "eval_accuracy": quality[0] if quality else None,
        "eval_macro_f1": quality[1] if quality else None,
    }
    return found | ({"tokens_computed": once.tokens, "flop": once.flop} if once else {"tokens_seen": tokens_seen})
