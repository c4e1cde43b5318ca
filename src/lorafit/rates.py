"""What was measured on this machine, kept in the user's cache: how fast products are, and how fast training is.

Kept for this processor, torch and number of threads. Nothing here imports torch, so that a plan can read it.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit import files, processor

# Of so many of the last runs the median counts: one that other work has slowed down says little of the next.
LAST_RUNS = 5


@dataclass(frozen=True)
class Rates:
    """What was measured. flop_per_s: of products, by precision. reached: FLOP/s of training, by `run_key`.

    number_s: seconds a step for each number that is trained, whatever the rows: clipping and the optimizer.
    """

    flop_per_s: Mapping[str, float] = field(default_factory=dict)
    reached: Mapping[str, float] = field(default_factory=dict)
    number_s: float = 0.0

    def reached_by(self, way: str, width: int) -> float | None:
        """FLOP/s of the model that was trained in this way and is nearest in width; None where there was none."""
        widths = [int(key.partition("/")[2]) for key in self.reached if key.startswith(f"{way}/")]
        nearest = min(widths, key=lambda known: abs(math.log(known / width)), default=None)
        return None if nearest is None else self.reached[run_key(way, nearest)]

    def mfu_of(self, precision: str, width: int) -> float | None:
        """The share of the rate of products that training reached, where both are known."""
        reached, rate = self.reached_by(precision, width), self.flop_per_s.get(precision)
        return reached / rate if reached and rate else None


def way(precision: str, storage: str, kind: str = "") -> str:
    """What the speed of training is kept under, beside the width: decoding weights takes time too.

    kind: of method, see `kind_of`.
    """
    return ", ".join(part for part in (precision, storage if storage != "auto" else "", kind) if part)


def kind_of(method: str, variant: str, layers: str | None) -> str:
    """Methods that are computed alike have one speed: LoRA's plain form, "", its others, and each other method.

    Full fine-tuning of some layers alone is a kind of its own: most of its products are of frozen weights.
    """
    if method == "full" and layers is not None:
        return "full:layers"
    if method != "lora":
        return method
    return "" if variant == "lora" else f"lora:{variant}"


def run_key(way: str, width: int) -> str:
    """What the speed of training depends on most. width: of the model's hidden states."""
    return f"{way}/{width}"


def read(threads: int) -> Rates:
    """What is known; nothing where nothing was measured, or the file is damaged."""
    known = _known(threads)
    number_s = _numbers({"number_s": known.get("number_s")}).get("number_s", 0.0)
    return Rates(_numbers(known.get("flop_per_s")), _numbers(known.get("reached")), number_s)


def keep(threads: int, rates: Rates) -> None:
    """Remember what was measured on purpose, in the place of earlier runs; what is known of other precisions stays."""
    runs = {key: speeds for key, speeds in _runs(threads).items() if key not in rates.reached}
    _write(threads, rates, runs)


def add_run(threads: int, key: str, flop_per_s: float) -> None:
    """Remember how fast a run was; see LAST_RUNS."""
    runs = _runs(threads)
    runs[key] = [*runs.get(key, []), flop_per_s][-LAST_RUNS:]
    _write(threads, Rates(reached={key: statistics.median(runs[key])}), runs)


def _write(threads: int, rates: Rates, runs: dict[str, list[float]]) -> None:
    before = read(threads)
    both: dict[str, Any] = {
        "flop_per_s": {**before.flop_per_s, **rates.flop_per_s},
        "reached": {**before.reached, **rates.reached},
        "number_s": rates.number_s or before.number_s,
        "runs": runs,
    }
    if both != _known(threads):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, {**_file(), _key(threads): both})


def _known(threads: int) -> dict[str, Any]:
    known = _file().get(_key(threads))
    return known if isinstance(known, dict) else {}


def _runs(threads: int) -> dict[str, list[float]]:
    """The speeds of the last runs, the newest last, by `run_key`."""
    known = _known(threads).get("runs")
    if not isinstance(known, dict):
        return {}
    return {
        key: [float(v) for v in own if isinstance(v, int | float)]
        for key, own in known.items()
        if isinstance(own, list)
    }


def _path() -> Path:
    return files.cache_dir() / "rates.json"


def _file() -> dict[str, Any]:
    try:
        known = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _key(threads: int) -> str:
    return f"{processor.name()}, torch {importlib.metadata.version('torch')}, {threads} threads"


def _numbers(value: Any) -> dict[str, float]:
    return (
        {name: float(v) for name, v in value.items() if isinstance(v, int | float)} if isinstance(value, dict) else {}
    )
