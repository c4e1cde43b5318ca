"""What is decided before the first step: how a step is split to fit the memory, and the engine that runs it.

Everything here depends on the configuration, the rows and `chosen` alone, so a resumed run gets the same engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import nn

from lorafit import rates
from lorafit.config import TrainConfig, parse_bytes
from lorafit.data.batching import Counted, counted, counted_side_by_side, input_of, read_tokens, step_rows
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded, lengths, resident_bytes
from lorafit.engine import workspace
from lorafit.engine.batch import Batch
from lorafit.engine.engine import Engine, plain
from lorafit.engine.layers import Features, decoder_layers, in_place_of, run_again, untouched_layers
from lorafit.engine.loss import head_of
from lorafit.engine.packing import SIDE_BY_SIDE
from lorafit.engine.probe import Probe
from lorafit.errors import DoesNotFitError, ModelError
from lorafit.lora.layer import LoRALayer
from lorafit.methods.labels import engine_of
from lorafit.model.spec import ModelSpec
from lorafit.plan import memory, trained
from lorafit.plan.forecast import SPEEDS, flop_of_step, speed_of
from lorafit.plan.memory import LEAST_MICRO_TOKENS, Split, splits
from lorafit.plan.steps import ends_early, once, step
from lorafit.plan.trained import Trained
from lorafit.plan.work import Pass, amount_of
from lorafit.units import bytes_of, format_bytes, format_count, format_seconds

# Steps that are looked at to find the largest micro-batch.
STEPS_SAMPLED = 32
# Of the first step's rows, where what layers are given is measured before training.
BATCHES_LOOKED_AT = 8
# Of the one pass whose gradients are looked at: the model runs as it was there, layer by layer.
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


def precision_that_fits(spec: ModelSpec, config: TrainConfig, fastest: str, limit: int, adds: Trained) -> str:
    """`fastest`, or bf16 where that alone fits into `limit` bytes, at the least that a run takes.

    int8 needs weights twice while it is made; fp32 has numbers of twice as many bits. Chosen before rows are there, by
    the fewest tokens of a pass: where longer rows do not fit, `fit_to_memory` says so.
    """

    def fits(precision: str) -> bool:
        few = LEAST_MICRO_TOKENS
        return memory.estimate(spec, adds, precision, few, few, True, config.base_storage).fits(limit)

    return "bf16" if not fits(fastest) and fits("bf16") else fastest


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
        groups = _padded(rows, steps, micro_tokens)
        return max(one.tokens for one in groups), max(one.predicted for one in groups)
    batches = _batches(rows, config, steps, micro_tokens)
    return max(batch.tokens for batch in batches), max(batch.predicted for batch in batches)


def _first_steps(rows: Sequence[Encoded], config: TrainConfig) -> list[list[int]]:
    """The rows of each of the steps that are looked at."""
    count = min(STEPS_SAMPLED, -(-len(rows) // config.batch_size))
    return [step_rows(len(rows), config.batch_size, config.order_seed, 0, step) for step in range(count)]


def _batches(rows: Sequence[Encoded], config: TrainConfig, steps: list[list[int]], micro_tokens: int) -> list[Counted]:
    share_prefix = config.dropout == 0
    return [batch for step in steps for batch in counted(rows, step, micro_tokens, share_prefix)]


class Expected(NamedTuple):
    """What a run is predicted to take. flop: of all its steps. train_s: None where no run was timed here before.

    speed_from: how the speed is known, one of `forecast.SPEEDS`.
    """

    flop: float
    train_s: float | None
    speed_from: str | None

    @property
    def told(self) -> str | None:
        """One line, which says so where the speed is that of another method."""
        if self.train_s is None or self.speed_from is None:
            return None
        how = "" if self.speed_from == "measured" else f" ({SPEEDS[self.speed_from]})"
        return f"predicted time: {format_seconds(self.train_s)}{how}"


def expected(
    spec: ModelSpec,
    config: TrainConfig,
    precision: str,
    rows: Sequence[Encoded],
    split: Split,
    threads: int,
    adds: Trained,
) -> Expected | None:
    """How long the steps of the run will take, by the operations of its first ones and this machine's rates.

    None where not all of the usual layers have something, or the operations of a kind of block are not known.
    """
    if config.targets != "all-linear" or config.rank_schedule == "adalora":
        return None
    early = precision in ("bf16", "int8") and not adds.padded and ends_early(spec, config)
    steps, total = _first_steps(rows, config), _total_steps(rows, config)
    passes = _passes(rows, config, steps, split.micro_tokens, adds.padded)
    try:
        one = step(spec, config, amount_of(passes, early), adds.labels)
        below = _computed_once(spec, config, precision, rows, adds)
        lowest = once(spec, below, sum(own.tokens for own in passes), sum(own.pairs for own in passes))
    except ModelError:
        return None

    def whole(of_steps: int) -> float:
        repeated = of_steps - lowest.total
        return (repeated * total + lowest.total * min(total, _steps_per_epoch(rows, config))) / len(steps)

    known = rates.read(threads)
    speed = speed_of(spec, config, precision, config.base_storage, known)
    if speed is None or speed.told == "assumed":
        return Expected(whole(one.total), None, None)
    passes_s = whole(flop_of_step(one, split)) / speed.flop_per_s
    return Expected(whole(one.total), passes_s + known.number_s * adds.params * total, speed.told)


def _steps_per_epoch(rows: Sequence[Encoded], config: TrainConfig) -> int:
    return -(-len(rows) // config.batch_size)


def _total_steps(rows: Sequence[Encoded], config: TrainConfig) -> int:
    return config.max_steps or _steps_per_epoch(rows, config) * config.epochs


def _passes(
    rows: Sequence[Encoded], config: TrainConfig, steps: list[list[int]], micro_tokens: int, padded: bool
) -> list[Pass]:
    if padded:
        return _padded(rows, steps, micro_tokens)
    return [Pass(*batch) for batch in _batches(rows, config, steps, micro_tokens)]


def _padded(rows: Sequence[Encoded], steps: list[list[int]], micro_tokens: int) -> list[Pass]:
    """Passes over rows that stand side by side."""
    return [Pass(*one) for own in steps for one in counted_side_by_side(rows, own, micro_tokens, SIDE_BY_SIDE)]


def _computed_once(spec: ModelSpec, config: TrainConfig, precision: str, rows: Sequence[Encoded], adds: Trained) -> int:
    """How many of the lowest layers are computed once for all epochs; see `_keep_features` and `labelled.look_once`."""
    limit = parse_bytes(config.feature_cache, "--feature-cache")
    if config.method == "head":
        return spec.layers if bytes_of(len(rows) * spec.hidden, "fp32") <= limit else 0
    below = spec.layers - adds.depth
    if not below or _total_steps(rows, config) <= _steps_per_epoch(rows, config):
        return 0
    size = bytes_of(sum(map(read_tokens, rows)) * spec.hidden, "fp32" if precision == "fp32" else "bf16")
    return below if size <= limit else 0


def over_first_rows(model: nn.Module, rows: Sequence[Encoded], config: TrainConfig) -> None:
    """Take a model that is not made faster yet over the rows of the first step, without gradients."""
    engine = plain(model)
    with torch.no_grad():
        for batch in _first_batches(rows, config, LEAST_MICRO_TOKENS, engine)[:BATCHES_LOOKED_AT]:
            engine.head_inputs(batch)


def gradients_of_first_rows(model: nn.Module, rows: Sequence[Encoded], config: TrainConfig) -> None:
    """Forward and back over some rows of the first step, in one pass. Leaves no gradients.

    One layer's activations at a time, and of logits a few rows: it is over before the engine is there.
    """
    engine = plain(model)
    if not isinstance(head_of(model), LoRALayer):  # whose gradient is to be seen whole
        with torch.no_grad():
            engine.chunked = Probe(model).logits_are_the_heads()
    batch = _first_batches(rows, config, GRADIENT_TOKENS, engine)[0]
    with in_place_of([(layer, run_again(layer)) for layer in decoder_layers(model)[1]]):
        (engine.loss(batch) / batch.supervised_tokens).backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = None


def _first_batches(rows: Sequence[Encoded], config: TrainConfig, micro_tokens: int, engine: Engine) -> list[Batch]:
    first = step_rows(len(rows), config.batch_size, config.order_seed, epoch=0, step=0)
    return micro_batches(rows, first, micro_tokens, engine.packing)


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
    engine = engine_of(model, share_prefix=config.dropout == 0, release=True)
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
    read = [len(input_of(row, engine.packing.apart)) for row in rows]
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
