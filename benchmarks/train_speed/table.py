"""Tables in Markdown out of results/*.json, or of the files that are named: `python table.py`."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from engines import ENGINES, WORKS

Run = dict[str, Any]
# Work -> which number of a run counts, and what it is called.
MEASURES = {
    "chat12": ("train_s", "training, s"),
    "free": ("train_s", "training, s"),
    "step512": ("later_step_s", "a step, s"),
    "last2": ("later_epoch_s", "an epoch after the first, s"),
}
BASELINE = "trl-default"


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]] or sorted((Path(__file__).parent / "results").glob("*.json"))
    for file in files:
        result = json.loads(file.read_text())
        print(heading(file.stem, result))
        for work in WORKS:
            if table := of_work(work, [run for run in result["runs"] if run["work"] == work]):
                print(f"\n{work}:\n\n{table}")
        print()


def heading(name: str, result: dict[str, Any]) -> str:
    machine, settings = result["machine"], result["settings"]
    return (
        f"### {name}\n\n{result['date']}, {result['commit'][:12]}; {machine['cpu']}, {machine['physical_cores']} cores "
        f"({', '.join(machine['flags'])}), {machine['memory_bytes'] / 1e9:.0f} GB; {settings['rows']} rows, "
        f"{settings['threads']} threads. Times: median (lowest to highest). A ratio above 1 is faster than the other."
    )


def of_work(work: str, runs: list[Run]) -> str:
    key, label = MEASURES[work]
    by_engine = {engine: [run for run in runs if run["engine"] == engine and run.get(key)] for engine in ENGINES}
    by_engine = {engine: own for engine, own in by_engine.items() if own}
    medians = {engine: statistics.median(run[key] for run in own) for engine, own in by_engine.items()}
    peers = [engine for engine in medians if ENGINES[engine].kind != "lorafit"]
    others = {"fastest peer": min(peers, key=lambda peer: medians[peer], default=BASELINE), "TRL default": BASELINE}
    columns = ["engine", label, *(f"vs {other}" for other in others), "whole process, s", "peak, GB", "train loss"]
    columns += ["eval loss per seed"] if WORKS[work].is_evaluated else []
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for engine, own in by_engine.items():
        ratios = [ratio(medians.get(other), medians[engine]) for other in others.values()]
        cells = [engine, spread([run[key] for run in own]), *ratios, *rest(own)]
        cells += [listed(own, "eval_loss")] if WORKS[work].is_evaluated else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if by_engine else ""


def rest(own: list[Run]) -> list[str]:
    peak = statistics.median(run["peak_rss_bytes"] for run in own) / 1e9
    return [f"{statistics.median(run['wall_s'] for run in own):.1f}", f"{peak:.2f}", listed(own, "train_loss")]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ratio(other: float | None, own: float) -> str:
    return f"{other / own:.2f}" if other else "-"


def listed(runs: list[Run], key: str) -> str:
    values = [run.get(key) for run in sorted(runs, key=lambda run: run["seed"])]
    return ", ".join("-" if value is None else f"{value:.3f}" for value in values)


if __name__ == "__main__":
    main()
