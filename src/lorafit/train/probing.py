"""Which layer's features tell most: a head on each, trained on the training rows and tried on the held-out ones.

Source: Alain and Bengio 2017, Understanding intermediate layers using linear classifier probes; Tenney, Das and Pavlick
2019, BERT rediscovers the classical NLP pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from lorafit.config import TrainConfig, parse_bytes
from lorafit.data.batching import step_rows
from lorafit.data.pack import pair_numbers
from lorafit.data.store import Encoded, starts_of, targets_of
from lorafit.engine.batch import Batch
from lorafit.engine.engine import Engine
from lorafit.errors import ConfigError
from lorafit.methods.depth import check_layer, watched
from lorafit.methods.labels import POOLINGS, LabelHead, Labels, Pooled
from lorafit.train.labelled import ROWS_AT_ONCE, feature_batches, standardise
from lorafit.train.optim import adamw, clip_gradients, rate, set_rate
from lorafit.units import format_bytes

# (head, scores, targets, labels, starts) -> what has a `loss` and a `summary`, as infer.labels.measure_scores.
Judge = Callable[[LabelHead, Tensor, Tensor, Labels, NDArray[np.int64]], Any]
BAR = 30  # characters of the longest


@dataclass(frozen=True)
class Side:
    """Rows with their features. features: (layers, labels to be told, hidden) float32, mapped. targets: their cells."""

    features: Tensor
    targets: Tensor
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Encoded], layers: int, hidden: int, file: Path) -> Side:
        """With room for features, in a file."""
        starts = starts_of(rows)
        shape = (layers, int(starts[-1]), hidden)
        table = torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=shape))
        return cls(table, torch.from_numpy(targets_of(rows)), starts)


def probe(
    engine: Engine,
    rows: Sequence[Encoded],
    held_out: Sequence[Encoded] | None,
    labels: Labels,
    config: TrainConfig,
    micro_tokens: int,
    directory: Path,
    judge: Judge,
    console: Console,
) -> list[dict[str, Any]]:
    """Of each layer how well a head on it does on the held-out rows: {"layer", "loss", and the task's measures}.

    One pass over all rows computes every layer's features. directory: where they are kept meanwhile. judge: measures a
    head by its scores. Raises ConfigError without held-out rows, and where the features are too large.
    """
    if held_out is None:
        raise ConfigError(
            "--probe tries layers on held-out rows, and there are none", "Give --eval FILE, or --eval 10%"
        )
    body = engine.model
    assert isinstance(body, Pooled)
    layers = check_layer(body, None) + 1
    count = sum(int(starts_of(side)[-1]) for side in (rows, held_out))
    size = layers * count * engine.hidden * np.dtype(np.float32).itemsize
    if size > parse_bytes(config.feature_cache, "--feature-cache"):
        raise ConfigError(
            f"--probe: features of {layers} layers take {format_bytes(size)}, above the {config.feature_cache} of "
            "--feature-cache",
            "Raise it, train on fewer rows, or choose a layer by --layer",
        )
    directory.mkdir(parents=True, exist_ok=True)
    sides = []
    for name, some in (("train", rows), ("held", held_out)):
        side = Side.of(some, layers, engine.hidden, directory / f"layers-{name}.bin")
        _fill(engine, body, some, micro_tokens, side)
        sides.append(side)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as for a head alone
    found = []
    for layer in range(layers):
        head = _trained(sides[0], layer, labels, config)
        with torch.no_grad():
            scores = head(sides[1].features[layer])
        measured = judge(head, scores, sides[1].targets, labels, sides[1].starts)
        found.append({"layer": layer, "loss": measured.loss} | measured.summary)
    torch.set_num_threads(threads)
    _print(found, labels, console)
    return found


def choose_layer(
    engine: Engine,
    rows: Sequence[Encoded],
    held_out: Sequence[Encoded] | None,
    labels: Labels,
    config: TrainConfig,
    chosen: dict[str, Any],
    directory: Path,
    judge: Judge,
    console: Console,
) -> int:
    """The layer that a head is best on, which the model's head is given from now on; others as of `probe`.

    chosen: what a run has chosen by measuring, and uses again when it is resumed.
    """
    if "layer" not in chosen:
        chosen["probe"] = probe(
            engine, rows, held_out, labels, config, chosen["micro_tokens"], directory, judge, console
        )
        chosen["layer"] = best_layer(chosen["probe"])
    assert isinstance(engine.model, Pooled)
    engine.model.layer = chosen["layer"]
    return int(chosen["layer"])


def best_layer(found: Sequence[dict[str, Any]]) -> int:
    """The one that tells most right, or is least off; of equals the one with the least loss."""
    return int(max(found, key=lambda one: (one.get("accuracy", 0.0), -one["loss"]))["layer"])


@torch.no_grad()
def _fill(engine: Engine, model: Pooled, rows: Sequence[Encoded], micro_tokens: int, side: Side) -> None:
    for batch in feature_batches(engine, rows, micro_tokens):
        places = pair_numbers(batch, side.starts)

        def keep(layer: int, hidden: Tensor, batch: Batch = batch, places: Tensor = places) -> None:
            side.features[layer, places] = _read(hidden, batch, model.pooling).float()

        with watched(model.body, keep):
            last = engine.head_inputs(batch)
        side.features[-1, places] = last.float()


def _read(hidden: Tensor, batch: Batch, pooling: str) -> Tensor:
    """What a head on these hidden states would be given where the batch predicts something: (pairs, hidden)."""
    if pooling not in POOLINGS:
        return hidden.flatten(0, 1)[batch.predicts]
    assert batch.attention_mask is not None  # rows stand side by side
    return POOLINGS[pooling](hidden, batch.attention_mask)[batch.predicts // hidden.shape[1]]


def _trained(side: Side, layer: int, labels: Labels, config: TrainConfig) -> LabelHead:
    """A head on a layer's features, trained as the run's own will be."""
    features = side.features[layer]
    head = LabelHead(features.shape[1], len(labels.names), config.seed, labels.kind)
    standardise(head, torch.split(features, ROWS_AT_ONCE), side.targets)
    parameters: list[Tensor] = list(head.parameters())
    optimizer = adamw(parameters, config.peak_rate, (config.beta1, config.beta2), config.weight_decay, [1.0, 1.0])
    rows = len(side.starts) - 1
    per_epoch = math.ceil(rows / config.batch_size)
    steps = config.max_steps or per_epoch * config.epochs
    for step in range(steps):
        chosen = step_rows(rows, config.batch_size, config.order_seed, *divmod(step, per_epoch))
        pairs = np.concatenate([np.arange(side.starts[row], side.starts[row + 1]) for row in chosen])
        head.nll(head(features[pairs]), side.targets[pairs]).mean().backward()  # type: ignore[no-untyped-call]
        clip_gradients(parameters, config.clip or math.inf)
        set_rate(optimizer, rate(step, steps, config.peak_rate, config.schedule, config.warmup))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return head


def _print(found: Sequence[dict[str, Any]], labels: Labels, console: Console) -> None:
    name = "r2" if labels.task == "regress" else "accuracy"
    best = best_layer(found)
    console.print(f"{name} on the held-out rows of a head on each layer (0: the embeddings):", highlight=False)
    for one in found:
        value = one.get(name)
        bar = "█" * round(BAR * max(0.0, value or 0.0))
        shown = "     -" if value is None else f"{value:6.3f}"
        mark = "  the best, which is taken" if one["layer"] == best else ""
        console.print(f"  {one['layer']:>3} {shown} {bar}{mark}", highlight=False, markup=False)
