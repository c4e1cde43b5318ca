"""A comparison for people: a table in the terminal, and one page that needs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorafit.chart import Curve, Point, curves, scatter
from lorafit.compare.conclude import FLOOR_NAMES, figure, front
from lorafit.rundir import RunDir
from lorafit.units import format_bytes, format_count, format_flop, format_seconds

PAGE = Path(__file__).parent / "page.html.jinja"
# A step's loss is that of its few rows: curves show the mean over about so many steps.
SMOOTHED_STEPS = 5
Found = dict[str, Any]
COST_NAMES: dict[str, tuple[str, Callable[[float], str]]] = {
    "trainable_params": ("trainable parameters", lambda value: _short(value)),
    "peak_rss_bytes": ("peak memory of training", format_bytes),
    "train_s": ("time to train", format_seconds),
}


# --- tables -----------------------------------------------------------------------------------------------------------


def quality_rows(found: Found) -> list[tuple[str, ...]]:
    """name, accuracy, loss, against the best, forgetting, remark: a row for each method, best first, then floors."""
    rows: list[tuple[str, ...]] = []
    for method in ordered(found):
        quality = method["quality"] or {"accuracy": None, "loss": None}
        forgotten = "-" if method["forgetting"] is None else f"{method['forgetting']:+.3f}"
        accuracy, loss = figure(quality["accuracy"], "accuracy"), figure(quality["loss"], "loss")
        rows.append((method["name"], accuracy, loss, _versus(method, found), forgotten, remark(method, found)))
    for name, floor in found["floors"].items():
        accuracy, loss = figure(floor["quality"]["accuracy"], "accuracy"), figure(floor["quality"]["loss"], "loss")
        rows.append((floor_name(name, floor), accuracy, loss, "", "", "floor"))
    return rows


QUALITY_COLUMNS = ("method", "accuracy", "loss, nats a token", "against the best", "forgetting", "")
COST_COLUMNS = ("method", "lr", "parameters", "file", "peak memory", "training", "FLOP", "first token", "each further")


def cost_rows(found: Found) -> list[tuple[str, ...]]:
    """name, rate and what it costs: of the methods that were measured, then of the floors."""
    rows = []
    for method in ordered(found):
        if method["quality"] is None:
            continue
        at = method["latency_s"]
        rows.append(
            (
                method["name"],
                f"{method['lr']:g}",
                format_count(method["trainable_params"]),
                format_bytes(method["file_bytes"]),
                format_bytes(method["peak_rss_bytes"]),
                format_seconds(method["train_s"]),
                format_flop(method["flop"]),
                *(_latency(at[name], at[f"base_{name}"]) for name in ("first_token", "per_token")),
            )
        )
    for name, floor in found["floors"].items():
        own, base = floor["latency_s"], found["floors"]["untuned"]["latency_s"]
        times = (_latency(own[key], base[key]) for key in ("first_token", "per_token"))
        rows.append((floor_name(name, floor), "", "0", "", "", "", "", *times))
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
    """`base, 4 examples`."""
    return "base" if name == "untuned" else f"base, {floor['shots']} examples"


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
        parts.append("tied with the best")
    elif method["quality"]:
        parts.append("worse")
    if method["quality"] and len(method["seeds"]) < found["seeds"]:
        parts.append(f"{len(method['seeds'])} of {found['seeds']} seeds")
    return ", ".join(parts)


def _versus(method: Found, found: Found) -> str:
    """What it differs by in what decides; in the loss where accuracy cannot tell."""
    versus = method["versus_best"]
    if versus is None:
        return ""
    accuracy = versus.get("accuracy")
    if accuracy is not None and (accuracy["interval"][0] > 0 or accuracy["interval"][1] < 0):
        low, high = accuracy["interval"]
        return f"accuracy {accuracy['value']:+.1%} ({low:+.1%} to {high:+.1%})"
    loss = versus["loss"]
    if loss["value"] is None or loss["interval"][0] is None:
        return "loss not finite"
    return f"loss {loss['value']:+.3g} ({loss['interval'][0]:+.3g} to {loss['interval'][1]:+.3g})"


def _latency(own_s: float, base_s: float) -> str:
    return f"{1000 * own_s:.1f} ms ({own_s / base_s:.2f}x)"


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
    return [
        f"Every method learned the same {rows['train']} rows in the same order, {steps} steps, up to {found['seeds']} "
        f"seeds; rates were chosen by {rows['search']} validation rows after {found['search_steps']} steps; the "
        f"{rows['test']} test rows chose nothing. {found['metric_reason'][0].upper()}{found['metric_reason'][1:]}.",
        f"Intervals hold the figure with {found['level']:.0%}: a paired bootstrap over the test rows, and Student's t "
        "for the spread between seeds. A difference whose interval holds 0 is none that can be seen here.",
        f"Forgetting: what the loss on the text to be kept has risen by, in nats a token{kept}. Latency: one prompt, "
        "with the adapter as it was trained, and how much of the base's that is; merged LoRA costs nothing.",
    ]


def print_comparison(found: Found, console: Console) -> None:
    """The tables and the recommendation on a terminal."""
    for columns, rows in ((QUALITY_COLUMNS, quality_rows(found)), (COST_COLUMNS, cost_rows(found))):
        shown = [number for number, name in enumerate(columns) if any(row[number] not in ("", "-") for row in rows)]
        table = Table(box=None, padding=(0, 2, 0, 0))
        for number in shown:
            side = "left" if number == 0 or not columns[number] else "right"
            table.add_column(columns[number], justify=side, no_wrap=bool(columns[number]))  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*(Text(row[number]) for number in shown))
        # In a file or a pipe there is room.
        console.print(table, width=None if console.is_terminal else 160)
        console.print()
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
        log = RunDir(directory / method["runs"][0]).metrics
        if not log.is_file():
            continue
        steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        points = [(one["step"], one["loss"]) for one in steps if one["kind"] == "step" and one["loss"] is not None]
        if points:
            lines.append(Curve(method["name"], [step for step, _ in points], smoothed([loss for _, loss in points])))
    return lines


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, older ones counting less: over about SMOOTHED_STEPS of them."""
    fade, total, weight, found = 1 - 1 / SMOOTHED_STEPS, 0.0, 0.0, []
    for value in values:
        total, weight = fade * total + value, fade * weight + 1
        found.append(total / weight)
    return found


def pictures(found: Found, lines: Sequence[Curve]) -> list[str]:
    """Quality against each cost, and the loss curves: SVG to stand inside a page."""
    measured = [m for m in found["methods"] if m["quality"] and None not in m["quality"]["interval"]]
    drawn = [_scatter(found, measured, cost) for cost in COST_NAMES] if measured else []
    if lines:
        title = f"Training loss of the first seed, nats a token, smoothed over about {SMOOTHED_STEPS} steps"
        drawn.append(curves(title, lines, "step"))
    return [one.replace(' xmlns="http://www.w3.org/2000/svg"', "") for one in drawn]


def _scatter(found: Found, measured: list[Found], cost: str) -> str:
    """As far as it can be drawn: a floor far below all methods is left out, or they could not be told apart."""
    name, text = COST_NAMES[cost]
    in_front = {method["name"] for method in front(measured, cost)}
    points = [
        Point(
            name=method["name"],
            x=max(method[cost], 1e-9),
            y=method["quality"]["value"],
            low=method["quality"]["interval"][0],
            high=method["quality"]["interval"][1],
            in_front=method["name"] in in_front,
        )
        for method in measured
    ]
    level = _level(found, points)
    better = "more is better" if found["metric"] == "accuracy" else "less is better"
    title = f"{found['metric'].capitalize()} on the test rows against {name}; {better}"
    return scatter(title, points, name, text, level)


def _level(found: Found, points: Sequence[Point]) -> tuple[float, str] | None:
    floor = found["floors"].get("few_shot") or found["floors"].get("untuned")
    value = floor["quality"]["value"] if floor else None
    if value is None:
        return None
    low, high = min(point.low for point in points), max(point.high for point in points)
    is_near = low - (high - low) <= value <= high + (high - low)
    name = "base with examples" if "few_shot" in found["floors"] else "base"
    return (value, name) if is_near else None


def page(found: Found, lines: Sequence[Curve]) -> str:
    """The comparison as one HTML page that needs nothing else."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    out = [
        f"{method['name']}: {method['status']}: {method['dropped']}" for method in found["methods"] if method["dropped"]
    ]
    return template.render(
        found=found,
        tables=[(QUALITY_COLUMNS, quality_rows(found)), (COST_COLUMNS, cost_rows(found))],
        pictures=pictures(found, lines),
        notes=[*out, *found["notes"]],
        explained=explained(found),
        floors=FLOOR_NAMES,
        rates=[(method["name"], method["rates"], method["lr"]) for method in found["methods"] if method["rates"]],
        spent=format_seconds(found["spent_s"]),
        budget=None if found["budget_s"] is None else format_seconds(found["budget_s"]),
    )
