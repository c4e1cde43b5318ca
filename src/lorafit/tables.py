"""Tables for people: cells as text, the same on a terminal and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """columns: their heads; what stands in the first, and below no head, is a name or a remark, the rest figures."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    @property
    def shown(self) -> list[int]:
        """Numbers of the columns in which something stands."""
        return [n for n in range(len(self.columns)) if any(row[n] not in ("", "-") for row in self.rows)]


def print_table(table: Table, console: Console) -> None:
    """On a terminal, without the columns in which nothing stands."""
    drawn = Drawn(box=None, padding=(0, 2, 0, 0), title=table.title, title_justify="left", title_style="bold")
    for number in table.shown:
        is_figure = number > 0 and table.columns[number]
        drawn.add_column(table.columns[number], justify="right" if is_figure else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*(Text(row[number]) for number in table.shown))
    # Names of any length: rather a line that is broken than a figure that is cut off.
    console.width = max(console.width, drawn.__rich_measure__(console, console.options.update(width=1000)).maximum)
    console.print(drawn)
    console.print()
