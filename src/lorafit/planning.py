"""`lorafit plan` as one straight line: headers, some rows -> counts, sizes, memory, operations, time -> advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorafit import files
from lorafit import rates as machine_rates
from lorafit.config import MethodConfig, PlanConfig, TrainConfig, parse_bytes
from lorafit.errors import ConfigError
from lorafit.model import spec as model_spec
from lorafit.model.spec import ModelSpec
from lorafit.plan import gpus, machine
from lorafit.plan.counts import LABELS, by_part, trainable
from lorafit.plan.flops import Flop
from lorafit.plan.forecast import ASSUMED_MFU, SPEEDS, TYPES, Forecast, fastest, on_gpu
from lorafit.plan.gpus import gpu_of
from lorafit.plan.memory import data_bytes, resident_bytes, splits
from lorafit.plan.show import page, print_plan
from lorafit.plan.storage import sizes
from lorafit.plan.survey import Around, Row, in_all_ways, name_of, over_shapes, survey
from lorafit.plan.work import MICRO_TOKENS, Pass, Shape, Steps, Work, step_flop

if TYPE_CHECKING:
    from lorafit.data.encode import Data
    from lorafit.data.sample import Sample
    from lorafit.data.store import Encoded

# What of the settings is told beside the figures.
SHOWN = {"method", "layers", "r", "batch_size", "epochs", "watts", "price"}
# What is part of the command that is advised.
TYPED = {"method", "variant", "layers", "r", "batch_size", "epochs", "format", "template", "loss_on"}
# Tokens of a row where there are no rows to look at.
SEQ_LEN = 512
# How the rows of DATA are to be read: said without DATA, they would be left out of the answer.
OF_DATA = ("format", "rename", "template", "loss_on")
# Steps that are made of the rows that were looked at.
STEPS = 24


@dataclass(frozen=True)
class Rows:
    """What is trained on. count: rows of an epoch, None where it is not known. data: what was seen of DATA, or None.

    works: the steps for so many virtual tokens in front of each row. seq_len, loss_share: tokens of a row, the mean of
    DATA's, and what of them has a loss. labels: that DATA has.
    """

    works: Callable[[int], Work]
    count: int | None
    seq_len: int
    loss_share: float
    data: dict[str, Any] | None
    labels: int = 0

    def work_of(self, config: MethodConfig) -> Work:
        """Steps of a run by a method, with its virtual tokens."""
        return self.works(config.lead_tokens)

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        count = self.count or 0
        return data_bytes(count, resident_bytes(count, count * self.seq_len))


def plan(config: PlanConfig, log: Console, out: Console | None) -> dict[str, Any]:
    """Predict what training a model takes. out: where it is printed, None for nowhere. Returns it as JSON.

    Nothing is loaded but headers, and some rows. Raises ModelError for a model that cannot be described, DataError for
    rows that cannot be used, ConfigError.
    """
    _check(config)
    method = MethodConfig(**config.model_dump(include={"method", "variant", "layers", "r"}))
    spec = model_spec.describe(config.model)
    threads = config.threads or machine.usual_threads()
    if config.calibrate:
        from lorafit.train.calibrate import calibrate  # needs torch

        calibrate(threads, spec, log)
    rates = machine_rates.read(threads)
    limit = parse_bytes(config.memory, "--memory") if config.memory else machine.available_bytes()
    rows = _rows(config, spec)
    if method.method == "head" and not rows.labels:
        raise ConfigError("--method head is given, and there are no labels", "Give DATA with text and label")
    around = Around(spec, limit, rates, rows.nbytes, rows.labels)
    runs = in_all_ways(around, method, rows.work_of(method))
    found = _as_json(config, around, method, rows, threads, runs)
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
    shape = Shape(config.batch_size, seq_len, share, sees_all=not spec.writes_text)
    return Rows(lambda lead: replace(shape, lead=lead), config.rows, seq_len, share, None)


def _rows_of_data(config: PlanConfig, name: str, spec: ModelSpec) -> Rows:
    """Steps as some of the rows make them."""
    from lorafit.data.store import led as led_by

    some, data = _look(config, name, spec)
    if spec.most_tokens and data.set.longest > spec.most_tokens:
        raise model_spec.too_long(data.set.longest, spec.most_tokens)
    pieces, tokens = data.set.pieces, data.set.tokens
    count = config.rows or (None if some.total is None else max(1, round(some.total * pieces / len(some.rows))))
    read_tokens = tokens / pieces * min(pieces, config.batch_size)

    @cache
    def works(lead: int) -> Steps:
        led = led_by(data.set.encoded, range(spec.vocab, spec.vocab + lead))
        return Steps(read_tokens, _passes(led, config.batch_size, side_by_side=not spec.writes_text))

    steps = works(0).by_micro[MICRO_TOKENS]
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
        "read_tokens_per_step": read_tokens,
        "computed_tokens_per_step": sum(one.tokens for step in steps for one in step) / len(steps),
        "unusable": data.bad_rows,
        "first_unusable": data.bad[0] if data.bad else None,
        "cut": data.set.cut_rows,
        "labels": len(data.told.names) if data.told else 0,
    }
    return Rows(works, count, round(tokens / pieces), loss_share, seen, len(data.told.names) if data.told else 0)


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
    if not spec.writes_text and spec.most_tokens:
        seq_len = min(seq_len, spec.most_tokens)  # where a training cuts an encoder's rows
    found, task = None, task_of(locate(name).train(), config.format, config.rename)
    if task != "generate":
        found = names_of(some.rows, config.format, config.rename, skip_bad=True, task=task)
    reading = Reading(config.format, config.rename, True, config.loss_on, seq_len, found)
    return some, encode_rows(some.rows, tokenizer, reading)


def _passes(encoded: Sequence[Encoded], batch_size: int, side_by_side: bool) -> dict[int, list[list[Pass]]]:
    """By the most tokens of a pass: those of some whole steps, in orders that a run could have.

    side_by_side: whether rows are padded, as an encoder's are.
    """
    from lorafit.data.batching import counted, counted_side_by_side, step_rows
    from lorafit.engine.packing import SIDE_BY_SIDE

    rows = len(encoded)
    steps = [
        step
        for epoch in range(STEPS)
        for number in range(-(-rows // batch_size))
        if len(step := step_rows(rows, batch_size, 0, epoch, number)) == min(rows, batch_size)
    ][:STEPS]
    sizes = {split.micro_tokens for split in splits(MICRO_TOKENS)}

    def passes(step: list[int], size: int) -> list[Pass]:
        one = counted_side_by_side(encoded, step, size, SIDE_BY_SIDE) if side_by_side else counted(encoded, step, size)
        return [Pass(*own) for own in one]

    return {size: [passes(step, size) for step in steps] for size in sizes}


def _as_json(
    config: PlanConfig, around: Around, method: MethodConfig, rows: Rows, threads: int, runs: list[Forecast]
) -> dict[str, Any]:
    spec, rates = around.spec, around.rates
    steps = None if rows.count is None else math.ceil(rows.count / config.batch_size) * config.epochs
    best = fastest(runs)
    told = {"rows": rows.count, "seq_len": rows.seq_len, "loss_share": rows.loss_share, "variant": method.variant}
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
        "trainable": [asdict(one) for one in trainable(spec, rows.labels or LABELS)],
        "flop_per_token": _flop_per_token(spec, method, rows),
        "machine": {
            "threads": threads,
            "memory_bytes": around.limit,
            "flop_per_s": dict(rates.flop_per_s),
            "mfu": {name: rates.mfu_of(name, spec.hidden) for name in ASSUMED_MFU},
            "assumed_mfu": ASSUMED_MFU,
        },
        "types": TYPES,
        "speeds": SPEEDS,
        "steps": steps,
        "method": name_of(method),
        "runs": [_run(one, config, steps) for one in runs],
        "methods": [_of_method(row, config, steps) for row in survey(around, method, rows.work_of)],
        "shapes": _shapes(around, method, rows, config, best or runs[0]),
        "gpu": _gpu(config, around, method, rows, steps) if config.gpu else None,
        "advice": _command(config, best) if best else None,
    }


def _flop_per_token(spec: ModelSpec, method: MethodConfig, rows: Rows) -> dict[str, float]:
    """Of the method that was asked for, beside LoRA and full fine-tuning."""

    def of(config: MethodConfig) -> Flop:
        return step_flop(spec, config, rows.work_of(config), MICRO_TOKENS, rows.labels)

    own, tokens = of(method), rows.work_of(method).tokens
    return {
        "forward": own.forward / tokens,
        "method": own.total / tokens,
        "lora": of(MethodConfig(r=method.r)).total / tokens,
        "full": of(MethodConfig(method="full")).total / tokens,
        "attention_share": own.attention / own.total,
    }


def _of_method(row: Row, config: PlanConfig, steps: int | None) -> dict[str, Any]:
    return {
        "name": row.name,
        "impossible": row.impossible,
        "runs": [_run(one, config, steps) for one in row.runs],
    }


def _shapes(around: Around, method: MethodConfig, rows: Rows, config: PlanConfig, best: Forecast) -> dict[str, Any]:
    """Peaks of the method over rows of a step and tokens of a row. All rows are of one length there."""
    asked = Shape(config.batch_size, rows.seq_len, rows.loss_share, sees_all=not around.spec.writes_text)
    batches, lengths, found = over_shapes(around, method, (best.precision, best.storage), asked)
    return {
        "precision": best.precision,
        "base_storage": best.storage,
        "batch_sizes": batches,
        "seq_lens": lengths,
        "runs": [[_fit(one) for one in row] for row in found],
    }


def _fit(one: Forecast) -> dict[str, Any]:
    """What it takes of memory, and how it comes to that."""
    return {
        "peak_bytes": one.memory.peak_bytes,
        "micro_tokens": one.split.micro_tokens,
        "recompute": one.split.recompute,
        "fits": one.fits,
    }


def _gpu(config: PlanConfig, around: Around, method: MethodConfig, rows: Rows, steps: int | None) -> dict[str, Any]:
    gpu = gpu_of(config.gpu or "")
    unpowered = config.model_copy(update={"watts": None, "price": None})  # those are this machine's
    found = on_gpu(around.spec, method, rows.work_of(method), gpu, rows.labels)
    runs = [_run(one, unpowered, steps) for one in found]
    return asdict(gpu) | {"assumed_mfu": gpus.ASSUMED_MFU, "runs": runs}


def _run(one: Forecast, config: PlanConfig, steps: int | None) -> dict[str, Any]:
    energy = one.energy_kwh(config.watts, steps, config.epochs) if config.watts and steps else None
    return {
        "precision": one.precision,
        "base_storage": one.storage,
        "memory": one.memory.parts,
        **_fit(one),
        "params": one.params,
        "flop": one.flop.total,
        "step_s": one.step_s,
        "speed_from": one.speed_from,
        "tokens_per_s": one.tokens_per_s,
        "train_s": one.train_s(steps, config.epochs) if steps else None,
        "energy_kwh": energy,
        "cost": energy * config.price if energy is not None and config.price else None,
    }


def _command(config: PlanConfig, best: Forecast) -> str:
    """What to type. Settings that are the default are left out."""
    usual = TrainConfig.model_fields["seq_len"].default
    seq_len = config.seq_len if config.seq_len and (config.data or config.seq_len > usual) else usual
    settings = config.model_dump(include=TYPED)
    given = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in (settings | {"seq_len": seq_len}).items()
        if value not in (None, TrainConfig.model_fields[name].default)
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
