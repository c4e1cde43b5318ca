"""A preflight report for people: on the terminal, and as a page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorafit.data.formats import LABELLED, NUMBERED, TAGGED
from lorafit.data.preflight import SHOWN, Report, Same, needs_look
from lorafit.page import render
from lorafit.units import format_count, format_share

PAGE = Path(__file__).parent / "page.html.jinja"
BAR = 30  # characters of the longest bar


def facts(report: Report) -> list[tuple[str, str]]:
    """What is counted, by name."""
    share = format_share(report.supervised_tokens, report.tokens)
    found = [
        ("rows", format_count(report.rows)),
        ("tokens", format_count(report.tokens)),
        (
            f"{'words with a tag' if report.format in TAGGED else 'rows with a label'}",
            format_count(report.supervised_tokens),
        )
        if report.format in (*LABELLED, *NUMBERED, *TAGGED)
        else ("tokens with a loss", f"{format_count(report.supervised_tokens)} ({share})"),
        ("longest row, tokens", format_count(report.longest)),
        ("rows equal to an earlier one", format_count(report.equal.count)),
        ("rows nearly the same as an earlier one", format_count(report.near.count)),
    ]
    if report.pieces != report.rows:
        found.insert(1, ("pieces that they are split into", format_count(report.pieces)))
    if report.rewritten:
        found.append(("conversations split, as the template rewrites replies", format_count(report.rewritten)))
    if report.cut_rows:
        found.append(("rows cut at --seq-len", format_count(report.cut_rows)))
        found.append(("tokens lost by that", format_count(report.cut_tokens)))
    if report.bad_rows:
        found.append(("rows that cannot be used", format_count(report.bad_rows)))
    if report.odd_rows:
        found.append(("rows with characters that are no text", format_count(report.odd_rows)))
    for name, same in (("rows that the other data has too", report.leaks), ("rows nearly in it", report.near_leaks)):
        if same is not None:
            found.append((name, format_count(same.count)))
    if report.prefix:
        saved = format_share(round(report.shared_share * report.tokens), report.tokens)
        found.append(
            ("tokens that all rows begin with", f"{format_count(report.prefix)} (computed once: {saved} saved)")
        )
    found += [(f"column {name!r} is not read, rows", format_count(n)) for name, n in report.unused_columns.items()]
    return found


def twice(report: Report) -> list[tuple[str, Same | None]]:
    """Rows that are there twice, by what they are called."""
    return [
        ("Rows equal to an earlier one", report.equal),
        ("Rows nearly the same as an earlier one", report.near),
        ("Rows that the other data has too", report.leaks),
        ("Rows that the other data nearly has", report.near_leaks),
    ]


def print_report(report: Report, console: Console) -> None:
    """The report on a terminal."""
    console.print(f"[bold]{report.data}[/bold] ({report.format})", highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts(report):
        table.add_row(name, value)
    console.print(table)
    _print_bars("tokens", {f"up to {format_count(top)}": n for top, n in report.lengths}, console)
    if report.labels:
        _print_bars("label", report.labels, console)
    for title, same in twice(report):
        if same and same.count:
            console.print(f"\n{title}:", highlight=False)
            for row, other, share in same.first:
                console.print(f"  {row} and {other} ({share:.0%} in common)", highlight=False, markup=False)
    for title, lines in (("Rows that cannot be used", report.bad), ("Characters that are no text", report.odd)):
        if lines:
            console.print(f"\n{title}:", highlight=False)
            for line in lines[:SHOWN]:
                console.print(f"  {line}", highlight=False, markup=False)
            if len(lines) > SHOWN:
                console.print(f"  and {format_count(len(lines) - SHOWN)} more: --json lists them", highlight=False)
    _print_samples(report, console)
    for line in needs_look(report):
        console.print(line, style="yellow", highlight=False)


def _print_bars(name: str, counts: dict[str, int], console: Console) -> None:
    most = max(counts.values(), default=0)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(name)
    table.add_column("rows", justify="right")
    table.add_column("")
    for label, count in counts.items():
        table.add_row(Text(label), format_count(count), "█" * max(bool(count), round(BAR * count / max(1, most))))
    console.print()
    console.print(table)


def _print_samples(report: Report, console: Console) -> None:
    for origin, spans in report.samples:
        console.print(f"\n{origin}, as the model reads it; what has a loss is green:", highlight=False, markup=False)
        text = Text()
        for span in spans:
            text.append(span.text, style="black on green" if span.supervised else "")
        console.print(text)


def page(report: Report, model: str) -> str:
    """The report as one HTML page that needs nothing else."""
    lengths = [(f"up to {format_count(top)}", count) for top, count in report.lengths]
    return render(
        PAGE, report=report, model=model, facts=facts(report), remarks=needs_look(report), twice=twice(report),
        lengths=lengths,
    )  # fmt: skip
