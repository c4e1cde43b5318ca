"""A comparison for people: a table in the terminal, and one page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lorafit.chart import SMOOTHED_STEPS, Curve, Point, curves, scatter, smoothed
from lorafit.compare.conclude import UNITS, figure, front
from lorafit.page import inside, render
from lorafit.rundir import RunDir
from lorafit.tables import Table, print_table
from lorafit.units import MIB, format_bytes, format_count, format_flop, format_seconds

PAGE = Path(__file__).parent / "page.html.jinja"
Found = dict[str, Any]
# What is timed in use: of a model that writes text, and of one that tells labels.
LATENCIES = {"first_token": "first token", "per_token": "each further", "row": "one row"}
# A cost on an axis: its name, what its unit is, how a value is written.
AXES: dict[str, tuple[str, float, Callable[[float], str]]] = {
    "trainable_params": ("trainable parameters", 1.0, lambda value: _short(value)),
    "peak_rss_bytes": ("peak memory of training", float(MIB), lambda value: f"{value:,.0f} MiB"),
    "train_s": ("time to train", 1.0, lambda value: f"{value:g} s"),
}


# --- tables -----------------------------------------------------------------------------------------------------------


def blocks(found: Found) -> list[Table]:
    """All that is told as a table: of methods, the best first, then of the floors."""
    made = [
        Table("Quality on the test rows", ("method", "accuracy", "loss", ""), _quality(found)),
        Table("Against the best", ("method", "accuracy", "loss"), _differences(found)),
        Table(
            "Training",
            ("method", "lr", "parameters", "file", "memory", "time", "operations"),
            [_training(method) for method in _measured(found)],
        ),
        Table("In use", ("method", "forgetting", *LATENCIES.values()), _in_use(found)),
    ]
    return [block for block in made if block.rows]


def _measured(found: Found) -> list[Found]:
    return [method for method in ordered(found) if method["quality"]]


def _quality(found: Found) -> list[tuple[str, ...]]:
    rows = [(one["name"], one["quality"], remark(one, found)) for one in ordered(found)]
    rows += [(floor_name(name, floor), floor["quality"], "floor") for name, floor in found["floors"].items()]
    none = {"accuracy": None, "loss": None}
    return [
        (name, *(figure((own or none)[key], key) for key in ("accuracy", "loss")), said) for name, own, said in rows
    ]


def _differences(found: Found) -> list[tuple[str, ...]]:
    compared = [method for method in ordered(found) if method["versus_best"]]
    return [
        (method["name"], *(figure(method["versus_best"].get(key), key, "+") for key in ("accuracy", "loss")))
        for method in compared
    ]


def _training(method: Found) -> tuple[str, ...]:
    return (
        method["name"],
        f"{method['lr']:g}",
        format_count(method["trainable_params"]),
        format_bytes(method["file_bytes"]),
        format_bytes(method["peak_rss_bytes"]),
        format_seconds(method["train_s"]) + _mark(method),
        "-" if method["flop"] is None else format_flop(method["flop"]),
    )


def _in_use(found: Found) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for method in _measured(found):
        at, lost = method["latency_s"], method["forgetting"]
        times = (_latency(at.get(key), at.get(f"base_{key}"), _mark(method)) for key in LATENCIES)
        rows.append((method["name"], "-" if lost is None else f"{lost:+.3f}", *times))
    for name, floor in found["floors"].items():
        own, base = floor["latency_s"], found["floors"].get("untuned", {}).get("latency_s", {})
        if own:
            times = (_latency(own.get(key), base.get(key), _mark(floor)) for key in LATENCIES)
            rows.append((floor_name(name, floor), "", *times))
    return rows


def ordered(found: Found) -> list[Found]:
    """Methods by quality, the best first; those that were not measured last."""

    def key(method: Found) -> tuple[float, float]:
        quality = method["quality"]
        if quality is None or quality["loss"]["value"] is None:
            return math.inf, math.inf
        loss = quality["loss"]["value"]
        return (-quality["value"] if found["metric"] == "accuracy" else loss), loss

    return sorted(found["methods"], key=key)


def floor_name(name: str, floor: Found) -> str:
    """`base, 4 shots`."""
    names = {"untuned": "base", "most_frequent": "most frequent", "mean": "the mean"}
    return names.get(name) or f"base, {floor['shots']} shots"


def remark(method: Found, found: Found) -> str:
    """What became of a method, in a few words."""
    parts = []
    if method["name"] == found["recommended"]:
        parts.append("recommended")
    if method["status"] != "finished":
        parts.append(method["status"])
    elif method["name"] == found["best"]:
        parts.append("best")
    elif method["tied_with_best"]:
        parts.append("tied")
    elif method["quality"]:
        parts.append("worse")
    if method["quality"] and len(method["seeds"]) < found["seeds"]:
        parts.append(f"{len(method['seeds'])} of {found['seeds']} seeds")
    return ", ".join(parts)


def _mark(method: Found) -> str:
    """On times of trials that ran beside others; a note says what it means."""
    return "*" if method.get("times_shared") else ""


def _latency(own_s: float | None, base_s: float | None, mark: str) -> str:
    if own_s is None:
        return "-"
    if base_s is None:
        return f"{1000 * own_s:.1f} ms{mark}"
    return f"{1000 * own_s:.1f} ms ({own_s / base_s:.2f}x){mark}"


def _short(value: float) -> str:
    """`4.9M`."""
    for name, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.0f}"


def explained(found: Found) -> list[str]:
    """How the figures are to be read."""
    rows, steps = found["rows"], found["steps"]
    untuned = found["floors"].get("untuned")
    kept = f" ({untuned['keep_loss']:.3f} before)" if untuned else ""
    if found["unit"] != UNITS["generate"]:
        timed = "a row of middling length through model and head, and how much of the base's own pass that is"
    else:
        timed = "one prompt, with the adapter as it was trained, and how much of the base's that is"
    more = "".join(
        f"; {name}, which is cheap, made {times} times as many" for name, times in found["more_steps"].items()
    )
    return [
        f"Every method learned the same {rows['train']} rows in the same order, {steps} steps, up to {found['seeds']} "
        f"seeds{more}; rates were chosen by {rows['search']} validation rows after {found['search_steps']} steps; the "
        f"{rows['test']} test rows chose nothing. {found['metric_reason'][0].upper()}{found['metric_reason'][1:]}.",
        f"Intervals hold the figure with {found['level']:.0%}: a paired bootstrap over the test rows, and Student's t "
        "for the spread between seeds. A difference whose interval holds 0 is none that can be seen here.",
        f"Forgetting: what the loss on the text to be kept has risen by, in nats a token{kept}. Latency: {timed}; "
        "merged LoRA costs nothing.",
    ]


def print_comparison(found: Found, console: Console) -> None:
    """The tables and the recommendation on a terminal."""
    for block in blocks(found):
        print_table(block, console)
    for method in found["methods"]:
        if method["dropped"]:
            line = f"{method['name']}: {method['status']}: {method['dropped']}"
            console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for note in found["notes"]:
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(found["reason"], style="bold", highlight=False, markup=False, soft_wrap=True)
    chosen = next((method for method in found["methods"] if method["name"] == found["recommended"]), None)
    if chosen:
        variant = f" --variant {chosen['variant']}" if ":" in chosen["name"] else ""
        console.print(
            f"Next:\n  lorafit train {found['model']} {found['data']} --method {chosen['method']}{variant} "
            f"--lr {chosen['lr']:g} -o runs/{chosen['name'].replace(':', '-')}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


# --- the page ---------------------------------------------------------------------------------------------------------


def read_curves(found: Found, directory: Path) -> list[Curve]:
    """Of each method the training loss of its first seed, smoothed; none for one without a finite loss."""
    lines = []
    for method in found["methods"]:
        if not method["runs"]:
            continue
        steps = RunDir(directory / method["runs"][0]).read_metrics()
        points = [(one["step"], one["loss"]) for one in steps if one["kind"] == "step" and one["loss"] is not None]
        if points:
            lines.append(Curve(method["name"], [step for step, _ in points], smoothed([loss for _, loss in points])))
    return lines


def pictures(found: Found, lines: Sequence[Curve]) -> list[str]:
    """Quality against each cost, and the loss curves: SVG to stand inside a page."""
    measured = [m for m in found["methods"] if m["quality"] and None not in m["quality"]["interval"]]
    drawn = [_scatter(found, measured, cost) for cost in AXES] if measured else []
    if lines:
        title = f"Training loss of the first seed, {found['unit']}, smoothed over about {SMOOTHED_STEPS} steps"
        drawn.append(curves(title, lines, "step"))
    return [inside(one) for one in drawn]


def _scatter(found: Found, measured: list[Found], cost: str) -> str:
    name, unit, text = AXES[cost]
    in_front = {method["name"] for method in front(measured, cost)}
    size = 100 if found["metric"] == "accuracy" else 1
    points = [
        Point(
            name=method["name"],
            x=max(method[cost] / unit, 1e-9),
            y=size * method["quality"]["value"],
            low=size * method["quality"]["interval"][0],
            high=size * method["quality"]["interval"][1],
            in_front=method["name"] in in_front,
        )
        for method in measured
    ]
    what = "Right answers, %" if found["metric"] == "accuracy" else f"Loss, {found['unit']}"
    title = f"{what}, against {name}: {'more' if found['metric'] == 'accuracy' else 'less'} is better"
    return scatter(title, points, name, text, _level(found, points, size))


def _level(found: Found, points: Sequence[Point], size: float) -> tuple[float, str] | None:
    """The better floor, unless it is so far from all methods that they could not be told apart beside it."""
    floors = [(floor["quality"]["value"], floor_name(name, floor)) for name, floor in found["floors"].items()]
    known = [(size * value, name) for value, name in floors if value is not None]
    if not known:
        return None
    best = max(known) if found["metric"] == "accuracy" else min(known)
    low, high = min(point.low for point in points), max(point.high for point in points)
    return best if low - (high - low) <= best[0] <= high + (high - low) else None


def page(found: Found, lines: Sequence[Curve]) -> str:
    """The comparison as one HTML page that needs nothing else."""
    out = [
        f"{method['name']}: {method['status']}: {method['dropped']}" for method in found["methods"] if method["dropped"]
    ]
    return render(
        PAGE,
        found=found,
        blocks=blocks(found),
        pictures=pictures(found, lines),
        notes=[*out, *found["notes"]],
        explained=explained(found),
        rates=[(method["name"], method["rates"], method["lr"]) for method in found["methods"] if method["rates"]],
        spent=format_seconds(found["spent_s"]),
        budget=None if found["budget_s"] is None else format_seconds(found["budget_s"]),
    )
