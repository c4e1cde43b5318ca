"""`lorafit train` as one straight line: read this first.

config -> model spec -> rows -> plan -> model + adapter -> token ids and masks -> loop -> adapter, run.json, model card.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console

from lorafit import files
from lorafit.config import TrainConfig
from lorafit.data.store import Encoded, led
from lorafit.engine.engine import Engine
from lorafit.errors import ConfigError
from lorafit.export import card, saved, ways
from lorafit.infer.evaluate import by_row, finite, mean_loss, row_scores
from lorafit.infer.labels import measure, measure_scores
from lorafit.lora import inject
from lorafit.methods import gated, rounding, spectral, table
from lorafit.methods.depth import check_layer
from lorafit.methods.labels import Labels, label_head, put_head
from lorafit.methods.method import Attached, Beginning, Method
from lorafit.methods.tokens import attach_tokens
from lorafit.methods.virtual import lead_of
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.model.licence import licence_of
from lorafit.plan.memory import Split
from lorafit.rundir import RunDir
from lorafit.starting import Given, Settled, earlier_of, read, settle
from lorafit.train import checkpoint, halving, outcome, race
from lorafit.train.checkpoint import Checkpoint, Progress
from lorafit.train.labelled import Once, labelled_facts, look_once
from lorafit.train.loop import Work, fit
from lorafit.train.probing import choose_layer
from lorafit.train.reporting import ConsoleReporter, MetricsLog
from lorafit.train.setup import evaluation_tokens, gradients_of_first_rows, make_engine, over_first_rows
from lorafit.train.signals import stop_on_signals
from lorafit.train.told import print_attached, print_config, print_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Start:
    """How a run begins: whether it may go on with an earlier one, whether it ignores the plan, when it was called."""

    resume: bool
    force: bool
    started_at: float
    """Seconds since the epoch; load_s counts from here, so that imports are included."""


def train(config: TrainConfig, source: dict[str, str], start: Start, console: Console) -> dict[str, Any]:
    """Train, and write the run directory. Returns the content of run.json.

    source: where each setting came from, for the printed table. Raises LorafitError for whatever the user can mend.
    """
    rounding.check(config.init, config.base_storage, config.variant)
    spectral.check(config)
    gated.check(config)
    run = RunDir(config.output)
    run.check_usable(start.resume)
    if run.finished:
        console.print(f"{run.path} holds a finished run; nothing to do")
        return run.read_result()
    with run.lock():
        run.clean()
        earlier = earlier_of(run, console) if start.resume else None
        settled = settle(config, earlier, console)
        asked, config = config, _with_rates(config, settled)
        print_config(config, source, settled.chosen, console)
        config = config.model_copy(update={"lr": settled.chosen["lr"]})
        given = read(config, settled, start.force, console)
        ready = _make_ready(config, settled, given, run, console)
        is_halved = config.rank_schedule == halving.NAME
        held = halving.Held(partial(_measure, ready), len(ready.held_out or ())) if is_halved else None
        work = _work(config, settled, ready, held)
        load_s = time.time() - start.started_at
        begun = None
        if asked.lr == "auto":
            work, begun = _with_found_rate(work, settled, earlier, run, console)
            config = work.config
        run.write_config(asked.model_dump())
        progress, stopped = _fit(run, work, earlier, begun, console)
        result = _finish(config, settled, given, ready, work, progress, run) | {"load_s": load_s, "sources": source}
        if held:
            if stopped:  # by its last step, after which the rest may take long
                raise halving.interrupted(stopped)
            result |= _halve(config, given, ready, work, held, result, run, console)
        files.write_atomic(run.readme, card.render(result))
        files.write_json(run.run_json, result)
    print_result(run.path, result, console)
    return result


def _with_rates(config: TrainConfig, settled: Settled) -> TrainConfig:
    """What is usual for this method and model in the place of rates that are not given."""
    config = config.model_copy(update={"lr": config.lr or settled.chosen["lr"]})
    if settled.labels and config.method != "head":
        config = config.model_copy(update={"head_lr": config.head_rate})
    return config


# --- what the loop needs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """A model with what is trained on it, made fast, and rows as it reads them.

    told: what its head tells, None where it writes text. once: where a head alone is trained, what the model made of
    the rows. evaluation_micro: tokens of an evaluation's pass.
    """

    model: PreTrainedModel
    method: Method
    attached: Attached
    engine: Engine
    rows: Sequence[Encoded]
    held_out: Sequence[Encoded] | None
    split: Split
    evaluation_micro: int
    told: Labels | None
    once: Once | None


def _make_ready(config: TrainConfig, settled: Settled, given: Given, run: RunDir, console: Console) -> Ready:
    chosen, (loaded, told) = settled.chosen, _with_head(config, settled, given)
    attached = gated.attach(loaded.model, config)
    method = table.of(loaded.model)
    rows = led(given.encoded.encoded, lead_of(loaded.model))
    if given.added:
        ids, pieces = [token.id for token in given.added], [token.pieces for token in given.added]
        attached = attach_tokens(loaded.model, ids, pieces, attached)
    print_attached(attached, console)
    for line in method.start(loaded.model, _beginning(config, settled.inputs.spec, loaded, given.encoded.encoded)):
        console.print(line, highlight=False)
    split = Split(chosen["micro_tokens"], chosen["recompute"])
    engine = make_engine(loaded.model, rows, config, chosen["precision"], split, run.scratch, console)
    held: Sequence[Encoded] | None = given.held_out.encoded if given.held_out else None
    evaluation_micro = evaluation_tokens(rows, config, split)
    if told and config.probe:
        layer = choose_layer(engine, rows, held, told, config, chosen, run.scratch, measure_scores, console)
        told = replace(told, layer=layer)
    once = None
    if config.method == "head":
        once = look_once(engine, rows, held, config, split.micro_tokens, run.scratch, console)
    if once:
        engine, rows, held = once.engine, once.rows, once.held_out
    return Ready(loaded.model, method, attached, engine, rows, held, split, evaluation_micro, told, once)


def _with_head(config: TrainConfig, settled: Settled, given: Given) -> tuple[model_load.Loaded, Labels | None]:
    """The model in eval mode, with a head where rows have labels, and what that tells."""
    loaded, labels = given.loaded, settled.labels
    loaded.model.eval()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
    if not labels:
        return loaded, None
    layer = settled.chosen.get("layer", check_layer(loaded.model, None) if config.probe else config.layer)
    bias = settled.padded or config.method == "head"
    told = Labels(**asdict(labels), pooling=settled.pooling, layer=layer, bias=bias)
    return replace(loaded, model=cast("PreTrainedModel", put_head(loaded.model, told, config.seed))), told


def _beginning(
    config: TrainConfig, spec: model_spec.ModelSpec, loaded: model_load.Loaded, rows: Sequence[Encoded]
) -> Beginning:
    """What a method may know before the first step."""
    if config.prompt_text is None:
        labelled = label_head(loaded.model) is not None  # then the last cell is no token
        first = [int(token) for token in rows[0].input_ids[: -1 if labelled else None]]
        told = "the first row's tokens"
    else:
        first = loaded.tokenizer(config.prompt_text, add_special_tokens=False)["input_ids"]
        told = "the tokens of --prompt-text"
        if not first:
            raise ConfigError("--prompt-text has no tokens", "Give a few words, such as what the task is")
    over, back = (partial(look, loaded.model, rows, config) for look in (over_first_rows, gradients_of_first_rows))
    return Beginning(config, spec, first, told, over, back)


def _evaluation(ready: Ready, held: halving.Held | None) -> Callable[[], float] | None:
    """A function that gives the mean loss per supervised token over the held-out rows, without dropout, if any are.

    held: measures them where the ranks below are wanted too, which need the loss of each piece.
    """
    engine, held_out = ready.engine, ready.held_out
    if not held_out:
        return None
    if held:
        return lambda: finite(held.loss())

    def evaluate() -> float:
        engine.model.eval()
        return mean_loss(engine, held_out, ready.evaluation_micro, lambda rows: None)

    return evaluate


def _work(config: TrainConfig, settled: Settled, ready: Ready, held: halving.Held | None) -> Work:
    return Work(
        model=ready.engine.model,
        method=ready.method,
        rows=ready.rows,
        micro_tokens=ready.split.micro_tokens,
        engine=ready.engine,
        config=config,
        identity=settled.identity,
        evaluate=_evaluation(ready, held),
    )


def _with_found_rate(
    work: Work, settled: Settled, earlier: Checkpoint | None, run: RunDir, console: Console
) -> tuple[Work, race.Begun | None]:
    """With the learning rate that wins a race, or has won it when the run began; and how far a race has come."""
    chosen, usual = settled.chosen, work.config.peak_rate
    raced = None if earlier else race.run(work, usual, run.scratch, console)
    if raced:
        chosen |= {"race": raced[0].as_dict(), "lr": raced[0].lr}
        console.print(f"learning rate {raced[0].told}", highlight=False)
    elif not earlier:
        chosen |= {"race": None, "lr": usual}
        why = race.why_not(work) or "no rate came to the end of the race"
        console.print(f"learning rate {usual:g}, the usual one: {why}", highlight=False)
    found = replace(work, config=work.config.model_copy(update={"lr": chosen["lr"]}))
    return found, raced[1] if raced else None


# --- a run and its resumption -------------------------------------------------------------------------------------


def _fit(
    run: RunDir, work: Work, earlier: Checkpoint | None, begun: race.Begun | None, console: Console
) -> tuple[Progress, int]:
    """To the end, from an earlier run or from a race of rates. And the signal that asked to stop by then, or 0."""
    log = MetricsLog(run.metrics, earlier.progress.step if earlier else 0)
    if begun:
        log.write_steps(begun.steps)
    state = begun.state if begun else earlier

    def save(state: Checkpoint) -> None:
        checkpoint.write(run.checkpoints, state)

    done = state.progress.step if state else 0
    with ConsoleReporter(log, console, work.total_steps, done) as report, stop_on_signals() as stop:
        return fit(work, state, save, stop, report), stop.signal


# --- what happened ----------------------------------------------------------------------------------------------------


def _finish(
    config: TrainConfig, settled: Settled, given: Given, ready: Ready, work: Work, progress: Progress, run: RunDir
) -> dict[str, Any]:
    """Measure what was trained and write the adapter. Returns the content of run.json."""
    model, engine, told, chosen = ready.model, ready.engine, ready.told, settled.chosen
    quality: dict[str, Any] = {}
    if told and ready.held_out:
        quality = measure(engine, ready.held_out, told, ready.evaluation_micro).summary
    if head := label_head(model):
        head.fold()
    run.clean()
    ranks = gated.ranks(model, config)
    kept = ready.method.finish(model, config)
    saved.save(model, run.adapter, kept, outcome.lasting(config.model), given.loaded.tokenizer, told)
    formula = given.predicted.flop if given.predicted else None
    flop = outcome.flop_of(config, progress, formula, work.total_steps, engine.packing.padded)
    result = outcome.result(config, ready.attached, progress, settled.identity, given.estimate, flop)
    result |= outcome.engine_facts(engine)
    result["predicted_train_s"] = given.predicted.train_s if given.predicted else None
    if not told or config.method == "head":
        outcome.remember_speed(result, settled.inputs.spec, config)
    result |= {"ranks": ranks, "rank_schedule": config.rank_schedule}
    result |= _facts(config, settled, given, ready)
    result |= labelled_facts(told, given.data, progress.tokens_seen - progress.tokens_supervised, quality, ready.once)
    return result | {name: chosen[name] for name in ("probe", "race") if name in chosen}


def _halve(
    config: TrainConfig,
    given: Given,
    ready: Ready,
    work: Work,
    held: halving.Held,
    result: dict[str, Any],
    run: RunDir,
    console: Console,
) -> dict[str, Any]:
    """Leave an adapter of each rank below as well. Returns what is known of them, for run.json."""

    def save(r: int) -> None:
        one = next(layer for layer in inject.owners(ready.model).values() if layer.r == r)
        kept = config.model_copy(update={"r": r, "alpha": one.alpha})
        saved.save(ready.model, run.of_rank(r), kept, outcome.lasting(config.model), given.loaded.tokenizer)

    found, pieces = halving.halve(work, result["tokens_computed"], result["eval_loss"], held, save, console)
    if ready.held_out:
        rows = {str(r): _figures(one, ready.held_out) for r, one in pieces.items()}
        files.write_json(run.held_out, rows)
    return found


def _measure(ready: Ready, numbers: Sequence[int]) -> halving.HeldOut:
    """What the model as it is loses on these of the held-out pieces."""
    assert ready.held_out, "nothing is measured without"
    ready.engine.model.eval()
    pieces = [ready.held_out[n] for n in numbers]
    return halving.HeldOut(*row_scores(ready.engine, pieces, ready.evaluation_micro))


def _figures(one: halving.HeldOut, held_out: Sequence[Encoded]) -> dict[str, list[Any]]:
    """By row; nats that are not finite are None, as JSON has no such numbers."""
    figures = by_row(vars(one), held_out)
    figures["nats"] = [own if math.isfinite(own) else None for own in figures["nats"]]
    return figures


def _facts(config: TrainConfig, settled: Settled, given: Given, ready: Ready) -> dict[str, Any]:
    """What is known of rows and base, and where the result cannot go."""
    loaded, data, spec = given.loaded, given.data, settled.inputs.spec
    return {
        "rows": outcome.rows_facts(data.format, given.encoded, given.held_out),
        "added_tokens": {token.text: token.id for token in given.added},
        "quantization_error": loaded.kept.errors if loaded.kept else {},
        "system": data.system,
        "rows_left_out": data.bad_rows,
        "left_out": list(data.bad),
        "eval_data": outcome.lasting(config.eval) if config.eval and not config.eval.endswith("%") else None,
        "settings": config.model_dump(include=set(card.TRAINING)),
        "base_kind": spec.kind,
        "base_path": str(spec.path.absolute()),
        "base_license": licence_of(spec),
        "not_merged": table.why_not_merged(ready.model),
        "not_exported": {} if ready.told else ways.refusals(ready.model, loaded.tokenizer, spec),
    }
