"""A picture of what table.py tells: loss by rank of each set, of ranks alone and of the one run."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

COLUMNS, PANEL_INCHES = 3, (3.4, 2.5)
ALONE, ONE_RUN = "#c98a2b", "#3f74a3"
# (name, losses of ranks alone, their errors, losses of the one run or none, the advised rank or none)
Panel = tuple[str, dict[int, float], dict[int, float], dict[int, float], int | None]


def draw(panels: list[Panel], ranks: list[int], file: Path) -> None:
    """One picture of all sets. The same panels give the same bytes."""
    rows = math.ceil(len(panels) / COLUMNS)
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lorafit", "font.size": 9})
    size = PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * rows
    figure, every = plt.subplots(rows, COLUMNS, figsize=size, layout="constrained", squeeze=False)
    for axes, panel in zip(every.flat, panels, strict=False):
        _panel(axes, panel, ranks)
    for axes in every.flat[len(panels) :]:
        axes.set_axis_off()
    figure.legend(*every[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _panel(axes: Axes, panel: Panel, ranks: list[int]) -> None:
    name, alone, error, one_run, advised = panel
    axes.set_title(name, loc="left", fontweight="bold")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [f"{r}" for r in ranks])
    axes.minorticks_off()
    axes.set_xlim(ranks[0] / 1.4, ranks[-1] * 1.4)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    line = sorted(one_run)
    axes.plot(line, [one_run[r] for r in line], color=ONE_RUN, marker=".", label="ranks of one run")
    if advised is not None:
        axes.plot(
            [advised], [one_run[advised]], "o", color=ONE_RUN, markersize=11, fillstyle="none", label="advised rank"
        )
    known = sorted(alone)
    axes.errorbar(
        known, [alone[r] for r in known], [error[r] for r in known],
        fmt="s", color=ALONE, markersize=5, capsize=2, linewidth=1,
        label="a rank alone at its best rate, ± the error of its difference from the best",
    )  # fmt: skip
