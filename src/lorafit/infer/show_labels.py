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
    table.add_row("loss", f"{report['loss']:.4g}", "nats per row")
    table.add_row("accuracy", f"{report['accuracy']:.1%}", f"{format_count(report['wrong'])} rows are told wrong")
    table.add_row("macro-F1", f"{report['macro_f1']:.3f}", "mean over labels")
    console.print(table)
    scale = "" if report["scale"] in (None, 1) else f" at scale {report['scale']:g}"
    line = (
        f"{report['target']}{scale} ({report['precision']}) on {format_count(report['rows'])} rows of {report['data']}"
    )
    line = f"{line}: {format_seconds(report['seconds'])}"
    console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    if report["cut_rows"]:
        console.print(f"{format_count(report['cut_rows'])} rows were cut at --seq-len", style="yellow", highlight=False)
    there = [one for one in report["labels"] if one["rows"]]
    worst = sorted(there, key=lambda one: one["f1"])[:SHOWN_LABELS]
    title = "label" if len(worst) == len(there) else f"the {len(worst)} worst of {len(there)} labels"
    cells = [(one["label"], format_count(one["rows"]), *(f"{one[k]:.3f}" for k in SHARES)) for one in worst]
    _print_table(console, (title, "rows", *SHARES), cells)
    pairs = report["confusions"][:SHOWN_LABELS]
    _print_table(console, ("label", "taken for", "rows"), [(p["expected"], p["got"], str(p["rows"])) for p in pairs])
    if report["samples"]:
        console.print(f"\nThe first {len(report['samples'])} that are told wrong:", highlight=False)
    for sample in report["samples"]:
        text = sample["prompt"] if len(sample["prompt"]) <= SHOWN_CHARS else sample["prompt"][:SHOWN_CHARS] + "..."
        console.print(Text(f"\n{text}\n") + Text(f"{sample['expected']}, taken for {sample['got']}", "red"))


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
