"""Small line charts as SVG that needs nothing else, and follows a page's light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW = 640, 180, 64, 16, 30, 40
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-size:13px;font-weight:600}.grid{stroke:#ddd}"
    ".line{fill:none;stroke:#3f74a3;stroke-width:2}.dot{fill:#3f74a3}.mark{stroke:#a23b00;stroke-dasharray:4 3}"
    ".paper{fill:#fcfcfa}@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#3a3a3a}.line{stroke:#6fa3cc}"
    ".dot{fill:#6fa3cc}.mark{stroke:#ff9d66}.paper{fill:#161616}}"
)
TICKS = 4


@dataclass(frozen=True)
class Panel:
    """One line. x, y: its points. level: a y that is drawn across, with its name, such as that of the base."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    level: tuple[float, str] | None = None


@dataclass(frozen=True)
class Mark:
    """A place on the x axis of all panels."""

    x: float
    name: str


@dataclass
class _Scale:
    """Values -> places."""

    low: float
    high: float
    begin: float
    end: float
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)


def chart(panels: Sequence[Panel], x_name: str, mark: Mark | None = None) -> str:
    """Panels one below the other, over one x axis. Values must be finite."""
    height = len(panels) * (HEIGHT + TOP) + BELOW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f'<style>{STYLE}</style><rect class="paper" width="{WIDTH}" height="{height}"/>',
    ]
    every = [x for panel in panels for x in panel.x]
    across = _scale(every, LEFT, WIDTH - RIGHT, room=0.0)
    for number, panel in enumerate(panels):
        parts += _panel(panel, across, number * (HEIGHT + TOP) + TOP, number == len(panels) - 1)
    bottom = height - BELOW
    if mark is not None:
        x = across(mark.x)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        side = "end" if x > WIDTH / 2 else "start"
        shift = -6 if side == "end" else 6
        parts.append(f'<text x="{x + shift:.1f}" y="{TOP + 14}" text-anchor="{side}">{escape(mark.name)}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{height - 6}" text-anchor="middle">{escape(x_name)}</text></svg>')
    return "\n".join(parts) + "\n"


def _panel(panel: Panel, across: _Scale, top: float, is_last: bool) -> list[str]:
    values = [*panel.y, *([panel.level[0]] if panel.level else [])]
    up = _scale(values, top + HEIGHT, top, room=0.08)
    parts = [f'<text class="title" x="{LEFT}" y="{top - 10}">{escape(panel.title)}</text>']
    for tick in up.ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in across.ticks if is_last else []:
        parts.append(f'<text x="{across(tick):.1f}" y="{top + HEIGHT + 18}" text-anchor="middle">{tick:g}</text>')
    if panel.level:
        y = up(panel.level[0])
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        name = escape(panel.level[1])
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">{name}</text>')
    points = [(across(x), up(y)) for x, y in zip(panel.x, panel.y, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for (x, y), value, at in zip(points, panel.y, panel.x, strict=True):
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{at:g}: {value:.4g}</title></circle>')
    return parts


def _scale(values: Sequence[float], begin: float, end: float, room: float) -> _Scale:
    """From a little below the least to a little above the largest, with round numbers between."""
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5
    low, high = low - room * (high - low), high + room * (high - low)
    step = 10 ** math.floor(math.log10((high - low) / TICKS))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= TICKS + 1)
    first = math.ceil(low / step - 1e-9)
    ticks = [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]
    return _Scale(low, high, begin, end, ticks)
