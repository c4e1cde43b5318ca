"""`lorafit train` as one straight line: read this first.

config -> model spec -> rows -> plan -> model + adapter -> token ids and masks -> loop -> adapter, run.json, model card.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console

from lorafit import files
from lorafit.config import TrainConfig, parse_bytes
from lorafit.data.added import AddedToken, add_tokens, told
from lorafit.data.encode import Data, Reading, encode_source
from lorafit.data.labels import Names
from lorafit.data.load import Source, locate
from lorafit.data.mask import EncodedSet
from lorafit.data.preflight import before_training, counts_of, told_counts
from lorafit.data.progress import counting
from lorafit.data.split import share_of
from lorafit.data.store import Encoded, led
from lorafit.data.template import read_template, use_template
from lorafit.engine import precision
from lorafit.engine.engine import Engine
from lorafit.errors import ConfigError
from lorafit.export import card, saved, ways
from lorafit.infer import by_rank
from lorafit.infer.evaluate import mean_loss
from lorafit.infer.labels import measure, measure_scores
from lorafit.lora.tokens import make_room
from lorafit.methods import gated, rounding, spectral, table
from lorafit.methods.depth import check_layer
from lorafit.methods.labels import Labels, label_head, pooling_of, put_head
from lorafit.methods.method import Beginning
from lorafit.methods.tokens import attach_tokens
from lorafit.methods.virtual import lead_of
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.model.licence import licence_of
from lorafit.plan import machine, memory, trained
from lorafit.plan.memory import Split
from lorafit.rundir import RunDir
from lorafit.slabs import SLABS
from lorafit.train import checkpoint, nested, outcome
from lorafit.train.checkpoint import Checkpoint, Progress
from lorafit.train.labelled import find_labels, labelled_facts, look_once, precision_of
from lorafit.train.loop import Work, fit
from lorafit.train.probing import choose_layer
from lorafit.train.reporting import ConsoleReporter, MetricsLog
from lorafit.train.setup import (
    Expected,
    evaluation_tokens,
    expected,
    fit_to_memory,
    gradients_of_first_rows,
    make_engine,
    over_first_rows,
)
from lorafit.train.signals import stop_on_signals
from lorafit.train.told import print_attached, print_config, print_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What may differ between a run and its resumption without changing a number. Model and data are held by their hashes.
FREE_TO_CHANGE = frozenset({"output", "save_every", "memory", "model", "data"})


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
        earlier = _earlier(run, console) if start.resume else None
        inputs = _read_inputs(config)
        labels = find_labels(config, inputs.train)
        nested.check(config, labelled=labels is not None)
        is_encoder = labels is not None and model_load.is_encoder(inputs.spec)
        pooling = pooling_of(config.pooling, is_encoder, config.method, labels.task if labels else "generate")
        chosen = _chosen(config, earlier, is_encoder)
        identity = _identity(config, inputs, chosen)
        if earlier:
            _check_same_run(earlier.identity, identity, console)
        print_config(config, source, chosen, console)

        padded = is_encoder or pooling != "last"
        adds = trained.of(inputs.spec, gated.as_attached(config), len(labels.names) if labels else 0, padded)
        SLABS.reserve(memory.reserved_bytes(inputs.spec, adds, chosen["precision"]))
        dtype = precision.DTYPES[chosen["precision"]]
        loaded = model_load.load(
            inputs.spec, dtype, config.trust_remote_code, config.base_storage, features=labels is not None
        )
        if loaded.kept:
            console.print(loaded.kept.describe(), highlight=False)
        if config.template:
            use_template(loaded.tokenizer, config.template)
        added = _add_tokens(config, loaded, console)
        data, encoded, held_out = _encode(config, inputs, loaded.tokenizer, labels, is_encoder, console)
        followed = gated.followed_numbers(config, adds.params)
        adds = replace(adds, evaluated=held_out is not None, kept=adds.kept + followed)
        lead = range(inputs.spec.vocab, inputs.spec.vocab + config.lead_tokens)
        estimate, predicted = _plan(config, inputs.spec, chosen, led(encoded.encoded, lead), adds, start.force, console)
        loaded.model.eval()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
        told = None
        if labels:
            layer = chosen.get("layer", check_layer(loaded.model, None) if config.probe else config.layer)
            more: dict[str, Any] = {"pooling": pooling, "layer": layer, "bias": padded or config.method == "head"}
            told = Labels(**asdict(labels), **more)
            loaded = replace(loaded, model=cast("PreTrainedModel", put_head(loaded.model, told, config.seed)))
        attached = gated.attach(loaded.model, config)
        method = table.of(loaded.model)
        rows = led(encoded.encoded, lead_of(loaded.model))
        if added:
            ids, pieces = [token.id for token in added], [token.pieces for token in added]
            attached = attach_tokens(loaded.model, ids, pieces, attached)
        print_attached(attached, console)
        for line in method.start(loaded.model, _beginning(config, inputs.spec, loaded, encoded.encoded)):
            console.print(line, highlight=False)
        split = Split(chosen["micro_tokens"], chosen["recompute"])
        engine = make_engine(loaded.model, rows, config, chosen["precision"], split, run.scratch, console)
        held: Sequence[Encoded] | None = held_out.encoded if held_out else None
        evaluation_micro = evaluation_tokens(rows, config, split)
        once = None
        if told and config.probe:
            told = replace(
                told, layer=choose_layer(engine, rows, held, told, config, chosen, run.scratch, measure_scores, console)
            )
        if config.method == "head":
            once = look_once(engine, rows, held, config, split.micro_tokens, run.scratch, console)
        if once:
            engine, rows, held = once.engine, once.rows, once.held_out
        work = Work(
            model=engine.model,
            method=method,
            rows=rows,
            micro_tokens=split.micro_tokens,
            engine=engine,
            config=config,
            identity=identity,
            evaluate=_evaluation(engine, held, evaluation_micro) if held else None,
        )
        load_s = time.time() - start.started_at
        run.write_config(config.model_dump())
        progress = _fit(run, work, earlier, console)

        quality = measure(engine, held, told, evaluation_micro).summary if told and held else {}
        if head := label_head(loaded.model):
            head.fold()
        rank_losses = by_rank.losses(engine, held, nested.ranks(config), evaluation_micro)
        run.clean()
        ranks = gated.ranks(loaded.model, config)
        kept = method.finish(loaded.model, config)
        saved.save(loaded.model, run.adapter, kept, outcome.lasting(config.model), loaded.tokenizer, told)
        flop = outcome.flop_of(config, progress, predicted.flop if predicted else None, work.total_steps)
        result = outcome.result(config, attached, progress, identity, estimate, load_s, flop)
        result |= outcome.engine_facts(engine)
        result["predicted_train_s"] = predicted.train_s if predicted else None
        if not told or config.method == "head":
            outcome.remember_speed(result, inputs.spec, config)
        result |= {
            "ranks": ranks,
            "sources": source,
            "rows": outcome.rows_facts(data.format, encoded, held_out),
            "rank_schedule": config.rank_schedule,
            "nested": rank_losses or None,
            "added_tokens": {token.text: token.id for token in added},
            "quantization_error": loaded.kept.errors if loaded.kept else {},
            "system": data.system,
            "rows_left_out": data.bad_rows,
            "left_out": list(data.bad),
            "eval_data": outcome.lasting(config.eval) if config.eval and not config.eval.endswith("%") else None,
            "settings": config.model_dump(include=set(card.TRAINING)),
            "base_kind": inputs.spec.kind,
            "base_path": str(inputs.spec.path.absolute()),
            "base_license": licence_of(inputs.spec),
            "not_merged": table.why_not_merged(loaded.model),
            "not_exported": {} if told else ways.refusals(loaded.model, loaded.tokenizer, inputs.spec),
        } | labelled_facts(told, data, progress.tokens_seen - progress.tokens_supervised, quality, once)
        result |= {"probe": chosen["probe"]} if "probe" in chosen else {}
        files.write_atomic(run.readme, card.render(result))
        files.write_json(run.run_json, result)
    print_result(run.path, result, console)
    return result


# --- before the loop ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What the user named, found and hashed. held_out: a source of its own, or the share of rows that is held out."""

    spec: model_spec.ModelSpec
    train: Source
    held_out: Source | float | None
    hashes: dict[str, str]


def _read_inputs(config: TrainConfig) -> Inputs:
    spec = model_spec.read(config.model)
    located = locate(config.data)
    train = located.train()
    hashes = {"model": model_spec.sha256(spec), "data": train.digest()}
    held_out: Source | float | None = located.held_out()
    if config.eval and config.eval.endswith("%"):
        held_out = share_of(config.eval)
    elif config.eval:
        held_out = locate(config.eval).unseen()
    if config.template:
        hashes["template"] = hashlib.sha256(read_template(config.template).encode()).hexdigest()
    if isinstance(held_out, Source):
        hashes["eval"] = held_out.digest()
    return Inputs(spec, train, held_out, hashes)


def _add_tokens(config: TrainConfig, loaded: model_load.Loaded, console: Console) -> list[AddedToken]:
    """What --add-tokens names, known to the tokenizer and with a row in the model."""
    if not config.add_tokens:
        return []
    added = add_tokens(loaded.tokenizer, config.add_tokens)
    new_rows = make_room(loaded.model, [token.id for token in added])
    console.print(told(added, new_rows), highlight=False, markup=False)
    return added


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


def _encode(
    config: TrainConfig,
    inputs: Inputs,
    tokenizer: Any,
    labels: Names | None,
    is_encoder: bool,
    console: Console,
) -> tuple[Data, EncodedSet, EncodedSet | None]:
    """What is known of the training rows, what is trained on, and what is held out."""
    seq_len = min(config.seq_len, tokenizer.model_max_length) if is_encoder else config.seq_len
    reading = Reading(config.format, config.rename, config.skip_bad, config.loss_on, seq_len, labels)

    def encoded(source: Source) -> Data:
        with counting(console, source.name) as on_rows:
            return encode_source(source, tokenizer, reading, on_rows)

    data = encoded(inputs.train)
    train, held_out, other = data.set, None, None
    if isinstance(inputs.held_out, float):
        held = data.held_out(inputs.held_out, config.seed)
        train, held_out = data.part(~held), data.part(held)
    elif inputs.held_out is not None:
        other = encoded(inputs.held_out)
        held_out = other.set
    console.print(f"train ({data.format}): {train.summary}", highlight=False)
    if labels:
        counts = told_counts(counts_of(data)) if labels.task != "regress" else ""
        console.print(": ".join(filter(None, (labels.counted, counts))), highlight=False, markup=False)
    if held_out is not None:
        console.print(f"held out: {held_out.summary}", highlight=False)
    for line in other.left_out() if other else ():
        console.print(f"held out: {line}", style="yellow", highlight=False)
    for line in [*data.remarks(), *before_training(config.data, data, tokenizer, other)]:
        console.print(line, style="yellow", highlight=False)
    return data, train, held_out


def _plan(
    config: TrainConfig,
    spec: model_spec.ModelSpec,
    chosen: dict[str, Any],
    rows: Sequence[Encoded],
    adds: trained.Trained,
    force: bool,
    console: Console,
) -> tuple[memory.MemoryEstimate, Expected | None]:
    """What is predicted, shown; into `chosen`, how steps are split to stay below the limit. Raises DoesNotFitError."""
    limit = parse_bytes(config.memory, "--memory") if config.memory else machine.available_bytes() + machine.rss_bytes()
    begun = Split(chosen["micro_tokens"], chosen["recompute"]) if "micro_tokens" in chosen else None
    split, estimate = fit_to_memory(spec, config, chosen["precision"], rows, limit, force, begun, adds)
    chosen |= {"micro_tokens": split.micro_tokens, "recompute": split.recompute}
    console.print(f"predicted peak memory: {estimate.describe()}", highlight=False)
    if chosen["micro_tokens"] < config.micro_tokens:
        console.print(f"steps are split into {chosen['micro_tokens']} tokens, to stay below it", highlight=False)
    found = expected(spec, config, chosen["precision"], rows, split, chosen["threads"], adds)
    if found and found.told:
        console.print(found.told, highlight=False)
    return estimate, found


def _evaluation(engine: Engine, held_out: Sequence[Encoded], micro_tokens: int) -> Callable[[], float]:
    """A function that gives the mean loss per supervised token over the held-out rows, without dropout."""

    def evaluate() -> float:
        engine.model.eval()
        return mean_loss(engine, held_out, micro_tokens, lambda rows: None)

    return evaluate


# --- a run and its resumption -------------------------------------------------------------------------------------


def _chosen(config: TrainConfig, earlier: Checkpoint | None, is_encoder: bool) -> dict[str, Any]:
    """What is chosen by measuring is chosen once: a resumed run uses what the first one found. Sets torch's threads."""
    found = earlier.identity["chosen"] if earlier else {}
    threads = found.get("threads") or config.threads or machine.physical_cores()
    torch.set_num_threads(threads)
    return {**found, "precision": found.get("precision") or _precision(config, is_encoder), "threads": threads}


def _precision(config: TrainConfig, is_encoder: bool) -> str:
    """The type of products. Weights that are trained themselves are in fp32: an update of 16 bits is lost in them."""
    if config.method != "full":
        return precision_of(config, is_encoder)
    if config.precision not in ("auto", "fp32"):
        raise ConfigError(
            f"--method full is given with --precision {config.precision}, and trains weights in fp32 alone",
            "Leave --precision out",
        )
    return "fp32"


def _identity(config: TrainConfig, inputs: Inputs, chosen: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be the same: settings, inputs, choices, versions."""
    settings = {name: value for name, value in config.model_dump().items() if name not in FREE_TO_CHANGE}
    return {"config": settings, "sha256": inputs.hashes, "chosen": chosen, "versions": outcome.versions()}


def _earlier(run: RunDir, console: Console) -> Checkpoint | None:
    found, complaints = checkpoint.newest(run.checkpoints)
    for complaint in complaints:
        console.print(complaint, style="yellow")
    console.print(f"resuming after step {found.progress.step}" if found else "no checkpoint to resume: starting fresh")
    return found


def _check_same_run(earlier: dict[str, Any], now: dict[str, Any], console: Console) -> None:
    """Refuse to resume under other settings or inputs. Raises CheckpointError that shows each difference."""
    checkpoint.check_same("run", earlier, now)
    if earlier["versions"] != now["versions"]:
        console.print(
            "versions differ from those the run began with: the result may differ in rounding", style="yellow"
        )


def _fit(run: RunDir, work: Work, earlier: Checkpoint | None, console: Console) -> Progress:
    done = earlier.progress.step if earlier else 0
    log = MetricsLog(run.metrics, done)

    def save(state: Checkpoint) -> None:
        checkpoint.write(run.checkpoints, state)

    with ConsoleReporter(log, console, work.total_steps, done) as report, stop_on_signals() as stop:
        return fit(work, earlier, save, stop, report)
