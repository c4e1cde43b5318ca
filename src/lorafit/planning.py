"""`lorafit plan` as one straight line: headers, some rows -> counts, sizes, memory, operations, time -> advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorafit import files
from lorafit import rates as machine_rates
from lorafit.config import PlanConfig, TrainConfig, parse_bytes
from lorafit.errors import ConfigError
from lorafit.model import spec as model_spec
from lorafit.model.spec import ModelSpec
from lorafit.plan import gpus, machine
from lorafit.plan.counts import LABELS, by_part, trainable
from lorafit.plan.forecast import ASSUMED_MFU, PRECISIONS, TYPES, Forecast, fastest, forecast, on_gpu, ways
from lorafit.plan.gpus import gpu_of
from lorafit.plan.memory import data_bytes, splits
from lorafit.plan.show import page, print_plan
from lorafit.plan.storage import sizes
from lorafit.plan.work import MICRO_TOKENS, Pass, Shape, Steps, Work, full_flop, lora_flop
from lorafit.rates import Rates

if TYPE_CHECKING:
    from lorafit.data.encode import Data
    from lorafit.data.sample import Sample
    from lorafit.data.store import Encoded

# What of the settings is told beside the figures.
SHOWN = {"r", "batch_size", "epochs", "watts", "price"}
# Tokens of a row where there are no rows to look at.
SEQ_LEN = 512
# How the rows of DATA are to be read: said without DATA, they would be left out of the answer.
OF_DATA = ("format", "rename", "template", "loss_on")
# Steps that are made of the rows that were looked at.
STEPS = 24
# Tokens in memory; those of files above 8 MB are on disk.
TOKEN_BYTES, MOST_IN_MEMORY = 4, 2 << 20


@dataclass(frozen=True)
class Rows:
    """What is trained on. count: rows of an epoch, None where it is not known. data: what was seen of DATA, or None.

    seq_len, loss_share: tokens of a row, the mean of DATA's, and what of them has a loss.
    """

    work: Work
    count: int | None
    seq_len: int
    loss_share: float
    data: dict[str, Any] | None

    @property
    def nbytes(self) -> int:
        """What they take in memory: tokens of many are kept on disk and mapped."""
        count = self.count or 0
        tokens = count * self.seq_len
        return data_bytes(count, TOKEN_BYTES * tokens if tokens <= MOST_IN_MEMORY else 0)


def plan(config: PlanConfig, log: Console, out: Console | None) -> dict[str, Any]:
    """Predict what training a model takes. out: where it is printed, None for nowhere. Returns it as JSON.

    Nothing is loaded but headers, and some rows. Raises ModelError for a model that cannot be described, DataError for
    rows that cannot be used, ConfigError.
    """
    _check(config)
    spec = model_spec.describe(config.model)
    threads = config.threads or machine.physical_cores()
    if config.calibrate:
        from lorafit.train.calibrate import calibrate  # needs torch

        calibrate(threads, spec, log)
    rates = machine_rates.read(threads)
    limit = parse_bytes(config.memory, "--memory") if config.memory else machine.available_bytes()
    rows = _rows(config, spec)
    runs = [
        forecast(spec, config.r, rows.work, name, limit, rates, storage, rows.nbytes) for name, storage in ways(spec)
    ]
    found = _as_json(config, spec, rows, rates, threads, limit, runs)
    if out is not None:
        print_plan(found, out)
    if config.html:
        files.write_atomic(Path(config.html), page(found))
        log.print(f"wrote {config.html}", highlight=False)
    return found


def _check(config: PlanConfig) -> None:
    """Raises ConfigError for what would be left out of the answer without a word."""
    if config.watts and not config.rows and not config.data:
        raise ConfigError(
            "--watts is given without --rows or DATA", "Energy is that of a whole run: say how many rows it has"
        )
    if config.price and not config.watts:
        raise ConfigError("--price is given without --watts", "Cost follows from energy: say what the machine draws")
    unread = [
        name
        for name in OF_DATA
        if getattr(config, name) != PlanConfig.model_fields[name].get_default(call_default_factory=True)
    ]
    if unread and not config.data:
        raise ConfigError(f"--{unread[0].replace('_', '-')} is given without DATA", "Name the file that it is about")
    if config.data and config.loss_share:
        raise ConfigError("--loss-share is given beside DATA", "It is counted in DATA: leave it out")


def _rows(config: PlanConfig, spec: ModelSpec) -> Rows:
    if config.data is not None:
        return _rows_of_data(config, config.data, spec)
    seq_len, share = config.seq_len or SEQ_LEN, config.loss_share or 1.0
    return Rows(Shape(config.batch_size, seq_len, share), config.rows, seq_len, share, None)


def _rows_of_data(config: PlanConfig, name: str, spec: ModelSpec) -> Rows:
    """Steps as some of the rows make them."""
    some, data = _look(config, name, spec)
    pieces, tokens = data.set.pieces, data.set.tokens
    count = config.rows or (None if some.total is None else max(1, round(some.total * pieces / len(some.rows))))
    by_micro = _passes(data.set.encoded, config.batch_size)
    steps = by_micro[MICRO_TOKENS]
    work = Steps(tokens / pieces * min(pieces, config.batch_size), by_micro)
    loss_share = data.set.supervised_tokens / tokens
    seen: dict[str, Any] = {
        "name": name,
        "format": data.format,
        "rows": some.total,
        "counted": some.counted,
        "looked_at": len(some.rows),
        "first_only": some.first_only,
        "pieces": count,
        "tokens_per_row": tokens / pieces,
        "longest": data.set.longest,
        "loss_share": loss_share,
        "read_tokens_per_step": work.tokens,
        "computed_tokens_per_step": sum(one.tokens for step in steps for one in step) / len(steps),
        "unusable": data.bad_rows,
        "first_unusable": data.bad[0] if data.bad else None,
        "cut": data.set.cut_rows,
        "labels": len(data.told.names) if data.told else 0,
    }
    return Rows(work, count, round(tokens / pieces), loss_share, seen)


def _look(config: PlanConfig, name: str, spec: ModelSpec) -> tuple[Sample, Data]:
    """Some rows, as they are and as the model reads them."""
    # Only here: reading rows takes libraries that a plan without them does without.
    from lorafit.data.encode import Reading, encode_rows
    from lorafit.data.labels import names_of, task_of
    from lorafit.data.load import locate
    from lorafit.data.sample import sample
    from lorafit.data.template import use_template
    from lorafit.model import light_tokenizer

    tokenizer: Any = light_tokenizer.read(spec)
    if config.template:
        use_template(tokenizer, config.template)
    some = sample(locate(name).train())
    seq_len = config.seq_len or TrainConfig.model_fields["seq_len"].default
    found, task = None, task_of(locate(name).train(), config.format, config.rename)
    if task != "generate":
        found = names_of(some.rows, config.format, config.rename, skip_bad=True, task=task)
    reading = Reading(config.format, config.rename, True, config.loss_on, seq_len, found)
    return some, encode_rows(some.rows, tokenizer, reading)


def _passes(encoded: Sequence[Encoded], batch_size: int) -> dict[int, list[list[Pass]]]:
    """By the most tokens of a pass: those of some whole steps, in orders that a run could have."""
    from lorafit.data.batching import counted, step_rows

    rows = len(encoded)
    steps = [
        step
        for epoch in range(STEPS)
        for number in range(-(-rows // batch_size))
        if len(step := step_rows(rows, batch_size, 0, epoch, number)) == min(rows, batch_size)
    ][:STEPS]
    sizes = {split.micro_tokens for split in splits(MICRO_TOKENS)}
    return {size: [[Pass(*one) for one in counted(encoded, step, size)] for step in steps] for size in sizes}


def _as_json(
    config: PlanConfig, spec: ModelSpec, rows: Rows, rates: Rates, threads: int, limit: int, runs: list[Forecast]
) -> dict[str, Any]:
    steps = None if rows.count is None else math.ceil(rows.count / config.batch_size) * config.epochs
    lora, full = lora_flop(spec, config.r, rows.work, MICRO_TOKENS), full_flop(spec, rows.work, MICRO_TOKENS)
    best = fastest(runs)
    told = {"rows": rows.count, "seq_len": rows.seq_len, "loss_share": rows.loss_share}
    return {
        "model": config.model,
        "settings": config.model_dump(include=SHOWN) | told,
        "data": rows.data,
        "architecture": spec.architecture,
        "parameters": spec.parameters,
        "parts": by_part(spec),
        "tied": spec.tied,
        "stored_as": dict(spec.storage),
        "weight_bytes": spec.weight_bytes,
        "sizes": [asdict(size) for size in sizes(spec)],
        "trainable": [asdict(one) for one in trainable(spec, (rows.data or {}).get("labels") or LABELS)],
        "flop_per_token": {
            "forward": lora.forward / rows.work.tokens,
            "lora": lora.total / rows.work.tokens,
            "full": full.total / rows.work.tokens,
            "attention_share": lora.attention / lora.total,
        },
        "machine": {
            "threads": threads,
            "memory_bytes": limit,
            "flop_per_s": dict(rates.flop_per_s),
            "mfu": {name: rates.mfu_of(name, spec.hidden) for name in PRECISIONS},
            "assumed_mfu": ASSUMED_MFU,
        },
        "types": TYPES,
        "steps": steps,
        "runs": [_run(one, config, steps) for one in runs],
        "gpu": _gpu(config, spec, rows, steps) if config.gpu else None,
        "advice": _command(config, best) if best else None,
    }


def _gpu(config: PlanConfig, spec: ModelSpec, rows: Rows, steps: int | None) -> dict[str, Any]:
    gpu = gpu_of(config.gpu or "")
    unpowered = config.model_copy(update={"watts": None, "price": None})  # those are this machine's
    runs = [_run(one, unpowered, steps) for one in on_gpu(spec, config.r, rows.work, gpu)]
    return asdict(gpu) | {"assumed_mfu": gpus.ASSUMED_MFU, "runs": runs}


def _run(one: Forecast, config: PlanConfig, steps: int | None) -> dict[str, Any]:
    known = one.step_s is not None and steps is not None
    energy = one.energy_kwh(config.watts, steps) if config.watts and steps else None
    return {
        "precision": one.precision,
        "base_storage": one.storage,
        "peak_bytes": one.memory.peak_bytes,
        "memory": one.memory.parts,
        "micro_tokens": one.split.micro_tokens,
        "recompute": one.split.recompute,
        "fits": one.fits,
        "flop": one.flop.total,
        "step_s": one.step_s,
        "tokens_per_s": one.tokens_per_s,
        "train_s": one.step_s * steps if known and one.step_s and steps else None,
        "energy_kwh": energy,
        "cost": energy * config.price if energy is not None and config.price else None,
    }


def _command(config: PlanConfig, best: Forecast) -> str:
    """What to type. Settings that are the default are left out."""
    usual = TrainConfig.model_fields["seq_len"].default
    seq_len = config.seq_len if config.seq_len and (config.data or config.seq_len > usual) else usual
    settings = config.model_dump(include={"r", "batch_size", "epochs", "format", "template", "loss_on"})
    given = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in (settings | {"seq_len": seq_len}).items()
        if value != TrainConfig.model_fields[name].default
    ]
    given += [f"--rename {','.join(f'{old}={new}' for old, new in config.rename.items())}"] if config.rename else []
    memory = [f"--memory {config.memory}"] if config.memory else []
    kept = [f"--base-storage {best.storage}"] if best.storage != "auto" else []
    parts = [
        "lorafit train",
        config.model,
        f"{config.data or 'DATA'} -o runs/first",
        f"--precision {best.precision}",
        *kept,
        *given,
        *memory,
    ]
    return " ".join(parts)
