"""A plan for people: the same sections on the terminal and on a page. found: what `planning.plan` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorafit.page import render
from lorafit.plan.work import MICRO_TOKENS
from lorafit.rates import way
from lorafit.units import MIB, format_bytes, format_count, format_flop, format_seconds, format_share

PAGE = Path(__file__).parent / "page.html.jinja"
Found = dict[str, Any]
# What stands behind a figure, and how it is shown: on a terminal, and as a class of the page.
MARKS = {" x": ("red", "bad"), " r": ("yellow", "tight"), " s": ("yellow", "tight")}
LEGEND = "x: does not fit; s: fits in smaller passes; r: fits with layers computed again, a third more time"


@dataclass(frozen=True)
class Section:
    """A table. columns: their heads, the first to the left, numbers to the right. notes: lines below it.

    remarks: a word on each row, such as why it is impossible; empty strings where there is none. marked: whether cells
    end in one of MARKS.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    remarks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    marked: bool = False


def headline(found: Found) -> str:
    """The model in one line."""
    stored = ", ".join(found["stored_as"]) or "nothing but a config"
    size = format_bytes(found["weight_bytes"])
    return f"{found['architecture']}, {format_count(found['parameters'])} parameters, stored as {stored} ({size})"


def advice(found: Found) -> str:
    """What to type, or what to change."""
    if found["advice"]:
        return f"The fastest that fits:\n  {found['advice']}"
    return "None of these fits. Lower --seq-len or --batch-size, or give more --memory."


def sections(found: Found) -> list[Section]:
    """All tables, in their order."""
    makers = (
        *(_parts, _sizes, _trainable, *((_data,) if found["data"] else ()), _operations, _runs, _methods),
        *((_times,) if found["machine"]["flop_per_s"] else ()),
        _shapes,
        *((_gpu,) if found["gpu"] else ()),
    )
    return [make(found) for make in makers]


def _parts(found: Found) -> Section:
    def name(part: str) -> str:
        return f"{part} (and the output head)" if part == "embeddings" and found["tied"] else part

    rows = [
        (name(part), format_count(count), format_share(count, found["parameters"]))
        for part, count in found["parts"].items()
        if count
    ]
    return Section("Parameters", ("part", "count", "share"), rows)


def _sizes(found: Found) -> Section:
    rows = [(size["name"], format_bytes(size["nbytes"]), f"{size['bits']:.2f}") for size in found["sizes"]]
    return Section("Size of the model in each type", ("type", "size", "bits a parameter"), rows)


def _trainable(found: Found) -> Section:
    def row(one: Found) -> tuple[str, ...]:
        if one["impossible"]:
            return (one["method"], "-", "-", "-")
        file = "a whole model" if one["file_bytes"] is None else format_bytes(one["file_bytes"])
        return (one["method"], format_count(one["params"]), format_share(one["params"], found["parameters"]), file)

    columns = ("method", "parameters", "share", "adapter file")
    remarks = [one["impossible"] or one["remark"] or "" for one in found["trainable"]]
    return Section("What would be trained", columns, [row(one) for one in found["trainable"]], remarks)


def _data(found: Found) -> Section:
    data, batch = found["data"], found["settings"]["batch_size"]
    total = "unknown" if data["rows"] is None else ("" if data["counted"] else "about ") + format_count(data["rows"])
    rows = [
        ("rows", total),
        *([("pieces of them", format_count(data["pieces"]))] if data["pieces"] not in (None, data["rows"]) else []),
        ("tokens a row, the mean", f"{data['tokens_per_row']:,.0f}"),
        ("tokens of the longest", format_count(data["longest"])),
        ("of them with a loss", f"{data['loss_share']:.1%}"),
        (f"tokens of {batch} rows", f"{data['read_tokens_per_step']:,.0f}"),
        ("computed, what rows share once", f"{data['computed_tokens_per_step']:,.0f}"),
    ]
    return Section(f"{data['name']} ({data['format']})", ("", ""), rows, notes=_data_notes(data))


def _data_notes(data: Found) -> list[str]:
    notes = []
    if data["first_only"]:
        many = "" if data["counted"] else "; --rows says how many"
        notes.append(f"Of its first {format_count(data['looked_at'])} rows: the rest may be otherwise{many}")
    elif data["looked_at"] != data["rows"]:
        notes.append(f"Of {format_count(data['looked_at'])} rows that lie evenly in it")
    if data["unusable"]:
        notes.append(f"{format_count(data['unusable'])} of these cannot be used; the first: {data['first_unusable']}")
    if data["cut"]:
        notes.append(f"{format_count(data['cut'])} of these are cut at --seq-len")
    return notes


def _operations(found: Found) -> Section:
    flop, at, machine = found["flop_per_token"], found["settings"], found["machine"]
    where = "these rows" if found["data"] else f"rows of {format_count(at['seq_len'])}"
    note = (
        f"Operations a token, in {where}: forward {format_flop(flop['forward'])}, "
        f"{_method(found)} {format_flop(flop['method'])} (full fine-tuning {format_flop(flop['full'])}); "
        f"attention is {flop['attention_share']:.1%} of it"
    )

    def reached(name: str) -> str:
        known = machine["mfu"][name]
        return f"{machine['assumed_mfu'][name]:.0%} assumed" if known is None else f"{known:.0%}"

    rows = [(name, f"{format_flop(rate)}/s", reached(name)) for name, rate in machine["flop_per_s"].items()]
    unknown = [] if rows else ["This machine was not measured yet: add --calibrate, or train once"]
    columns = ("type", "measured", "of it reached in training")
    return Section(f"This machine, {machine['threads']} threads", columns, rows, notes=[note, *unknown])


def _runs(found: Found) -> Section:
    at = found["settings"]
    length = "" if found["data"] else f" of {format_count(at['seq_len'])} tokens"
    shape = f"{at['batch_size']} rows{length} a step"
    title = f"Training by {_method(found)} with {shape}, in {format_bytes(found['machine']['memory_bytes'])}"
    ways = {run["precision"] for run in found["runs"]}
    notes = [f"{name}: {types}" for name, types in found["types"].items() if name in ways]
    notes += [f"Times are {found['speeds'][how]}" for how in _speeds(found["runs"]) if how != "measured"]
    return _table_of(found, title, found["runs"], notes)


def _method(found: Found) -> str:
    """The method that was asked for, with its rank where it has one."""
    rank = f" of rank {found['settings']['r']}" if found["settings"]["method"] == "lora" else ""
    return f"{found['method'].replace('lora', 'LoRA', 1)}{rank}"


def _speeds(runs: list[Found]) -> list[str]:
    """How the speeds of these runs are known, each once."""
    return list(dict.fromkeys(run["speed_from"] for run in runs if run["speed_from"]))


def _methods(found: Found) -> Section:
    at, limit = found["settings"], format_bytes(found["machine"]["memory_bytes"])
    length = "" if found["data"] else f" of {format_count(at['seq_len'])} tokens"
    title = f"Peak memory of every method, MiB, of {limit}; {at['batch_size']} rows{length} a step"
    return _by_way(found, title, _peak, [LEGEND])


def _times(found: Found) -> Section:
    runs = [run for row in found["methods"] for run in row["runs"]]
    notes = [
        f"~: {found['speeds'][how]}" if how == "lora" else f"?: {found['speeds'][how]}"
        for how in _speeds(runs)
        if how != "measured"
    ]
    return _by_way(found, "A step of every method, seconds", _time, notes)


def _by_way(found: Found, title: str, cell: Callable[[Found], str], notes: list[str]) -> Section:
    """Methods below each other, ways beside each other; what a method cannot be is left empty."""
    ways = list(dict.fromkeys(way_of(run) for row in found["methods"] for run in row["runs"]))

    def cells(row: Found) -> tuple[str, ...]:
        own = {way_of(run): cell(run) for run in row["runs"]}
        return (row["name"], *(own.get(way, "-") for way in ways))

    remarks = [row["impossible"] or "" for row in found["methods"]]
    return Section(title, ("method", *ways), [cells(row) for row in found["methods"]], remarks, notes, marked=True)


def _shapes(found: Found) -> Section:
    shapes = found["shapes"]
    title = f"Peak memory of {_method(found)} in {way_of(shapes)}, MiB, by rows of a step and tokens of every row"
    heads = [format_count(length) for length in shapes["seq_lens"]]
    rows = [
        (format_count(batch), *map(_peak, runs))
        for batch, runs in zip(shapes["batch_sizes"], shapes["runs"], strict=True)
    ]
    return Section(title, ("rows", *heads), rows, marked=True)


def _peak(run: Found) -> str:
    figure = format_count(round(run["peak_bytes"] / MIB))
    if not run["fits"]:
        return f"{figure} x"
    if run["recompute"]:
        return f"{figure} r"
    return f"{figure} s" if run["micro_tokens"] < MICRO_TOKENS else figure


def _time(run: Found) -> str:
    if run["step_s"] is None:
        return "not known"
    known = {"measured": "", "lora": "~", "assumed": "?"}[run["speed_from"]]
    return f"{known}{run['step_s']:.3g}"


def _gpu(found: Found) -> Section:
    gpu = found["gpu"]
    title = f"On one {gpu['name']} by its datasheet, with {format_bytes(gpu['memory_bytes'])}"
    rates = ", ".join(f"{format_flop(rate)}/s in {name}" for name, rate in gpu["flop_per_s"].items())
    note = f"Nothing of this was measured: {rates}, of which {gpu['assumed_mfu']:.0%} is assumed to be reached"
    return _table_of(found, title, gpu["runs"], [note])


def _table_of(found: Found, title: str, runs: list[Found], notes: list[str]) -> Section:
    at = found["settings"]
    cells: dict[str, Callable[[Found], str]] = {
        "precision": way_of,
        "peak memory": lambda run: format_bytes(run["peak_bytes"]),
        "a step": lambda run: _or_dash(run["step_s"], format_seconds),
        "tokens/s": lambda run: _or_dash(run["tokens_per_s"], lambda value: format_count(round(value))),
    }
    if found["steps"]:
        cells["the whole run"] = lambda run: _or_dash(run["train_s"], format_seconds)
    if at["watts"]:
        cells["kWh"] = lambda run: _or_dash(run["energy_kwh"], lambda value: f"{value:.3f}")
    if at["price"]:
        cells["cost"] = lambda run: _or_dash(run["cost"], lambda value: f"{value:.3f}")
    rows = [tuple(cell(run) for cell in cells.values()) for run in runs]
    return Section(title, tuple(cells), rows, [_remark(run) for run in runs], notes)


def way_of(run: Found) -> str:
    """How a run computes and stores its base, as `bf16` or `bf16, keep`."""
    return way(run["precision"], run["base_storage"])


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def _remark(run: Found) -> str:
    if not run["fits"]:
        return "does not fit"
    return "with layers recomputed" if run["recompute"] else ""


# --- on a terminal, and on a page -----------------------------------------------------------------------------------


def print_plan(found: Found, out: Console) -> None:
    """Everything, on a terminal."""
    out.print(f"[bold]{found['model']}[/bold]: {headline(found)}", highlight=False, soft_wrap=True)
    for section in sections(found):
        _print_section(section, out)
    out.print("  Memory, part by part:", style="dim", highlight=False)
    for run in found["runs"]:
        parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in run["memory"].items())
        out.print(f"  {way_of(run)}: {parts}", style="dim", highlight=False, soft_wrap=True)
    out.print(f"\n{advice(found)}", highlight=False, markup=False, soft_wrap=True)


def _print_section(section: Section, out: Console) -> None:
    out.print(f"\n{section.title}", highlight=False, soft_wrap=True, style="bold")
    if section.rows:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for number, column in enumerate(section.columns):
            table.add_column(column, justify="right" if number else "left")
        table.add_column("")
        remarks = section.remarks or [""] * len(section.rows)
        for row, remark in zip(section.rows, remarks, strict=True):
            cells = [_styled(cell) for cell in row] if section.marked else row
            table.add_row(*cells, remark, style="dim" if remark and row[1] == "-" else "")
        out.print(table)
    for note in section.notes:
        out.print(f"  {note}", style="dim", highlight=False, soft_wrap=True)


def _styled(cell: str) -> str:
    """In the colour of its mark."""
    style, _ = MARKS.get(cell[-2:], ("", ""))
    return f"[{style}]{cell}[/{style}]" if style else cell


def page(found: Found) -> str:
    """Everything as one HTML page that needs nothing else, with a picture of each run's memory."""
    limit = found["machine"]["memory_bytes"]
    scale = max(limit, *(run["peak_bytes"] for run in found["runs"]))
    return render(
        PAGE, found=found, headline=headline(found), advice=advice(found), sections=sections(found), way_of=way_of,
        limit=limit, scale=scale, parts=list(found["runs"][0]["memory"]),
        marks={mark: kind for mark, (_, kind) in MARKS.items()},
    )  # fmt: skip
