"""What a run directory holds, gathered for a report: the object of `--json`, from which table and page are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafit.report.updates import trained
from lorafit.rundir import RunDir

Found = dict[str, Any]
# Settings whose value was chosen by measuring.
CHOSEN = ("precision", "threads", "micro_tokens", "lr")
# What the page shows in other places, or is longer than a line.
NOT_SHOWN = frozenset({"sources", "rows", "predicted_parts", "left_out", "label_counts", "not_exported"})


def gather(run: RunDir, samples: Found | None, notes: Sequence[str]) -> Found:
    """Everything about a finished run. samples: answers of base and tuned model, None where nobody asked for them.

    notes: what could not be had, and why. Raises RunDirError for what is no finished run, AdapterError for a damaged
    adapter.
    """
    settings, result = run.read_config(), run.read_result()
    lines = run.read_metrics()
    found: Found = {
        "kind": "run",
        "run": str(run.path),
        "result": {name: value for name, value in result.items() if name not in NOT_SHOWN},
        "curves": _curves(lines),
        "trained": trained(run.adapter),
        "predicted": _predicted(result),
        "settings": _settings(settings, result),
        "rows": result.get("rows"),
        "label_counts": result.get("label_counts"),
        "left_out": result.get("left_out", []),
        "samples": samples,
    }
    missing = [] if lines else [f"{run.metrics.name} is missing or empty, so that there are no curves"]
    told = [f"step {line['step']}: {line['message']}" for line in lines if line.get("kind") == "note"]
    return found | {"notes": [*notes, *missing, *told]}


def _curves(lines: Sequence[Found]) -> dict[str, list[list[float]]]:
    """Pairs of a step and a value. A step whose loss is not finite has none."""
    steps = [line for line in lines if line.get("kind") == "step"]
    held_out = [line for line in lines if line.get("kind") == "eval"]
    speeds = [[line["step"], line["tokens"] / line["step_s"]] for line in steps if line.get("step_s")]
    return {
        "train_loss": _pairs(steps, "loss"),
        "eval_loss": _pairs(held_out, "loss"),
        "lr": _pairs(steps, "lr"),
        "tokens_per_s": speeds,
    }


def _pairs(lines: Sequence[Found], name: str) -> list[list[float]]:
    return [[line["step"], line[name]] for line in lines if line.get(name) is not None]


def _predicted(result: Found) -> Found:
    """Predicted beside measured; a part that was not predicted, or not noted by an older run, is None."""
    return {
        "peak_bytes": {"predicted": result["predicted_peak_bytes"], "measured": result["peak_rss_bytes"]},
        "train_s": {"predicted": result.get("predicted_train_s"), "measured": result["train_s"]},
        "parts": result.get("predicted_parts"),
    }


def _settings(settings: Found, result: Found) -> list[Found]:
    """Every setting that has a value, what was given first. source: flag, file or default; None where unknown."""
    sources, used = result.get("sources", {}), result.get("settings", {}) | result
    rows = []
    for name, value in settings.items():
        chosen = used.get(name) if name in CHOSEN else None
        found = {"name": name, "value": value, "source": sources.get(name)}
        rows.append(found | ({"chosen": chosen} if chosen not in (None, value) else {}))
    return sorted(rows, key=lambda row: row["source"] in (None, "default"))
