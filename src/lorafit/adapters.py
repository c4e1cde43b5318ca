"""Commands over finished adapters: `combine`, `shrink` and `scale`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lorafit import files
from lorafit.chart import Mark, Panel, chart
from lorafit.config import ROUNDED, CombineConfig, EvalConfig, ScaleConfig, ShrinkConfig
from lorafit.errors import ConfigError
from lorafit.export import arithmetic
from lorafit.export.merge import check_output
from lorafit.plan import machine
from lorafit.rundir import RunDir, run_of_rank
from lorafit.units import format_count


def combine(config: CombineConfig, console: Console) -> dict[str, Any]:
    """Write a sum of adapters. Returns the JSON object. Raises LorafitError for whatever the user can mend."""
    directories = [_adapter(name) for name in config.adapters]
    weights = config.weights or [1 / len(directories)] * len(directories)
    check_output(Path(config.output))
    found = arithmetic.combine(
        directories, weights, config.how, config.density, config.r, config.seed, Path(config.output)
    )
    ranks = ", ".join(map(str, found["ranks"]))
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in zip(config.adapters, weights, strict=True))
    console.print(f"{config.how}: {terms}", highlight=False, markup=False)
    console.print(
        f"wrote {config.output}: rank {ranks} on {format_count(found['modules'])} layers, "
        f"{format_count(found['in_all'])} of which every adapter changes",
        highlight=False,
        markup=False,
    )
    _say_next(config.output, console)
    return found | {"adapters": config.adapters, "weights": list(weights)}


def shrink(config: ShrinkConfig, console: Console) -> dict[str, Any]:
    """Write an adapter of a lower rank. Returns the JSON object. Raises LorafitError for whatever the user can mend."""
    directory, by_rank = _adapter(config.run), RunDir(config.run).by_rank()
    source = RunDir(config.run).adapter_of(_least_above(by_rank, config.r)) or directory
    check_output(Path(config.output))
    found = arithmetic.shrink(source, config.r, directory, Path(config.output)) | {"source": str(source)}
    console.print(f"wrote {config.output}: {_told_shrunk(found)}", highlight=False, markup=False)
    for line in _told_by_rank(by_rank, config.r):
        console.print(line, highlight=False)
    system, storage = _of_run(config.run)
    if config.data:
        losses = [_loss(config, str(path), storage, console) for path in (directory, Path(config.output))]
        found |= {"loss_before": losses[0], "loss_after": losses[1]}
        console.print(f"loss on {config.data}: {losses[0]:.4f} before, {losses[1]:.4f} after", highlight=False)
    _say_next(config.output, console, system, storage)
    return found


def _of_run(name: str) -> tuple[str | None, str]:
    """What a run knows and a directory of an adapter alone does not: its rows' system message, how its base was stored.

    The latter is `auto` where that changes no number.
    """
    run = RunDir(name) if RunDir(name).exists else run_of_rank(Path(name))
    result = run.read_result() if run else {}
    storage = result.get("base_storage", "auto")
    return result.get("system"), storage if storage in ROUNDED else "auto"


def _least_above(by_rank: list[dict[str, Any]], r: int) -> int:
    """The smallest rank of which the run leaves an adapter that is not below r; 0 where it leaves none."""
    return min((one["r"] for one in by_rank if one["r"] >= r), default=0)


def _told_shrunk(found: dict[str, Any]) -> str:
    ranks = ", ".join(map(str, found["ranks_before"]))
    if max(found["ranks_before"]) <= found["r"]:
        return f"rank {ranks}, as it is in {found['source']}"
    return f"rank {ranks} truncated to {found['r']} by SVD, which loses {found['lost']:.1%} of the update's norm"


def _told_by_rank(by_rank: list[dict[str, Any]], r: int) -> list[str]:
    """What the run found out about this rank when it ended."""
    at = {one["r"]: one["loss"] for one in by_rank}
    if not at or r >= max(at):
        return []
    if r not in at:
        return [f"rank {r} is none of those that the run trained ({', '.join(map(str, at))})"]
    if all(loss is None for loss in at.values()):
        return ["the run had no held-out rows to measure its ranks on; --data measures this one"]
    told = [f"{'not finite' if at[one] is None else f'{at[one]:.4f}'} at rank {one}" for one in (r, max(at))]
    return [f"held-out loss in that run: {', '.join(told)}"]


def scale(config: ScaleConfig, log: Console, out: Console | None) -> dict[str, Any]:
    """Losses over the scale, from one load. Returns the JSON object. Raises LorafitError for what the user can mend."""
    named = {"task": config.task} | ({"keep": config.keep} if config.keep else {})
    losses = _losses(config, named, log)
    points = [
        {"scale": at, **{name: losses[name][number] for name in named}} for number, at in enumerate(config.scales)
    ]
    best = min(points, key=lambda point: point["task"] + config.forgetting * point.get("keep", 0.0))
    found = {"run": config.run, **named, "forgetting": config.forgetting, "points": points, "best": best["scale"]}
    directory = Path(config.output)
    files.write_json(directory / "scale.json", found)
    files.write_atomic(directory / "scale.svg", scales_picture(found))
    if out is not None:
        print_scales(found, out)
    log.print(f"wrote {directory / 'scale.json'} and {directory / 'scale.svg'}", highlight=False, markup=False)
    return found


def _losses(config: ScaleConfig, sources: Mapping[str, str], console: Console) -> dict[str, list[float]]:
    """Of each source the mean loss a token at each scale, from one load. Raises LorafitError."""
    # Only here: the other commands need no model.
    import torch

    from lorafit.data.formats import read_examples
    from lorafit.data.load import locate
    from lorafit.data.mask import encode_all
    from lorafit.engine.engine import prepare
    from lorafit.infer.evaluate import mean_loss
    from lorafit.methods import table
    from lorafit.opening import open_target

    torch.set_num_threads(config.threads or machine.usual_threads())
    opened = open_target(config.run, None, 1.0, config.precision, config.trust_remote_code, console)
    if not opened.has_adapter:
        raise ConfigError(f"{config.run} is a model without an adapter", "Give a run directory")
    sets = {}
    for name, source in sources.items():
        rows = islice(locate(source).unseen().rows(), config.rows)
        sets[name] = encode_all(read_examples(rows), opened.tokenizer, config.seq_len)
        console.print(f"{name}: {sets[name].summary}", highlight=False)
    engine = prepare(opened.model, share_prefix=True)
    losses: dict[str, list[float]] = {name: [] for name in sets}
    total = sum(one.pieces for one in sets.values()) * len(config.scales)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as bar, torch.no_grad():
        task = bar.add_task("losses", total=total)
        for at in config.scales:
            table.of(opened.model).set_scale(opened.model, at)
            for name, one in sets.items():
                done = partial(bar.advance, task)
                losses[name].append(mean_loss(engine, one.encoded, config.seq_len, done))
    return losses


def _of_base(scales: Sequence[float], losses: Sequence[float]) -> tuple[float, str] | None:
    return next(((loss, "base") for at, loss in zip(scales, losses, strict=True) if at == 0), None)


def scales_picture(found: dict[str, Any]) -> str:
    """The losses over the scale, as SVG. found: the content of scale.json."""
    titles = {"task": f"loss on {found['task']}", "keep": f"loss on {found.get('keep')}, which is to be kept"}
    at = [point["scale"] for point in found["points"]]
    panels = []
    for name in scaled_names(found):
        losses = [point[name] for point in found["points"]]
        panels.append(Panel(f"{titles[name]}, nats a token", at, losses, _of_base(at, losses)))
    told = "best trade" if "keep" in found else "least loss"
    return chart(panels, "scale of the update", Mark(found["best"], f"{told}: {found['best']:g}"))


def scaled_names(found: dict[str, Any]) -> list[str]:
    """What losses there are: the task's, and that of what is to be kept."""
    return [name for name in ("task", "keep") if name in found]


def print_scales(found: dict[str, Any], out: Console) -> None:
    """The losses as a table, and what to type next. found: the content of scale.json."""
    names = scaled_names(found)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("scale", *names, ""):
        table.add_column(column, justify="right")
    for point in found["points"]:
        remark = "the best" if point["scale"] == found["best"] else ""
        table.add_row(f"{point['scale']:g}", *(f"{point[name]:.4f}" for name in names), remark)
    out.print(table)
    out.print(f"Next:\n  lorafit chat {found['run']} --scale {found['best']:g}", highlight=False, markup=False)


def _adapter(name: str) -> Path:
    """The adapter of a run, or the directory itself. Raises ConfigError for one that is no update of LoRA alone."""
    from lorafit.export import saved  # needs torch

    run = RunDir(name)
    directory = run.adapter if run.exists else Path(name)
    labels = saved.labels_of(directory)
    if labels is not None:
        raise ConfigError(
            f"{name} {labels.told}, and a head of its own cannot be added up or brought to another rank",
            "Give runs of --method lora that write text",
        )
    if (method := saved.method_of(directory)) != "lora":
        raise ConfigError(
            f"{name} was trained by --method {method}, and only updates by LoRA can be added up or brought to another "
            "rank",
            "Give runs of --method lora",
        )
    return directory


def _loss(config: ShrinkConfig, target: str, storage: str, console: Console) -> float:
    from lorafit.use import evaluate  # needs transformers

    settings = {"target": target, "data": config.data, "rows": config.rows, "generate": False, "samples": 0}
    settings |= {"precision": "fp32", "base_storage": storage}  # so that what differs is the adapter
    loss = evaluate(EvalConfig.model_validate(settings), console)["loss"]
    return float(loss) if loss is not None else math.inf


def _say_next(output: str, console: Console, system: str | None = None, storage: str = "auto") -> None:
    """What to type next; with what belongs to the run and is no part of an adapter."""
    rounded = "" if storage == "auto" else f" --base-storage {storage}"
    spoken = "" if system is None else f" --system {shlex.quote(system)}"
    if rounded:
        what = f"the run's base was rounded to {storage}: eval does that by --base-storage, chat takes it as it is"
        console.print(what, style="yellow", highlight=False)
    commands = f"lorafit eval {output} TEST.jsonl{rounded}\n  lorafit chat {output}{spoken}"
    console.print(f"Next:\n  {commands}", highlight=False, markup=False, soft_wrap=True)
