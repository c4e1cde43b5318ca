"""A search of the rank for people: a table in the terminal, and one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from lorafit.chart import Point, heat, scatter
from lorafit.page import inside, render
from lorafit.rank.advise import LEAST
from lorafit.rank.conclude import PATTERN
from lorafit.report.places import place
from lorafit.report.show import raced
from lorafit.tables import Table, print_table
from lorafit.units import format_count, format_seconds

PAGE = Path(__file__).parent / "page.html.jinja"
COLUMNS = ("rank", "parameters", "loss", "more than the best", "right", "")
# What stands before the command that takes an adapter from the search itself.
LEFT = "Or without another training, the adapter of that rank that the search left"
LAYERS = "Or as many parameters, more of them where gradients have more energy (--verify says which is better)"
# What `rank.expected.Expected` names.
PARTS = {
    "load": "loading", "train": "the largest rank", "race": "the race of rates", "lower": "those below",
    "evaluations": "evaluations",
}  # fmt: skip
Found = dict[str, Any]


# --- what is told ---------------------------------------------------------------------------------------------------


def curve_rows(found: Found) -> list[tuple[str, ...]]:
    """A line for each rank: cells as text."""
    return [
        (
            str(one["r"]),
            format_count(one["params"]),
            "not finite" if one["loss"] is None else _with_error(one["loss"], one["standard_error"]),
            _gap(one),
            "-" if one["right"] is None else f"{one['right']:.1%}",
            _remark(one, found["recommended_r"]),
        )
        for one in found["curve"]
    ]


def _gap(one: Found) -> str:
    if one["gap"] is None:
        return "-"
    return _with_error(one["gap"], one["gap_standard_error"]) if one["gap"] else "the best"


def _with_error(value: float, error: float | None) -> str:
    """error: None where it is not known, as of a single row."""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _remark(one: Found, recommended: int) -> str:
    if one["r"] == recommended:
        return "recommended"
    return "as good" if one["as_good"] else ""


def distance_told(found: Found) -> list[str]:
    """What was seen without training, a number and its meaning in a sentence each."""
    far, gradients, capacity = found["distance"], found["gradients"], found["capacity"]
    near = "closer to it than" if far["data"] < far["reference"] else "further from it than"
    held = ", ".join(f"r = {r}: {share:.1%}" for r, share in gradients["held"].items())
    enough = gradients["enough_r"]
    return [
        f"The base loses {far['data']:.3f} nats a token on {far['rows']} of the rows, {far['own']:.3f} on what it "
        f"writes in their place itself: they surprise it by {far['surprise']:.3f}. On plain text it loses "
        f"{far['reference']:.3f}; the rows are {near} that.",
        f"The gradients of all weights use {gradients['effective_rank']:.1f} directions in the mean. Of their energy "
        f"the first directions hold {held}"
        + (f"; r = {enough} is the first that holds 90%." if enough else "; no rank that was tried holds 90%."),
        f"Rank {found['recommended_r']} has {format_count(capacity['params'])} numbers, "
        f"{_about(capacity['params_per_token'])} for each of the {format_count(capacity['supervised_tokens'])} tokens "
        "with a loss: below one they cannot hold every row by heart.",
    ]


def _about(number: float) -> str:
    """Three digits of it, and all that stand before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def rate_told(found: Found) -> list[str]:
    """Which rate the one run had, and what it is better than."""
    race = found["run"].get("race")  # a search of an earlier version has none
    if race is None:
        return []
    return [f"Rates {raced(race)}."]


def verified_told(found: Found) -> list[str]:
    """What training ranks by themselves gave."""
    verified = found["verified"]
    if verified is None:
        return []
    own_r = found["recommended_r"]
    if verified["regret"] is None:
        return ["Verified: no run of the recommended rank by itself ended with a finite loss."]
    more = _with_error(verified["gap"], verified["gap_standard_error"])
    lines = [
        f"Trained by itself at its best rate, rank {own_r} "
        + (
            "is the best of it and its neighbours."
            if verified["best_r"] == own_r
            else f"loses {verified['regret']:.2%} more than rank {verified['best_r']}, the best of it and its "
            f"neighbours ({more} nats a token)."
        )
    ]
    smallest = verified.get("as_good_r")  # a search of an earlier version has none
    if smallest not in (None, own_r):
        lines.append(f"Of those trained by themselves rank {smallest} is the smallest that is as good as the best.")
    pattern, own = verified["trials"].get(PATTERN), verified["trials"][str(own_r)]
    if pattern and pattern["loss"] is not None:
        lines.append(
            f"Ranks by layer from the gradients, with as many parameters: {pattern['loss']:.4f}, where the same rank "
            f"everywhere has {own['loss']:.4f}."
        )
    return lines


def verified_rows(found: Found) -> list[tuple[str, ...]]:
    """A line for each rank that was trained by itself: its rates with their losses."""
    if found["verified"] is None:
        return []
    return [
        (
            name if name == PATTERN else f"r = {name}",
            _loss(one["loss"]),
            f"{one['lr']:g}",
            ", ".join(f"{tried['lr']:g}: {_loss(tried['loss'])}" for tried in one["tried"]),
        )
        for name, one in found["verified"]["trials"].items()
    ]


def _loss(loss: float | None) -> str:
    return "failed" if loss is None else f"{loss:.4f}"


def expected_told(expected: Found, precision: str | None) -> str:
    """What the run of all ranks will take. precision: of the run; the look has no products in int8."""
    parts = ", ".join(f"{PARTS[name]} {format_seconds(seconds)}" for name, seconds in expected.items() if seconds)
    near = "at most" if precision == "int8" else "about"
    return f"predicted: all ranks in one run take {near} {format_seconds(sum(expected.values()))} ({parts})"


def costs_told(found: Found) -> str:
    """What the answer took."""
    parts, took = found["seconds"], sum(found["seconds"].values())
    expected = found.get("run", {}).get("expected_s")
    predicted = {"train": f" (predicted {format_seconds(sum(expected.values()))})"} if expected else {}
    told = ", ".join(f"{name} {format_seconds(seconds)}{predicted.get(name, '')}" for name, seconds in parts.items())
    one = found.get("training_s")  # a search of an earlier version has none
    times = f", {took / one:.1f} times as long as training r = {found['curve'][-1]['r']} alone" if one else ""
    return f"Took {format_seconds(took)}{times}: {told}."


# --- the terminal -----------------------------------------------------------------------------------------------------


def print_rank(found: Found, console: Console) -> None:
    """What is told, the curve, the advice and the command."""
    for line in distance_told(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    title = f"Held-out loss by rank, of one run ({found['rows']['valid']} rows)"
    print_table(Table(title, COLUMNS, curve_rows(found)), console)
    if found["verified"]:
        columns = ("trained by itself", "loss", "rate", "rates that were tried")
        print_table(Table("Verified", columns, verified_rows(found)), console)
    for line in [*rate_told(found), *verified_told(found), *found["notes"], costs_told(found)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    answer = f"Take r = {found['recommended_r']}: {found['reason']}."
    console.print(answer, style="bold", highlight=False, markup=False, soft_wrap=True)
    for told, command in (("Next", "command"), (LEFT, "shrink"), (LAYERS, "by_layer")):
        if found[command]:
            console.print(f"{told}:\n  {found[command]}", highlight=False, markup=False, soft_wrap=True)


# --- the page ---------------------------------------------------------------------------------------------------------


def pictures(found: Found) -> list[str]:
    """The curve with intervals, and where the gradients need directions: SVG to stand inside a page."""
    known = [one for one in found["curve"] if one["loss"] is not None]
    points = [
        Point(
            name=f"r = {one['r']}",
            x=one["r"],
            y=one["loss"],
            low=one["loss"] - (one["standard_error"] or 0.0),
            high=one["loss"] + (one["standard_error"] or 0.0),
            in_front=True,
        )
        for one in known
    ]
    title = "Held-out loss by rank, nats a token, with one standard error: less is better"
    drawn = [scatter(title, points, "rank", lambda value: f"{value:g}", ticks=[one["r"] for one in known])]
    for key, title in (
        ("effective_rank", "Directions that each weight's gradients use (effective rank)"),
        ("share", "Share of the gradients' energy"),
    ):
        values = _map(found, key)
        if values:
            kinds = list(dict.fromkeys(kind for kind, _ in values))
            drawn.append(heat(title, kinds, sorted({layer for _, layer in values}), values, "layer"))
    return [inside(one) for one in drawn]


def _map(found: Found, key: str) -> dict[tuple[str, int], float]:
    """By kind of module and layer; weights outside of layers are left out."""
    values = {}
    for name, one in found["gradients"]["by_weight"].items():
        layer, kind = place(name)
        if layer is not None:
            values[kind, layer] = one[key]
    return values


def page(found: Found) -> str:
    """The search as one HTML page that needs nothing else."""
    kinds = [(name, f"{share:.1%}") for name, share in found["gradients"]["by_kind"].items()]
    return render(
        PAGE,
        found=found,
        columns=COLUMNS,
        curve=curve_rows(found),
        told=distance_told(found),
        rate=rate_told(found),
        pictures=pictures(found),
        verified=verified_rows(found),
        verified_told=verified_told(found),
        kinds=kinds,
        costs=costs_told(found),
        least=LEAST,
        left=LEFT,
        layers=LAYERS,
    )
