"""Small charts as SVG that needs nothing else and follows a page's light or dark colours: lines, points, maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW = 640, 180, 64, 16, 30, 40
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-size:13px;font-weight:600}.grid{stroke:#ddd}"
    ".line{fill:none;stroke:#3f74a3;stroke-width:2}.dot{fill:#3f74a3}.mark{stroke:#a23b00;stroke-dasharray:4 3}"
    ".paper{fill:#fcfcfa}.cell{fill:#3f74a3}@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#3a3a3a}.line{stroke:#6fa3cc}"
    ".dot,.cell{fill:#6fa3cc}.mark{stroke:#ff9d66}.paper{fill:#161616}}"
)
# Colours that can be told apart, on light and on dark paper.
LIGHT = ("#3f74a3", "#c98a2b", "#4f9a6b", "#a05195", "#c4574f", "#7d6b55", "#5b6470", "#1b998b")
DARK = ("#6fa3cc", "#e0ab57", "#77bd92", "#c283b8", "#e08078", "#b7a58c", "#9aa0aa", "#4cc9b9")
TICKS = 4
# A step's loss is that of its few rows: curves show the mean over about so many steps.
SMOOTHED_STEPS = 5
# A line of more points is drawn without a dot on each (FEW_DOTS: one of several lines); of more than MOST_POINTS the
# means of neighbours are drawn.
MOST_DOTS, FEW_DOTS, MOST_POINTS = 60, 12, 400
CELL_PX, FAINTEST = 22, 0.08  # of a map: height of a cell, and how strong its weakest colour is
LABEL_PX, LABEL_ROOM_PX = 7, 14  # width of a letter and height of a line, roughly


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


@dataclass(frozen=True)
class Point:
    """A named point with the interval of its y. in_front: whether it is on the Pareto front, which is drawn."""

    name: str
    x: float
    y: float
    low: float
    high: float
    in_front: bool


@dataclass(frozen=True)
class Curve:
    """One of several lines over the same axes."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass
class _Scale:
    """Values -> places."""

    low: float
    high: float
    begin: float
    end: float
    ticks: list[float] = field(default_factory=list)
    is_log: bool = False

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.is_log else value
        return self.begin + (at - self.low) / (self.high - self.low) * (self.end - self.begin)


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
    for (x, y), value, at in zip(points, panel.y, panel.x, strict=True) if len(points) <= MOST_DOTS else ():
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


# --- several things in one picture ------------------------------------------------------------------------------------


def scatter(
    title: str,
    points: Sequence[Point],
    x_name: str,
    x_text: Callable[[float], str],
    level: tuple[float, str] | None = None,
    ticks: Sequence[float] | None = None,
) -> str:
    """Named points over a logarithmic x axis, with the interval of each and a line through those in front.

    x_text: how a value of x is written. level: as of a Panel. ticks: of x, round numbers by default. Values must be
    finite, those of x above 0.
    """
    height = HEIGHT + 60
    bottom = TOP + height
    values = [y for point in points for y in (point.low, point.high)] + ([level[0]] if level else [])
    up, across = _scale(values, bottom, TOP, room=0.08), _log_scale([point.x for point in points])
    parts = [*_head(bottom + BELOW), f'<text class="title" x="{LEFT}" y="{TOP - 10}">{escape(title)}</text>']
    parts += _grid(up)
    for tick in across.ticks if ticks is None else ticks:
        x, told = across(tick), escape(x_text(tick))
        side = "end" if x + len(told) * LABEL_PX / 2 > WIDTH else "middle"  # at the edge it would be cut off
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="{side}">{told}</text>')
    if level:
        y = up(level[0])
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y - 5:.1f}" text-anchor="end">{escape(level[1])}</text>')
    front = sorted((across(point.x), up(point.y)) for point in points if point.in_front)
    if len(front) > 1:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
        parts.append(f'<polyline class="front" points="{line}"/>')
    parts += _points(points, across, up, x_text)
    parts.append(f'<text x="{WIDTH / 2}" y="{bottom + BELOW - 6}" text-anchor="middle">{escape(x_name)}</text></svg>')
    return "\n".join(parts) + "\n"


def _points(points: Sequence[Point], across: _Scale, up: _Scale, x_text: Callable[[float], str]) -> list[str]:
    parts, taken = list[str](), list[tuple[float, float, float]]()
    for number, point in enumerate(points):
        x, y, color = across(point.x), up(point.y), f"c{number % len(LIGHT)}"
        told = f"<title>{escape(point.name)}: {escape(x_text(point.x))}, {point.y:.4g}</title>"
        bar = f'x1="{x:.1f}" x2="{x:.1f}" y1="{up(point.low):.1f}" y2="{up(point.high):.1f}"'
        parts.append(f'<line class="bar {color}" {bar}/>')
        parts.append(f'<circle class="point {color}" cx="{x:.1f}" cy="{y:.1f}" r="5">{told}</circle>')
        begin, end, side = _beside(x, len(point.name) * LABEL_PX)
        at = y - 5
        while any(
            begin < other_end and other < end and abs(at - line) < LABEL_ROOM_PX for other, other_end, line in taken
        ):
            at += LABEL_ROOM_PX / 2
        taken.append((begin, end, at))
        label = begin if side == "start" else end
        parts.append(f'<text x="{label:.1f}" y="{at:.1f}" text-anchor="{side}">{escape(point.name)}</text>')
    return parts


def _beside(x: float, width: float) -> tuple[float, float, str]:
    """Where a label of this width begins and ends: right of x, or left of it where there is no room."""
    if x + 10 + width < WIDTH - RIGHT:
        return x + 10, x + 10 + width, "start"
    return x - 10 - width, x - 10, "end"


def curves(title: str, lines: Sequence[Curve], x_name: str) -> str:
    """Lines over the same axes, with their names below. Values must be finite."""
    bottom = TOP + HEIGHT + 60
    across = _scale([x for line in lines for x in line.x], LEFT, WIDTH - RIGHT, room=0.0)
    up = _scale([y for line in lines for y in line.y], bottom, TOP, room=0.08)
    rows, row, x = list[str](), 0, float(LEFT)
    parts = []
    for number, line in enumerate(lines):
        color, width = f"c{number % len(LIGHT)}", len(line.name) * LABEL_PX + 40
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
        parts.append(f'<polyline class="curve {color}" points="{points}"><title>{escape(line.name)}</title></polyline>')
        if len(line.x) <= FEW_DOTS:  # a single one would not be seen
            for at, value in zip(line.x, line.y, strict=True):
                told = f"<title>{escape(line.name)}, {at:g}: {value:.4g}</title>"
                parts.append(
                    f'<circle class="point {color}" cx="{across(at):.1f}" cy="{up(value):.1f}" r="3">{told}</circle>'
                )
        if x + width > WIDTH - RIGHT:
            row, x = row + 1, float(LEFT)
        y = bottom + BELOW + 14 + row * LABEL_ROOM_PX * 1.3
        rows.append(f'<line class="curve {color}" x1="{x:.1f}" x2="{x + 18:.1f}" y1="{y - 4:.1f}" y2="{y - 4:.1f}"/>')
        rows.append(f'<text x="{x + 24:.1f}" y="{y:.1f}">{escape(line.name)}</text>')
        x += width
    head = _head(round(bottom + BELOW + 24 + row * LABEL_ROOM_PX * 1.3))
    head += [f'<text class="title" x="{LEFT}" y="{TOP - 10}">{escape(title)}</text>', *_grid(up)]
    for tick in across.ticks:
        head.append(f'<text x="{across(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    below = f'<text x="{WIDTH / 2}" y="{bottom + BELOW - 6}" text-anchor="middle">{escape(x_name)}</text>'
    return "\n".join([*head, *parts, below, *rows, "</svg>"]) + "\n"


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and those before it, older ones counting less: over about SMOOTHED_STEPS of them."""
    fade, total, weight, found = 1 - 1 / SMOOTHED_STEPS, 0.0, 0.0, []
    for value in values:
        total, weight = fade * total + value, fade * weight + 1
        found.append(total / weight)
    return found


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """The same line with at most MOST_POINTS points: means of neighbours, as many in each."""
    size = math.ceil(len(x) / MOST_POINTS) or 1
    groups = [slice(at, at + size) for at in range(0, len(x), size)]
    return [sum(x[one]) / len(x[one]) for one in groups], [sum(y[one]) / len(y[one]) for one in groups]


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[int],
    values: Mapping[tuple[str, int], float],
    x_name: str,
) -> str:
    """A map of values: the more, the stronger the colour, from the least to the largest of them.

    values: by row and column; a place without one stays empty. They must be finite.
    """
    left = min(max(map(len, rows)) * LABEL_PX + 16, WIDTH // 3)
    width, low, high = (WIDTH - left - RIGHT) / len(columns), min(values.values()), max(values.values())
    bottom = TOP + len(rows) * CELL_PX
    parts = [*_head(bottom + 64), f'<text class="title" x="{left}" y="{TOP - 10}">{escape(title)}</text>']
    every = math.ceil(32 / width)
    for number, column in enumerate(columns):
        if number % every == 0:
            x = left + (number + 0.5) * width
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{column}</text>')
    for line, row in enumerate(rows):
        y = TOP + line * CELL_PX
        parts.append(f'<text x="{left - 8}" y="{y + CELL_PX / 2 + 4:.1f}" text-anchor="end">{escape(row)}</text>')
        for number, column in enumerate(columns):
            if (row, column) in values:
                value = values[row, column]
                told = f"<title>{escape(row)}, {escape(x_name)} {column}: {value:.4g}</title>"
                parts.append(_cell(left + number * width, y, width, _strength(value, low, high), told))
    parts.append(f'<text x="{left}" y="{bottom + 36}">{escape(x_name)}</text>')
    parts += _key(left, bottom + 44, low, high)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _strength(value: float, low: float, high: float) -> float:
    return FAINTEST + (1 - FAINTEST) * ((value - low) / (high - low) if high > low else 0.5)


def _cell(x: float, y: float, width: float, strength: float, told: str = "") -> str:
    box = f'x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{width - 1:.1f}" height="{CELL_PX - 1}"'
    return f'<rect class="cell" {box} fill-opacity="{strength:.3f}">{told}</rect>'


def _key(left: float, y: float, low: float, high: float) -> list[str]:
    """What the colours mean."""
    cells = [_cell(left + 60 + 24 * n, y, 24, _strength(n, 0, 4)) for n in range(5)]
    text = f'<text x="{left + 52}" y="{y + 15}" text-anchor="end">{low:.3g}</text>'
    return [text, *cells, f'<text x="{left + 188}" y="{y + 15}">{high:.3g}</text>']


def _head(height: int) -> list[str]:
    shared = (
        ".bar{stroke-width:2;opacity:.6}.curve{fill:none;stroke-width:2}.front{fill:none;stroke:#999;stroke-width:1}"
    )

    def of(colors: Sequence[str]) -> str:
        return "".join(f".c{n}{{stroke:{color}}}.point.c{n}{{fill:{color}}}" for n, color in enumerate(colors))

    style = f"{STYLE}{shared}{of(LIGHT)}@media(prefers-color-scheme:dark){{{of(DARK)}}}"
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f'<style>{style}</style><rect class="paper" width="{WIDTH}" height="{height}"/>',
    ]


def _grid(up: _Scale) -> list[str]:
    parts = []
    for tick in up.ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    return parts


def _log_scale(values: Sequence[float]) -> _Scale:
    """Across, from a little below the least to a little above the largest: ticks at powers of ten, or closer ones."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = 0.08 * (high - low) + 0.05
    low, high = low - room, high + room
    powers = range(math.floor(low), math.ceil(high) + 1)
    if high - low < 1:
        ticks = _scale([10**low, 10**high], LEFT, WIDTH - RIGHT, room=0.0).ticks
    else:
        factors = (1,) if high - low > 3 else (1, 2, 5)
        ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in ticks if tick > 0 and low <= math.log10(tick) <= high]
    return _Scale(low, high, LEFT, WIDTH - RIGHT, inside[:: math.ceil(len(inside) / 7)], is_log=True)
