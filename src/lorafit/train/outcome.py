"""What a run leaves in run.json when it ends, and what later plans learn of it."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from lorafit import rates
from lorafit.config import TrainConfig
from lorafit.data.mask import EncodedSet
from lorafit.engine import precision
from lorafit.engine.engine import Engine
from lorafit.methods.method import Attached
from lorafit.model.spec import ModelSpec
from lorafit.plan import machine, memory
from lorafit.train.checkpoint import Progress

VERSIONED = ("lorafit", "torch", "transformers", "safetensors", "numpy")
STEPS_THAT_TELL = 10
ROWS_FACTS = ("rows", "pieces", "tokens", "supervised_tokens", "longest", "cut_rows", "cut_tokens")


def result(
    config: TrainConfig,
    attached: Attached,
    progress: Progress,
    identity: dict[str, Any],
    estimate: memory.MemoryEstimate,
    flop: float | None,
) -> dict[str, Any]:
    """What is known of every run when it ends; a rank only of LoRA. flop: see `flop_of`."""
    has_rank = config.method == "lora"
    return {
        "model": lasting(config.model),
        "data": lasting(config.data),
        "method": config.method,
        "variant": config.variant,
        "r": config.r if has_rank else None,
        "alpha": config.alpha if has_rank else None,
        "train_s": progress.train_s,
        "eval_s": progress.eval_s,
        "steps": progress.step,
        "skipped_steps": progress.skipped_steps,
        "stopped_early": progress.stopped_early,
        "tokens_seen": progress.tokens_seen,
        "tokens_supervised": progress.tokens_supervised,
        "tokens_computed": progress.tokens_computed,
        "flop": flop,
        "mfu": _mfu(flop, progress.train_s, identity["chosen"]["precision"]),
        "peak_rss_bytes": machine.peak_rss_bytes(),
        "predicted_peak_bytes": estimate.peak_bytes,
        "predicted_parts": estimate.parts,
        "trainable_params": attached.trainable_params,
        "total_params": attached.total_params,
        "train_loss": progress.last_loss,
        "eval_loss": progress.best_loss,
        "best_step": progress.best_step,
        "seed": config.seed,
        "precision": identity["chosen"]["precision"],
        "base_storage": config.base_storage,
        "micro_tokens": identity["chosen"]["micro_tokens"],
        "recompute": identity["chosen"]["recompute"],
        "threads": identity["chosen"]["threads"],
        "versions": identity["versions"],
        "data_sha256": identity["sha256"]["data"],
        "model_sha256": identity["sha256"]["model"],
    }


def rows_facts(format: str, trained: EncodedSet, held_out: EncodedSet | None) -> dict[str, Any]:
    """Of the rows that were trained on, and of those that were held out."""

    def of(rows: EncodedSet) -> dict[str, int]:
        return {name: getattr(rows, name) for name in ROWS_FACTS}

    return {"format": format, "trained": of(trained), "held_out": of(held_out) if held_out else None}


def engine_facts(engine: Engine) -> dict[str, Any]:
    """What preparing took of train_s (with compiling, probing and calibrating), and what could not be made faster."""
    return {
        "prepare_s": engine.prepare_s,
        "padded": engine.packing.padded,
        "int8_left_out": [error.label for error in engine.int8_errors if error.too_large],
    }


def flop_of(config: TrainConfig, progress: Progress, predicted: float | None, steps: int, padded: bool) -> float | None:
    """Of the steps that were made: as the engine counted them, or by formula where it does not compute all of them.

    predicted: of all `steps` of the run. padded: whether rows stand side by side, so that attention is torch's. None
    where neither is known.
    """
    if not padded and rates.kind_of(config.method, config.variant, config.layers) == "":
        return progress.flop
    return None if predicted is None else predicted * progress.step / steps


def _mfu(flop: float | None, train_s: float, precision_name: str) -> float | None:
    """Model FLOPs utilization: the share of the machine's measured matrix rate that training reached."""
    rate = precision.flop_per_s((precision_name,))[precision_name]
    return flop / train_s / rate if train_s and flop else None


def remember_speed(result: dict[str, Any], spec: ModelSpec, config: TrainConfig) -> None:
    """For plans to come: how many operations a second this run reached, by its method.

    Of a few steps, or of LoRA in a part of the layers, it would say little.
    """
    is_whole = (config.layers is None or config.method == "full") and config.targets == "all-linear"
    is_whole = is_whole and config.rank_schedule != "adalora"
    if is_whole and result["flop"] and result["steps"] >= STEPS_THAT_TELL and result["train_s"] and spec.hidden:
        kind = rates.kind_of(config.method, config.variant, config.layers)
        key = rates.run_key(rates.way(result["precision"], config.base_storage, kind), spec.hidden)
        updates_s = rates.read(result["threads"]).number_s * result["trainable_params"] * result["steps"]
        passes_s = max(result["train_s"] - updates_s, result["train_s"] / 2)
        rates.add_run(result["threads"], key, result["flop"] / passes_s)


def lasting(name: str) -> str:
    """A name that still holds in another working directory: a path becomes absolute."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONED}
