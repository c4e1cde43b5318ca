"""What is decided before the first step: how a step is split to fit the memory, and the engine that runs it.

Everything here depends on the configuration, the rows and `chosen` alone, so a resumed run gets the same engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from lorafit import rates
from lorafit.config import TrainConfig, parse_bytes
from lorafit.data.batching import Counted, counted, padded_groups, read_tokens, step_rows
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded, lengths, resident_bytes
from lorafit.engine import workspace
from lorafit.engine.batch import Batch
from lorafit.engine.engine import Engine, plain
from lorafit.engine.layers import Features, untouched_layers
from lorafit.errors import DoesNotFitError, ModelError
from lorafit.methods.labels import SIDE_BY_SIDE, engine_of
from lorafit.model.spec import ModelSpec
from lorafit.plan import memory, trained
from lorafit.plan.counts import lora_params
from lorafit.plan.flops import Flop, lora_step
from lorafit.plan.forecast import measured_speed
from lorafit.plan.memory import LEAST_MICRO_TOKENS, Split, splits
from lorafit.plan.trained import Trained
from lorafit.train.nested import shares_of
from lorafit.units import format_bytes, format_count

# Steps that are looked at to find the largest micro-batch.
STEPS_SAMPLED = 32
# Of the first step's rows, where what layers are given is measured before training.
BATCHES_LOOKED_AT = 8
# Of the one pass whose gradients are looked at: the model runs as it was there, which keeps several times as much.
GRADIENT_TOKENS = 512


def fit_to_memory(
    spec: ModelSpec,
    config: TrainConfig,
    precision: str,
    rows: Sequence[Encoded],
    limit: int,
    force: bool,
    begun: Split | None = None,
    adds: Trained | None = None,
) -> tuple[Split, memory.MemoryEstimate]:
    """The fastest split that is predicted to stay below `limit` bytes, and that prediction.

    begun: the split of the run that is resumed, the only one that gives the same numbers. adds: what is trained,
    where a head of labels is. Raises DoesNotFitError where
    nothing fits, unless force: then what needs least.
    """
    adds = adds or trained.of(spec, config)

    def predicted(split: Split) -> memory.MemoryEstimate:
        tokens, supervised = _largest(rows, config, split.micro_tokens, adds.padded)
        held = memory.data_bytes(len(rows), resident_bytes(rows))
        return memory.estimate(spec, adds, precision, tokens, supervised, split.recompute, config.base_storage, held)

    tried = []
    for split in [begun] if begun else splits(config.micro_tokens):
        estimate = predicted(split)
        if estimate.fits(limit):
            return split, estimate
        tried.append((split, estimate))
    least = min(tried, key=lambda pair: pair[1].peak_bytes)
    if force:
        return least
    raise _does_not_fit(config, least[1], limit, begun)


def _does_not_fit(
    config: TrainConfig, least: memory.MemoryEstimate, limit: int, begun: Split | None
) -> DoesNotFitError:
    above = f"above the {format_bytes(limit)} " + ("of --memory" if config.memory else "that this machine has free")
    needs = f"is predicted to need {format_bytes(least.peak_bytes)}"
    if begun:
        return DoesNotFitError(
            f"this run was begun with {format_count(begun.micro_tokens)} tokens at a time, which {needs}, {above}",
            "Give it more memory, go on anyway with --force, or begin anew in another directory",
        )
    return DoesNotFitError(
        f"this run {needs} at the least, {above}",
        "Lower --seq-len or --r, use --precision bf16, or try it anyway with --force",
    )


def _largest(rows: Sequence[Encoded], config: TrainConfig, micro_tokens: int, padded: bool = False) -> tuple[int, int]:
    """(tokens, predicted tokens) of the largest micro-batch of the first steps, or of the longest row."""
    steps = [*_first_steps(rows, config), [int(np.argmax(lengths(rows)))]]
    if padded:
        groups = [group for step in steps for group in padded_groups(rows, step, micro_tokens, SIDE_BY_SIDE)]
        return max(len(group) * SIDE_BY_SIDE.width(read_tokens(rows[group[0]])) for group in groups), max(
            map(len, groups)
        )
    batches = _batches(rows, config, steps, micro_tokens)
    return max(batch.tokens for batch in batches), max(batch.predicted for batch in batches)


def _first_steps(rows: Sequence[Encoded], config: TrainConfig) -> list[list[int]]:
    """The rows of each of the steps that are looked at."""
    count = min(STEPS_SAMPLED, -(-len(rows) // config.batch_size))
    return [step_rows(len(rows), config.batch_size, config.order_seed, 0, step) for step in range(count)]


def _batches(rows: Sequence[Encoded], config: TrainConfig, steps: list[list[int]], micro_tokens: int) -> list[Counted]:
    share_prefix = config.dropout == 0
    return [batch for step in steps for batch in counted(rows, step, micro_tokens, share_prefix)]


def expected_s(
    spec: ModelSpec, config: TrainConfig, precision: str, rows: Sequence[Encoded], split: Split, threads: int
) -> float | None:
    """How long the steps of the run will take, by the operations of its first ones and this machine's rates.

    None where no run in this precision was timed here before, for other methods than LoRA, or where only a part of the
    model is trained.
    """
    known = rates.read(threads)
    reached = measured_speed(spec, precision, config.base_storage, known)
    as_usual = config.layers is None and config.targets == "all-linear" and config.method == "lora"
    if reached is None or not as_usual or config.variant != "lora":
        return None
    steps = _first_steps(rows, config)
    parts = [part for number, step in enumerate(steps) for part in shares_of(config, number, step)]
    try:
        flop = [
            _operations(spec, r or config.r, precision, batch)
            for r, own in parts
            for batch in _batches(rows, config, [own], split.micro_tokens)
        ]
    except ModelError:  # a kind of block whose operations are not known
        return None
    done = sum(one.total + (one.forward if split.recompute else 0) for one in flop)
    total = config.max_steps or -(-len(rows) // config.batch_size) * config.epochs
    return (done / len(steps) / reached + known.number_s * lora_params(spec, config.r)) * total


def over_first_rows(model: nn.Module, rows: Sequence[Encoded], config: TrainConfig) -> None:
    """Take a model that is not made faster yet over the rows of the first step, without gradients."""
    engine = plain(model)
    with torch.no_grad():
        for batch in _first_batches(rows, config, LEAST_MICRO_TOKENS, engine)[:BATCHES_LOOKED_AT]:
            engine.loss(batch)


def gradients_of_first_rows(model: nn.Module, rows: Sequence[Encoded], config: TrainConfig) -> None:
    """Forward and back over some rows of the first step, in one pass. Leaves no gradients."""
    engine = plain(model)
    batch = _first_batches(rows, config, GRADIENT_TOKENS, engine)[0]
    (engine.loss(batch) / batch.supervised_tokens).backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = None


def _first_batches(rows: Sequence[Encoded], config: TrainConfig, micro_tokens: int, engine: Engine) -> list[Batch]:
    first = step_rows(len(rows), config.batch_size, config.order_seed, epoch=0, step=0)
    return micro_batches(rows, first, micro_tokens, engine.packing)


def _operations(spec: ModelSpec, r: int, precision: str, batch: Counted) -> Flop:
    # In 16 bits the engine's last layer ends with the tokens that predict something (`Engine.ends_early`).
    ending = None if precision == "fp32" else batch.predicting
    return lora_step(spec, r, batch.tokens, batch.predicted, batch.pairs, ending)


def evaluation_tokens(rows: Sequence[Encoded], config: TrainConfig, split: Split) -> int:
    """Tokens of an evaluation's pass: no more than training's own largest, whose memory it then takes again."""
    return min(split.micro_tokens, _largest(rows, config, split.micro_tokens)[0])


def make_engine(
    model: nn.Module,
    rows: Sequence[Encoded],
    config: TrainConfig,
    precision: str,
    split: Split,
    directory: Path,
    console: Console,
) -> Engine:
    """The engine for this model and these rows, with what it could not make faster shown.

    directory: where the activations of frozen layers are kept while the run lasts.
    """
    engine = engine_of(model, share_prefix=config.dropout == 0)
    if precision == "int8":
        first = step_rows(len(rows), config.batch_size, config.order_seed, epoch=0, step=0)
        engine.use_int8(micro_batches(rows, first, memory.CALIBRATION_TOKENS, engine.packing)[0], release=True)
    engine.release_weights()
    # Only now: what the batches need can take the place of released weights.
    workspace.expect(_largest(rows, config, split.micro_tokens)[0])
    engine.tight = split.recompute or split.micro_tokens < config.micro_tokens
    for note in engine.notes:
        console.print(note, style="yellow", highlight=False)
    if config.dropout:
        console.print("a prefix that rows share is computed in each of them: dropout differs by row", highlight=False)
    if split.recompute:
        engine.recompute_layers()
        console.print("layers are computed again in the backward pass, to save memory", highlight=False)
    if config.method != "head":  # its own features are kept, see `labelled.look_once`
        _keep_features(engine, rows, config, split, directory, console)
    return engine


def _keep_features(
    engine: Engine, rows: Sequence[Encoded], config: TrainConfig, split: Split, directory: Path, console: Console
) -> None:
    """Where rows are seen more than once and the lowest layers are not trained: compute those once."""
    steps_an_epoch = -(-len(rows) // config.batch_size)
    epochs = config.max_steps / steps_an_epoch if config.max_steps else config.epochs
    below = untouched_layers(engine.model)
    if epochs <= 1 or below == 0:
        return
    read = [read_tokens(row) for row in rows]
    size = Features.file_bytes(read, engine.hidden, engine.dtype)
    what = f"the lowest {below} layers are frozen: their output for {format_count(sum(read))} tokens"
    if size > parse_bytes(config.feature_cache, "--feature-cache"):
        limit = f"{format_bytes(size)}, above the {config.feature_cache} of --feature-cache"
        console.print(f"{what} would take {limit}; they are computed in every epoch", style="yellow", highlight=False)
        return
    console.print(f"{what} is computed once and kept on disk ({format_bytes(size)})", highlight=False)
    batches = micro_batches(rows, range(len(rows)), split.micro_tokens, engine.packing)
    directory.mkdir(parents=True, exist_ok=True)
    engine.keep_features(directory / "features.bin", read, batches)
