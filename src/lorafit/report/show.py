"""A run's report for people: a short table in the terminal, and one page that needs nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from lorafit.chart import SMOOTHED_STEPS, Curve, Panel, chart, curves, heat, smoothed, thinned
from lorafit.page import inside, render
from lorafit.tables import Table, print_table
from lorafit.units import format_bytes, format_count, format_flop, format_seconds, format_share

PAGE = Path(__file__).parent / "page.html.jinja"
Found = dict[str, Any]
# What is drawn and tabled of an update: its name, and its title.
FIGURES = {
    "norm": "Norm",
    "effective_rank": "Effective rank",
    "stable_rank": "Stable rank",
}
SHOWN_CHARS = 90  # of an answer in the terminal


def headline(found: Found) -> str:
    """What was trained, in one line."""
    result = found["result"]
    variant = "" if result["variant"] in (None, result["method"]) else f":{result['variant']}"
    rank = f" of rank {result['r']}" if result["r"] else ""
    share = format_share(result["trainable_params"], result["total_params"])
    return (
        f"{result['method']}{variant}{rank} on {result['model']}: {format_count(result['trainable_params'])} trainable "
        f"parameters, {share} of {format_count(result['total_params'])}"
    )


def outcome(found: Found) -> list[tuple[str, str]]:
    """How it went."""
    result, rows = found["result"], list[tuple[str, str]]()
    speed = result["tokens_seen"] / result["train_s"] if result["train_s"] else 0.0
    rows.append(("steps", format_count(result["steps"]) + (", stopped early" if result["stopped_early"] else "")))
    rows.append(("training loss of the last step", _number(result["train_loss"])))
    if result["eval_loss"] is not None:
        rows.append(("held-out loss", f"{_number(result['eval_loss'])} after step {result['best_step']}"))
    if result.get("eval_accuracy") is not None:
        rows.append(("held-out accuracy", f"{result['eval_accuracy']:.1%}, macro-F1 {result['eval_macro_f1']:.3f}"))
    if result.get("race"):
        rows.append(("learning rates", raced(result["race"])))
    rows.append(("training took", f"{format_seconds(result['train_s'])} ({speed:,.0f} tokens/s)"))
    rows.append(("loading took", format_seconds(result["load_s"])))
    rows.append(("peak memory", format_bytes(result["peak_rss_bytes"])))
    mfu = "" if result["mfu"] is None else f", {result['mfu']:.0%} of the machine's measured rate"
    if result["flop"] is not None:
        rows.append(("operations", format_flop(result["flop"]) + mfu))
    if result["skipped_steps"]:
        rows.append(("steps skipped, not finite", format_count(len(result["skipped_steps"]))))
    return rows


def expected(found: Found) -> list[tuple[str, str, str, str]]:
    """Predicted and measured, with what the measured is of the predicted."""
    rows = []
    for name, key, text in (("peak memory", "peak_bytes", format_bytes), ("training time", "train_s", format_seconds)):
        own = found["predicted"][key]
        if own["predicted"]:
            ratio = f"{own['measured'] / own['predicted']:.0%}"
            rows.append((name, text(own["predicted"]), text(own["measured"]), ratio))
        else:
            rows.append((name, "-", text(own["measured"]), "-"))
    return rows


def by_kind(found: Found, spread: bool) -> Table:
    """What was trained, summed up by kind of module: means over layers; with `spread` least and largest as well."""
    modules, is_update = found["trained"]["modules"], found["trained"]["is_update"]
    kinds = dict.fromkeys(one["kind"] for one in modules)
    columns = ("module", "layers", "norm", *(("rank", "effective rank", "stable rank") if is_update else ()))
    rows = []
    for kind in kinds:
        own = [one for one in modules if one["kind"] == kind]
        ranks = sorted({one["r"] for one in own if one["r"]})
        told = [_mean([one[key] for one in own if one[key] is not None], spread) for key in FIGURES]
        middle = (", ".join(map(str, ranks)) or "-",) if is_update else ()
        rows.append((kind, format_count(len(own)), told[0], *middle, *(told[1:] if is_update else ())))
    return Table("What was trained, means over layers", columns, rows)


def by_rank(found: Found) -> Table | None:
    """The adapters that the run leaves, where it leaves one of each rank."""
    ranks = found["result"].get("by_rank") or []
    columns = ("rank", "held-out loss", "steps of its own")
    rows = [
        (str(one["r"]), "-" if one["loss"] is None else f"{one['loss']:.4f}", format_count(one["steps"] or 0))
        for one in ranks
    ]
    return Table("Ranks", columns, rows) if rows else None


def raced(race: Found) -> str:
    """What a race of learning rates came to. race: as run.json has it."""
    each = ", ".join(
        f"{lr:g} {'failed' if loss is None else f'loses {loss:.4f}'}"
        for lr, loss in zip(race["rates"], race["ahead"], strict=True)
    )
    steps = max(map(len, race["losses"]))
    return f"raced over the first {steps} steps, and on the rows to come {each}: {race['lr']:g} went on"


def _mean(values: Sequence[float], spread: bool) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) == 1 or not spread else f"{mean} ({min(values):.3g} to {max(values):.3g})"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


# --- in the terminal --------------------------------------------------------------------------------------------------


def print_report(found: Found, out: Console) -> None:
    """The outcome, predicted against measured, the updates by module, the first answers."""
    out.print(Text(found["run"], "bold"))
    out.print(headline(found), highlight=False, markup=False, soft_wrap=True)
    table = Drawn(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in outcome(found):
        table.add_row(name, value)
    out.print(table)
    out.print()
    print_table(Table("Predicted, measured", ("", "predicted", "measured", "of it"), expected(found)), out)
    if ranks := by_rank(found):
        print_table(ranks, out)
    print_table(by_kind(found, spread=False), out)
    for sample in found["samples"]["rows"] if found["samples"] else ():
        for name in ("prompt", "expected", "base", "tuned"):
            text = " ".join(sample[name].split())
            shown = text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."
            out.print(Text(f"{name:>9}  ", "dim") + Text(shown, "green" if name == "tuned" else ""))
        out.print()
    for note in found["notes"]:
        out.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)


# --- the page ---------------------------------------------------------------------------------------------------------


def loss_pictures(found: Found) -> list[str]:
    """Loss, rate and speed over the steps."""
    own = found["curves"]
    lines = []
    if own["train_loss"]:
        steps, losses = zip(*own["train_loss"], strict=True)
        lines.append(Curve("training, each step", *thinned(steps, losses)))
        if len(steps) > SMOOTHED_STEPS:
            lines.append(Curve(f"training, over {SMOOTHED_STEPS} steps", *thinned(steps, smoothed(losses))))
    if own["eval_loss"]:
        lines.append(Curve("held-out rows", *zip(*own["eval_loss"], strict=True)))
    unit = "nats a row" if found["result"].get("task") == "classify" else "nats a token"
    drawn = [curves(f"Loss, {unit}", lines, "step")] if lines else []
    panels = [
        Panel(title, *thinned(*zip(*own[key], strict=True)))
        for key, title in (("lr", "Learning rate"), ("tokens_per_s", "Tokens a second"))
        if own[key]
    ]
    return [inside(one) for one in [*drawn, *([chart(panels, "step")] if panels else [])]]


def maps(found: Found) -> list[str]:
    """A map of each figure over layers and kinds of module; none where there are no layers."""
    within = [one for one in found["trained"]["modules"] if one["layer"] is not None]
    layers = sorted({one["layer"] for one in within})
    if len(layers) < 2:
        return []
    drawn = []
    for key, title in FIGURES.items():
        values = {(one["kind"], one["layer"]): one[key] for one in within if one[key] is not None}
        if values:
            of = f"{title} of dW" if found["trained"]["is_update"] else title
            kinds = [kind for kind in dict.fromkeys(one["kind"] for one in within) if any(k == kind for k, _ in values)]
            drawn.append(inside(heat(of, kinds, layers, values, "layer")))
    return drawn


def settings(found: Found) -> list[tuple[str, str, str]]:
    """Name, value with what was chosen for it, and where it came from."""
    rows = []
    for one in found["settings"]:
        value = ", ".join(map(str, one["value"])) if isinstance(one["value"], list) else str(one["value"])
        chosen = f" (measured: {one['chosen']})" if "chosen" in one else ""
        rows.append((one["name"], (value or "none") + chosen, one["source"] or "not noted"))
    return rows


def data_facts(found: Found) -> list[tuple[str, str]]:
    """What is known of the rows."""
    result, own = found["result"], found["rows"]
    rows = [("training data", result["data"]), ("its SHA-256", result["data_sha256"])]
    if own:
        rows.append(("format", own["format"]))
        for side, name in (("trained", "trained on"), ("held_out", "held out")):
            if own[side]:
                rows += _side(name, own[side])
    rows.append(("tokens that were seen, with repeats", format_count(result["tokens_seen"])))
    computed = format_share(result["tokens_computed"], result["tokens_seen"])
    rows.append(("of them computed, what rows share once", f"{format_count(result['tokens_computed'])} ({computed})"))
    if result["rows_left_out"]:
        rows.append(("rows left out", format_count(result["rows_left_out"])))
    if result["system"]:
        rows.append(("system message of all rows", result["system"]))
    return rows


def _side(name: str, own: Found) -> list[tuple[str, str]]:
    share = format_share(own["supervised_tokens"], own["tokens"])
    pieces = "" if own["pieces"] == own["rows"] else f" in {format_count(own['pieces'])} pieces"
    rows = [(f"{name}, rows", format_count(own["rows"]) + pieces), (f"{name}, tokens", format_count(own["tokens"]))]
    rows.append((f"{name}, tokens with a loss", f"{format_count(own['supervised_tokens'])} ({share})"))
    rows.append((f"{name}, tokens of the longest", format_count(own["longest"])))
    if own["cut_rows"]:
        lost = f"{format_count(own['cut_rows'])}, {format_count(own['cut_tokens'])} tokens lost"
        rows.append((f"{name}, rows cut at --seq-len", lost))
    return rows


def page(found: Found) -> str:
    """The report as one HTML page that needs nothing else."""
    most = max(found["predicted"]["peak_bytes"].values())
    parts = found["predicted"]["parts"] or {}
    return render(
        PAGE,
        found=found,
        headline=headline(found),
        outcome=outcome(found),
        curves=loss_pictures(found),
        maps=maps(found),
        by_kind=by_kind(found, spread=True),
        by_rank=by_rank(found),
        expected=expected(found),
        most=most,
        parts=[(name, count) for name, count in parts.items() if count],
        settings=settings(found),
        data=data_facts(found),
        labels=list((found["label_counts"] or {}).items()),
    )
