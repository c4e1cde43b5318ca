"""What a run says about itself on the screen, before the first step and after the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from lorafit.config import TrainConfig
from lorafit.methods.method import Attached
from lorafit.plan import machine
from lorafit.units import format_bytes, format_count, format_seconds, format_share


def print_config(config: TrainConfig, source: dict[str, str], chosen: dict[str, Any], console: Console) -> None:
    """What was given, a line each with where it came from; the defaults in one paragraph."""
    shown = {name: repr(value) for name, value in config.model_dump().items()}
    if config.precision == "auto":
        shown["precision"] += f" (measured: {chosen['precision']})"
    if config.threads is None:
        shown["threads"] += f" ({chosen['threads']})"
    given = {name: source[name] for name in shown if source.get(name, "default") != "default"}
    for name, where in given.items():
        console.print(f"  {name} = {shown[name]}  ({where})", markup=False, highlight=False)
    rest = ", ".join(f"{name} = {value}" for name, value in shown.items() if name not in given)
    console.print(f"  by default: {rest}", style="dim", markup=False, highlight=False)
    usual, cores = machine.usual_threads(), machine.physical_cores()
    if config.threads is None and chosen["threads"] == usual < cores:
        told = f"threads: {usual} of {cores} cores, as OMP_NUM_THREADS says; --threads {cores} takes all"
        console.print(told, style="yellow", highlight=False)


def print_attached(attached: Attached, console: Console) -> None:
    """What a method put into the model, with what a user should know of it."""
    share = format_share(attached.trainable_params, attached.total_params)
    console.print(
        f"{attached.summary}: {format_count(attached.trainable_params)} trainable parameters, {share} of "
        f"{format_count(attached.total_params)}",
        highlight=False,
    )
    for note in attached.notes:
        console.print(note, style="yellow", highlight=False)


def print_ranks(ranks: dict[str, int] | None, console: Console) -> None:
    """The ranks that a schedule has left, a line for each kind of layer, in the order of the blocks."""
    if not ranks:
        return
    kinds: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(rank)
    console.print(f"ranks, block by block, {format_count(sum(ranks.values()))} in all:", highlight=False)
    for kind, each in kinds.items():
        console.print(f"  {kind} {' '.join(map(str, each))}", highlight=False, markup=False)


def print_result(path: Path, result: dict[str, Any], console: Console) -> None:
    """How it went, predicted against measured, and what to type next. path: the run directory."""
    speed = result["tokens_seen"] / result["train_s"] if result["train_s"] else 0.0
    expected = result["predicted_train_s"]
    predicted = "" if expected is None else f", predicted {format_seconds(expected)}"
    evaluated = f"evaluations took {format_seconds(result['eval_s'])}, " if result["eval_s"] else ""
    console.print(
        f"trained {result['steps']} steps in {format_seconds(result['train_s'])} ({speed:,.0f} tokens/s{predicted}), "
        f"{evaluated}loading took {format_seconds(result['load_s'])}; "
        f"peak memory {format_bytes(result['peak_rss_bytes'])} "
        f"(predicted {format_bytes(result['predicted_peak_bytes'])})",
        highlight=False,
    )
    if result.get("eval_mse") is not None:
        shown = {name: result.get(f"eval_{name}") for name in ("mae", "mse", "r2", "spearman")}
        told = ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
        console.print(f"held-out rows: {told}", highlight=False)
    if result.get("eval_accuracy") is not None:
        console.print(
            f"held-out rows: accuracy {result['eval_accuracy']:.1%}, macro-F1 {result['eval_macro_f1']:.3f}",
            highlight=False,
        )
    print_ranks(result["ranks"], console)
    for line in _by_rank(result):
        console.print(line, highlight=False)
    console.print(f"wrote {path}. Next:")
    chat = [f"lorafit chat {path}"] if result["task"] == "generate" else []
    merge = [] if result["not_merged"] else [f"lorafit merge {path} -o DIR"]
    for command in (f"lorafit eval {path} TEST.jsonl", *chat, *merge):
        console.print(f"  {command}", highlight=False, markup=False)


def _by_rank(result: dict[str, Any]) -> list[str]:
    """The held-out loss of each rank that the run leaves an adapter of, as a small table."""
    found = result.get("by_rank") or []
    if not found:
        return []
    took = f"{len(found) - 1} ranks below took {format_seconds(result['halving_s'])}"
    if all(one["loss"] is None and one["helped"] is None for one in found):
        return [f"{took}; no rows to measure them on: --eval names some"]
    width = len(str(found[-1]["r"]))
    shown = ["not finite" if one["loss"] is None else f"{one['loss']:.4f}" for one in found]
    return [f"{took}; held-out loss by rank:"] + [
        f"  r {one['r']:>{width}}  {loss}" for one, loss in zip(found, shown, strict=True)
    ]
