"""An evaluation of a head of labels, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorafit.units import format_count, format_seconds

SHOWN_LABELS = 10  # of each table; --json gives all
SHOWN_CHARS = 400
SHARES = ("precision", "recall", "f1")


def print_labels(report: dict[str, Any], console: Console) -> None:
    """Loss and shares, the labels that are told worst, what is taken for what, and rows that were told wrong."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    is_tag = report["task"] == "tag"
    each, name = ("word", "tag") if is_tag else ("row", "label")
    table.add_row("loss", f"{report['loss']:.4g}", f"nats per {each}")
    table.add_row("accuracy", f"{report['accuracy']:.1%}", f"{format_count(report['wrong'])} {each}s are told wrong")
    table.add_row("macro-F1", f"{report['macro_f1']:.3f}", f"mean over {name}s")
    if report["entity_f1"] is not None:
        table.add_row("entity F1", f"{report['entity_f1']:.3f}", "of all entities: type, begin and end are right")
    console.print(table)
    _print_what(report, f"{each}s", console)
    _print_table(console, ("entity", "rows", *SHARES), [_shares(one) for one in report["entities"]])
    there = [one for one in report["labels"] if one["rows"]]
    worst = sorted(there, key=lambda one: one["f1"])[:SHOWN_LABELS]
    title = name if len(worst) == len(there) else f"the {len(worst)} worst of {len(there)} {name}s"
    _print_table(console, (title, "rows", *SHARES), [_shares(one) for one in worst])
    pairs = report["confusions"][:SHOWN_LABELS]
    _print_table(console, (name, "taken for", "rows"), [(p["expected"], p["got"], str(p["rows"])) for p in pairs])
    if report["samples"]:
        console.print(f"\nThe first {len(report['samples'])} that are told wrong:", highlight=False)
    for sample in report["samples"]:
        told = Text(f"{sample['expected']}, taken for {sample['got']}", "red")
        console.print(Text(f"\n{_cut(sample['prompt'])}\n") + told)


NUMBERS = {
    "mae": ("mean absolute error", ""),
    "mse": ("mean squared error", ""),
    "loss": ("loss", "squared error in deviations of the training rows' numbers"),
    "r2": ("R2", "share of the variance that is accounted for"),
    "pearson": ("Pearson", "correlation"),
    "spearman": ("Spearman", "correlation of ranks"),
}


def print_numbers(report: dict[str, Any], console: Console) -> None:
    """Errors, correlations, and the first rows with their numbers."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, (title, meaning) in NUMBERS.items():
        table.add_row(title, "-" if report[name] is None else f"{report[name]:.4g}", meaning)
    console.print(table)
    _print_what(report, "rows", console)
    for sample in report["samples"]:
        console.print(
            Text(f"\n{_cut(sample['prompt'])}\n") + Text(f"{sample['got']}, is {sample['expected']}", "green")
        )


def _print_what(report: dict[str, Any], rows: str, console: Console) -> None:
    scale = "" if report["scale"] in (None, 1) else f" at scale {report['scale']:g}"
    what = f"{report['target']}{scale} ({report['precision']}) on {format_count(report['rows'])} {rows}"
    line = f"{what} of {report['data']}: {format_seconds(report['seconds'])}"
    console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    if report["cut_rows"]:
        console.print(f"{format_count(report['cut_rows'])} rows were cut at --seq-len", style="yellow", highlight=False)


def _shares(one: dict[str, Any]) -> tuple[str, ...]:
    return (one["label"], format_count(one["rows"]), *(f"{one[key]:.3f}" for key in SHARES))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."


def _print_table(console: Console, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    if not rows:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in ("rows", *SHARES) else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print()
    console.print(table)
