"""`lorafit plan` as one straight line: headers -> counts, sizes, memory, operations, time -> the command to type."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from lorafit import files
from lorafit import rates as machine_rates
from lorafit.config import PlanConfig, TrainConfig, parse_bytes
from lorafit.errors import ConfigError
from lorafit.model import spec as model_spec
from lorafit.model.spec import ModelSpec
from lorafit.plan import machine
from lorafit.plan.counts import by_part, trainable
from lorafit.plan.forecast import (
    ASSUMED_MFU,
    PRECISIONS,
    TYPES,
    Forecast,
    Shape,
    fastest,
    forecast,
    full_flop,
    step_flop,
    ways,
)
from lorafit.plan.show import page, print_plan
from lorafit.plan.storage import sizes
from lorafit.rates import Rates

# What of the settings is told beside the figures.
SHOWN = {"r", "batch_size", "seq_len", "loss_share", "rows", "epochs", "watts", "price"}


def plan(config: PlanConfig, log: Console, out: Console | None) -> dict[str, Any]:
    """Predict what training a model takes. out: where it is printed, None for nowhere. Returns it as JSON.

    Nothing is loaded but headers. Raises ModelError for a model that cannot be described, ConfigError.
    """
    _check(config)
    spec = model_spec.describe(config.model)
    threads = config.threads or machine.physical_cores()
    if config.calibrate:
        from lorafit.train.calibrate import calibrate  # needs torch

        calibrate(threads, log)
    rates = machine_rates.read(threads)
    limit = parse_bytes(config.memory, "--memory") if config.memory else machine.available_bytes()
    shape = Shape(config.batch_size, config.seq_len, config.loss_share)
    runs = [forecast(spec, config.r, shape, name, limit, rates, storage) for name, storage in ways(spec)]
    found = _as_json(config, spec, shape, rates, threads, limit, runs)
    if out is not None:
        print_plan(found, out)
    if config.html:
        files.write_atomic(Path(config.html), page(found))
        log.print(f"wrote {config.html}", highlight=False)
    return found


def _check(config: PlanConfig) -> None:
    """Raises ConfigError for what would be left out of the answer without a word."""
    if config.watts and not config.rows:
        raise ConfigError("--watts is given without --rows", "Energy is that of a whole run: say how many rows it has")
    if config.price and not config.watts:
        raise ConfigError("--price is given without --watts", "Cost follows from energy: say what the machine draws")


def _as_json(
    config: PlanConfig, spec: ModelSpec, shape: Shape, rates: Rates, threads: int, limit: int, runs: list[Forecast]
) -> dict[str, Any]:
    steps = _steps(config)
    lora, full = step_flop(spec, config.r, shape), full_flop(spec, shape)
    best = fastest(runs)
    return {
        "model": config.model,
        "settings": config.model_dump(include=SHOWN),
        "architecture": spec.architecture,
        "parameters": spec.parameters,
        "parts": by_part(spec),
        "tied": spec.tied,
        "stored_as": dict(spec.storage),
        "weight_bytes": spec.weight_bytes,
        "sizes": [asdict(size) for size in sizes(spec)],
        "trainable": [asdict(one) for one in trainable(spec)],
        "flop_per_token": {
            "forward": lora.forward / shape.tokens,
            "lora": lora.total / shape.tokens,
            "full": full.total / shape.tokens,
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
        "advice": _command(config, best) if best else None,
    }


def _steps(config: PlanConfig) -> int | None:
    return None if config.rows is None else math.ceil(config.rows / config.batch_size) * config.epochs


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
    flags = {"--r": "r", "--batch-size": "batch_size", "--epochs": "epochs"}
    flags |= {"--seq-len": "seq_len"} if config.seq_len > TrainConfig.model_fields["seq_len"].default else {}
    given = [
        f"{flag} {value}"
        for flag, name in flags.items()
        if (value := getattr(config, name)) != TrainConfig.model_fields[name].default
    ]
    memory = [f"--memory {config.memory}"] if config.memory else []
    kept = [f"--base-storage {best.storage}"] if best.storage != "auto" else []
    parts = [
        "lorafit train",
        config.model,
        "DATA -o runs/first",
        f"--precision {best.precision}",
        *kept,
        *given,
        *memory,
    ]
    return " ".join(parts)
