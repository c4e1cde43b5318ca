"""`lorafit plan` as one straight line: headers -> counts, sizes, memory, operations, time -> the command to type."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

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
from lorafit.plan.storage import sizes
from lorafit.rates import Rates
from lorafit.units import format_bytes, format_count, format_flop, format_seconds, format_share


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
        _print(found, config, rates, out)
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


# --- for people -----------------------------------------------------------------------------------------------------


def _print(found: dict[str, Any], config: PlanConfig, rates: Rates, out: Console) -> None:
    stored = ", ".join(found["stored_as"]) or "nothing but a config"
    out.print(
        f"[bold]{found['model']}[/bold]: {found['architecture']}, {format_count(found['parameters'])} parameters, "
        f"stored as {stored} ({format_bytes(found['weight_bytes'])})",
        highlight=False,
        soft_wrap=True,
    )
    _print_parts(found, out)
    _print_sizes(found, out)
    _print_trainable(found, out)
    _print_flop(found, config, rates, out)
    _print_runs(found, config, out)
    if found["advice"]:
        out.print(f"\nThe fastest that fits:\n  {found['advice']}", highlight=False, markup=False)
    else:
        out.print("\nNone of these fits. Lower --seq-len or --batch-size, or give more --memory.", style="yellow")


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _head(text: str, out: Console) -> None:
    out.print(f"\n{text}", highlight=False, soft_wrap=True, style="bold")


def _print_parts(found: dict[str, Any], out: Console) -> None:
    _head("Parameters", out)
    table = _table("part", "count", "share")
    for part, count in found["parts"].items():
        if count:
            name = f"{part} (and the output head)" if part == "embeddings" and found["tied"] else part
            table.add_row(name, format_count(count), format_share(count, found["parameters"]))
    out.print(table)


def _print_sizes(found: dict[str, Any], out: Console) -> None:
    _head("Size of the model in each type", out)
    table = _table("type", "size", "bits a parameter")
    for size in found["sizes"]:
        table.add_row(size["name"], format_bytes(size["nbytes"]), f"{size['bits']:.2f}")
    out.print(table)


def _print_trainable(found: dict[str, Any], out: Console) -> None:
    _head("What would be trained", out)
    table = _table("method", "parameters", "share", "adapter file")
    table.add_column("")
    for one in found["trainable"]:
        if one["impossible"]:
            table.add_row(one["method"], "-", "-", "-", one["impossible"], style="dim")
            continue
        file = "a whole model" if one["file_bytes"] is None else format_bytes(one["file_bytes"])
        share = format_share(one["params"], found["parameters"])
        table.add_row(one["method"], format_count(one["params"]), share, file, "")
    out.print(table)


def _print_flop(found: dict[str, Any], config: PlanConfig, rates: Rates, out: Console) -> None:
    flop = found["flop_per_token"]
    out.print(
        f"\nOperations a token, in rows of {format_count(config.seq_len)}: forward {format_flop(flop['forward'])}, "
        f"LoRA of rank {config.r} {format_flop(flop['lora'])} (full fine-tuning {format_flop(flop['full'])}); "
        f"attention is {flop['attention_share']:.1%} of it",
        highlight=False,
    )
    if not rates.flop_per_s:
        out.print("This machine was not measured yet: add --calibrate, or train once", style="yellow", highlight=False)
        return
    _head(f"This machine, {found['machine']['threads']} threads", out)
    table = _table("type", "measured", "of it reached in training")
    for name, rate in rates.flop_per_s.items():
        known = found["machine"]["mfu"][name]
        reached = f"{ASSUMED_MFU[name]:.0%} assumed" if known is None else f"{known:.0%}"
        table.add_row(name, f"{format_flop(rate)}/s", reached)
    out.print(table)


def _print_runs(found: dict[str, Any], config: PlanConfig, out: Console) -> None:
    shape = f"{config.batch_size} rows of {format_count(config.seq_len)} tokens a step, rank {config.r}"
    columns = ["precision", "peak memory", "a step", "tokens/s"]
    columns += ["the whole run"] if found["steps"] else []
    columns += ["kWh"] if config.watts else []
    columns += ["cost"] if config.price else []
    _head(f"Training with {shape}, in {format_bytes(found['machine']['memory_bytes'])}", out)
    table = _table(*columns, "")
    for run in found["runs"]:
        cells = [_way(run), format_bytes(run["peak_bytes"]), _seconds(run["step_s"])]
        cells.append("-" if run["tokens_per_s"] is None else format_count(round(run["tokens_per_s"])))
        cells += [_seconds(run["train_s"])] if found["steps"] else []
        cells += ["-" if run["energy_kwh"] is None else f"{run['energy_kwh']:.3f}"] if config.watts else []
        cells += ["-" if run["cost"] is None else f"{run['cost']:.3f}"] if config.price else []
        table.add_row(*cells, _how(run))
    out.print(table)
    for name, types in found["types"].items():
        out.print(f"  {name}: {types}", style="dim", highlight=False, soft_wrap=True)
    out.print("  Memory, part by part:", style="dim", highlight=False)
    for run in found["runs"]:
        parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in run["memory"].items())
        out.print(f"  {_way(run)}: {parts}", style="dim", highlight=False, soft_wrap=True)


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)


def _way(run: dict[str, Any]) -> str:
    return machine_rates.way(run["precision"], run["base_storage"])


def _how(run: dict[str, Any]) -> str:
    if not run["fits"]:
        return "does not fit"
    return "with layers recomputed" if run["recompute"] else ""
