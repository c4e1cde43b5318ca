"""What `lorafit train` settles and reads before its model is made ready: inputs, choices, rows, what they will take.

settle: spec, labels, precision and threads, hashes -> what makes the run this run. read: model and rows -> the plan,
which stops here what cannot fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console

from lorafit.config import TrainConfig, parse_bytes, usual_rate
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
from lorafit.errors import ConfigError
from lorafit.lora.tokens import make_room
from lorafit.methods import gated
from lorafit.methods.labels import pooling_of
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.plan import machine, memory, trained
from lorafit.plan.memory import Split
from lorafit.rundir import RunDir, check_same
from lorafit.slabs import SLABS
from lorafit.train import checkpoint, halving, outcome
from lorafit.train.checkpoint import Checkpoint
from lorafit.train.labelled import find_labels, precision_of
from lorafit.train.setup import Expected, expected, fit_to_memory, precision_that_fits

# What may differ between a run and its resumption without changing a number. Model and data are held by their hashes.
FREE_TO_CHANGE = frozenset({"output", "save_every", "memory", "model", "data"})


# --- what the run is, before anything large is read -----------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What the user named, found and hashed. held_out: a source of its own, or the share of rows that is held out."""

    spec: model_spec.ModelSpec
    train: Source
    held_out: Source | float | None
    hashes: dict[str, str]


@dataclass(frozen=True)
class Settled:
    """labels: that rows have, None where text is written. padded: whether rows stand side by side.

    adds: what is trained, as the plan counts it. chosen: what is chosen by measuring, once; more comes in as it is
    found. identity: what makes this run the same run.
    """

    inputs: Inputs
    labels: Names | None
    is_encoder: bool
    pooling: str
    padded: bool
    adds: trained.Trained
    chosen: dict[str, Any]
    identity: dict[str, Any]


def settle(config: TrainConfig, earlier: Checkpoint | None, console: Console) -> Settled:
    """Find inputs, and choose what is chosen by measuring, or take what `earlier` has. Sets torch's threads.

    Raises LorafitError for inputs that are not there, settings that do not go with them, another run than `earlier`.
    """
    inputs = _read_inputs(config)
    labels = find_labels(config, inputs.train)
    halving.check(config, labelled=labels is not None)
    if config.head_lr and (labels is None or config.method == "head"):
        why = "whose rate is --lr" if labels else "and the rows have no labels, so there is no head"
        raise ConfigError(f"--head-lr is given with --method {config.method}, {why}", "Leave --head-lr out")
    is_encoder = labels is not None and model_load.is_encoder(inputs.spec)
    pooling = pooling_of(config.pooling, is_encoder, config.method, labels.task if labels else "generate")
    padded = is_encoder or pooling != "last"
    adds = trained.of(inputs.spec, gated.as_attached(config), len(labels.names) if labels else 0, padded)
    chosen = _chosen(config, earlier, is_encoder)
    if not earlier and config.precision == "auto" and config.method != "full":
        fastest = chosen["precision"]
        chosen["precision"] = precision_that_fits(inputs.spec, config, fastest, _limit(config), adds)
        if chosen["precision"] != fastest:
            console.print(f"bf16, as {fastest}, which is faster here, would take more memory than there is")
    if slow := precision.warning(config.precision):
        console.print(slow, style="yellow", highlight=False)
    identity = _identity(config, inputs, chosen)
    if earlier:
        _check_same_run(earlier.identity, identity, console)
    return Settled(inputs, labels, is_encoder, pooling, padded, adds, chosen, identity)


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


# --- model and rows -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """adds: what is trained, as the plan counts it. estimate, predicted: of memory, and of operations and time."""

    loaded: model_load.Loaded
    added: list[AddedToken]
    data: Data
    encoded: EncodedSet
    held_out: EncodedSet | None
    estimate: memory.MemoryEstimate
    predicted: Expected | None


def read(config: TrainConfig, settled: Settled, force: bool, console: Console) -> Given:
    """Load model and rows, and predict what the run takes. Raises DataError, ModelError.

    Raises DoesNotFitError where the run is predicted to take more memory than there is, unless `force`.
    """
    spec, labels, chosen, adds = settled.inputs.spec, settled.labels, settled.chosen, settled.adds
    SLABS.reserve(memory.reserved_bytes(spec, adds, chosen["precision"]))
    dtype = precision.DTYPES[chosen["precision"]]
    loaded = model_load.load(spec, dtype, config.trust_remote_code, config.base_storage, features=labels is not None)
    if loaded.kept:
        console.print(loaded.kept.describe(), highlight=False)
    if config.template:
        use_template(loaded.tokenizer, config.template)
    added = _add_tokens(config, loaded, console)
    data, encoded, held_out = _encode(config, settled.inputs, loaded.tokenizer, labels, settled.is_encoder, console)
    longest = max(one.longest for one in (encoded, held_out) if one is not None) + config.lead_tokens
    if spec.most_tokens and longest > spec.most_tokens:
        raise model_spec.too_long(longest, spec.most_tokens, config.lead_tokens)
    followed = gated.followed_numbers(config, adds.params)
    adds = replace(adds, evaluated=held_out is not None, kept=adds.kept + followed)
    rows = led(encoded.encoded, range(spec.vocab, spec.vocab + config.lead_tokens))
    estimate, predicted = _plan(config, spec, chosen, rows, adds, force, console)
    return Given(loaded, added, data, encoded, held_out, estimate, predicted)


def _add_tokens(config: TrainConfig, loaded: model_load.Loaded, console: Console) -> list[AddedToken]:
    """What --add-tokens names, known to the tokenizer and with a row in the model."""
    if not config.add_tokens:
        return []
    added = add_tokens(loaded.tokenizer, config.add_tokens)
    new_rows = make_room(loaded.model, [token.id for token in added])
    console.print(told(added, new_rows), highlight=False, markup=False)
    return added


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
    limit = _limit(config)
    begun = Split(chosen["micro_tokens"], chosen["recompute"]) if "micro_tokens" in chosen else None
    split, estimate = fit_to_memory(spec, config, chosen["precision"], rows, limit, force, begun, adds)
    chosen |= {"micro_tokens": split.micro_tokens, "recompute": split.recompute}
    console.print(f"predicted peak memory: {estimate.describe()}", highlight=False)
    if chosen["micro_tokens"] < config.micro_tokens:
        console.print(f"steps are split into {chosen['micro_tokens']} tokens, to stay below it", highlight=False)
    found = expected(spec, config, chosen["precision"], rows, split, chosen["threads"], adds)
    if found and found.told:
        more = f", the ranks below it {halving.SHARE:.0%} more" if config.rank_schedule == halving.NAME else ""
        console.print(f"{found.told}{more}", highlight=False)
    return estimate, found


def _limit(config: TrainConfig) -> int:
    """Bytes that the whole process may take."""
    return parse_bytes(config.memory, "--memory") if config.memory else machine.available_bytes() + machine.rss_bytes()


# --- a run and its resumption --------------------------------------------------------------------------------------


def _chosen(config: TrainConfig, earlier: Checkpoint | None, is_encoder: bool) -> dict[str, Any]:
    """What is chosen by measuring is chosen once: a resumed run uses what the first one found. Sets torch's threads."""
    found = earlier.identity["chosen"] if earlier else {}
    threads = found.get("threads") or config.threads or machine.usual_threads()
    torch.set_num_threads(threads)
    precision = found.get("precision") or _precision(config, is_encoder)
    given = config.lr if config.lr != "auto" else None  # of auto the usual one is where the search begins
    lr = given or found.get("lr") or usual_rate(config.method, config.variant, is_encoder, config.layers is not None)
    return {**found, "precision": precision, "threads": threads, "lr": lr}


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
    settings["lr"] = config.lr if config.lr == "auto" else chosen["lr"]
    return {"config": settings, "sha256": inputs.hashes, "chosen": chosen, "versions": outcome.versions()}


def earlier_of(run: RunDir, console: Console) -> Checkpoint | None:
    """The newest checkpoint that is whole, to go on from; says on the console which, and what is wrong with others."""
    found, complaints = checkpoint.newest(run.checkpoints)
    for complaint in complaints:
        console.print(complaint, style="yellow")
    console.print(f"resuming after step {found.progress.step}" if found else "no checkpoint to resume: starting fresh")
    return found


def _check_same_run(earlier: dict[str, Any], now: dict[str, Any], console: Console) -> None:
    """Refuse to resume under other settings or inputs. Raises CheckpointError that shows each difference."""
    check_same("run", earlier, now)
    if earlier["versions"] != now["versions"]:
        console.print(
            "versions differ from those the run began with: the result may differ in rounding", style="yellow"
        )
