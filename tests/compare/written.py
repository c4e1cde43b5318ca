"""Records of trials as a comparison leaves them, with scores of our choice: what the decisions are then made from."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lorafit.compare.budget import Budget
from lorafit.compare.candidate import candidates
from lorafit.compare.study import Study
from lorafit.config import RATES, CompareConfig
from lorafit.trials.rows import Rows

ROWS, TOKENS = 60, 4
LATENCY = {"first_token": 0.02, "per_token": 0.01, "base_first_token": 0.01, "base_per_token": 0.01}


def side(loss: float, share_right: float | None, seed: int) -> dict[str, Any]:
    """Scores of every row: about this loss, about so many right."""
    chance = np.random.default_rng(seed)
    nats = TOKENS * (loss + 0.02 * chance.standard_normal(ROWS))
    right = None if share_right is None else (chance.permutation(ROWS) < share_right * ROWS).tolist()
    return {"nats": nats.tolist(), "tokens": [TOKENS] * ROWS, "right": right}


def measured(loss: float, share_right: float | None, seed: int, wall_s: float) -> dict[str, Any]:
    sides = {"valid": side(loss, None, seed + 100), "test": side(loss, share_right, seed)}
    return {"sides": sides, "keep": {"nats": [30.0 + loss], "tokens": [10]}, "latency_s": LATENCY, "wall_s": wall_s}


def write(directory: Path, name: str, record: dict[str, Any]) -> None:
    path = directory / "trials" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def study(
    directory: Path,
    losses: dict[str, float],
    *,
    right: dict[str, float] | None = None,
    seeds: int = 3,
    budget_s: float = math.inf,
    wall_s: float = 10.0,
    train_s: dict[str, float] | None = None,
    base: tuple[float, float] = (3.0, 0.0),
) -> Study:
    """A comparison all of whose trials lie on disk. losses, right: of each method. base: of both floors."""
    config = CompareConfig(
        model="m", data="d", output=str(directory), methods=list(losses), seeds=seeds, rate_trials=3, max_steps=30
    )
    for number, (name, loss) in enumerate(losses.items()):
        method, slug = name.partition(":")[0], name.replace(":", "-")
        took = (train_s or {}).get(name, 5.0)
        result = {
            "steps": 30, "train_s": took, "eval_loss": loss, "trainable_params": 1000 * (number + 1),
            "peak_rss_bytes": 1 << 30, "flop": 1e12,
        }  # fmt: skip
        for factor in (1.0, 0.25, 4.0):
            lr = float(f"{RATES[method] * factor:.4g}")
            own = {**result, "eval_loss": loss if factor == 1 else loss + 0.5}
            run = f"{slug}/lr-{lr:g}"
            write(directory, run, {"run": f"trials/{run}", "result": own, "refused": None, "wall_s": wall_s})
            write(directory, f"{run}.valid", {**side(loss, None, 50 + number), "wall_s": 1.0})
        for seed in range(seeds):
            run = f"{slug}/seed-{seed}"
            write(directory, run, {"run": f"trials/{run}", "result": result, "refused": None, "wall_s": wall_s})
            spread = loss + 0.001 * (seed - 1)
            scores = measured(spread, None if right is None else right[name], 10 * number + seed, wall_s)
            write(directory, f"{run}.measured", scores)
    write(directory, "base/untuned", measured(base[0], None if right is None else base[1], 991, wall_s))
    shots = {"shots": 4, **side(base[0], None if right is None else base[1], 992), "latency_s": LATENCY}
    write(directory, "base/few_shot", {**shots, "wall_s": wall_s})
    rows = Rows(directory / "rows", dict.fromkeys(("train", "search", "valid", "test"), ROWS), [], {})
    return Study(
        config=config,
        directory=directory,
        rows=rows,
        keep="keep.txt",
        precision="fp32",
        generate=right is not None,
        candidates=candidates(config.methods),
        budget=Budget(budget_s),
        console=Console(file=io.StringIO()),
    )


def run(one: Study) -> Study:
    """Through all its stages."""
    one.measure_floors()
    one.search()
    one.run_seeds()
    return one
