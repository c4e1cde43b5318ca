"""What a run on labelled rows decides and does otherwise: which task it is, its types, and features computed once.

Below a head alone nothing is trained, so what it is given is the same in every epoch. `look_once` runs the model over
all rows and keeps their features; training then goes on with them in the place of the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from lorafit.config import TrainConfig, parse_bytes
from lorafit.data.encode import Data
from lorafit.data.labels import Names, names_of, task_of
from lorafit.data.load import Source
from lorafit.data.pack import micro_batches, pair_numbers
from lorafit.data.preflight import counts_of
from lorafit.data.store import Encoded, Known, lengths, starts_of, targets_of
from lorafit.engine import precision
from lorafit.engine.batch import Batch
from lorafit.engine.engine import Engine
from lorafit.engine.tally import TALLY
from lorafit.errors import ConfigError
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
    if config.method != "head" and (config.probe or config.layer is not None):
        name = "probe" if config.probe else "layer"
        raise ConfigError(f"--{name} is for a head alone", "Give --method head, or leave it out")
    if config.probe and config.layer is not None:
        raise ConfigError("--probe chooses a layer, and --layer is given", "Leave one out")
    task = task_of(train, config.format, config.rename, config.task)
    if task == "generate":
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
    return names_of(train.rows(), config.format, config.rename, config.skip_bad, task)


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

    Either way the head reads features as deviations from their mean afterwards, until `LabelHead.fold`.
    directory: where it is kept, in a mapped file, while the run lasts.
    """
    head = label_head(engine.model)
    if head is None:
        raise TypeError("only a model with a head of labels has features")
    own, others = (int(starts_of(side)[-1]) if side else 0 for side in (rows, held_out))
    count = own + others
    size = count * engine.hidden * np.dtype(np.float32).itemsize
    if size > parse_bytes(config.feature_cache, "--feature-cache"):
        console.print(
            f"features of {format_count(count)} rows would take {format_bytes(size)}, above the {config.feature_cache} "
            "of --feature-cache: the model runs in every epoch, and once before them for their mean and deviation",
            style="yellow",
            highlight=False,
        )
        parts = (engine.head_inputs(batch) for batch in feature_batches(engine, rows, micro_tokens))
        standardise(head, parts, torch.from_numpy(targets_of(rows)))
        return None
    directory.mkdir(parents=True, exist_ok=True)
    kept = np.memmap(directory / "features.bin", dtype=np.float32, mode="w+", shape=(count, engine.hidden))
    table = torch.from_numpy(kept)
    started, counted = time.perf_counter(), TALLY.flop
    tokens = _fill(engine, rows, micro_tokens, table[:own])
    spent, flop = time.perf_counter() - started, TALLY.flop - counted
    standardise(head, torch.split(table[:own], ROWS_AT_ONCE), torch.from_numpy(targets_of(rows)))
    if held_out:
        _fill(engine, held_out, micro_tokens, table[own:])
    console.print(
        f"features of {format_count(count)} rows are computed once and kept on disk ({format_bytes(size)})",
        highlight=False,
    )
    cached = Engine(Cached(table, head, engine.model.config), chunked=True, notes=engine.notes)
    cached.prepare_s = engine.prepare_s + spent
    torch.set_num_threads(1)  # a step is a product of a few rows: a second thread only waits for the first
    return Once(cached, Known(rows, 0), Known(held_out, own) if held_out else None, tokens, flop)


def _fill(engine: Engine, rows: Sequence[Encoded], micro_tokens: int, into: Tensor) -> int:
    """Returns how many tokens the model ran on."""
    tokens, starts = 0, starts_of(rows)
    for batch in feature_batches(engine, rows, micro_tokens):
        into[pair_numbers(batch, starts)] = engine.head_inputs(batch).float()
        tokens += batch.computed_tokens
    return tokens


def feature_batches(engine: Engine, rows: Sequence[Encoded], micro_tokens: int) -> Iterator[Batch]:
    """Of all rows, those of like length together."""
    order = np.argsort(-lengths(rows), kind="stable")
    for first in range(0, len(order), ROWS_AT_ONCE):
        yield from micro_batches(rows, order[first : first + ROWS_AT_ONCE].tolist(), micro_tokens, engine.packing)


def standardise(head: LabelHead, parts: Iterable[Tensor], targets: Tensor) -> None:
    """Let a fresh head read features by their mean and deviation over the training rows, and begin at labels' shares.

    parts: (some, hidden) each. Sums in float64, in which squares cancel well enough. targets: of all of them.
    """
    count, width = 0, head.weight.shape[1]
    sums = torch.zeros(2, width, dtype=torch.float64)
    for part in parts:
        wide = part.double().cpu()
        count += len(wide)
        sums += torch.stack([wide.sum(0), wide.square().sum(0)])
    mean, square = sums / count
    head.standardise(mean, (square - mean.square()).clamp(min=0).sqrt())
    head.start_at_shares(targets)


def labelled_facts(
    labels: Labels | None, data: Data, tokens_seen: int, quality: Mapping[str, float], once: Once | None
) -> dict[str, Any]:
    """What run.json says of the task, in the place of or beside what it says of every run.

    tokens_seen: without cells of labels. quality: measures of the task on held-out rows, by name.
    """
    if labels is None:
        return {"task": "generate"}
    found: dict[str, Any] = {
        "task": labels.task,
        "labels": list(labels.names),
        "label_counts": counts_of(data),
        "pooling": labels.pooling,
        "layer": labels.layer,
        "several": labels.several,
        "mean": labels.mean,
        "deviation": labels.deviation,
        "eval_accuracy": None,
        "eval_macro_f1": None,
    }
    found |= {f"eval_{name}": value for name, value in quality.items()}
    return found | ({"tokens_computed": once.tokens, "flop": once.flop} if once else {"tokens_seen": tokens_seen})
