"""What a search of the rank leaves, with figures of our choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lorafit.config import RankConfig
from lorafit.model.spec import ModelSpec
from lorafit.rank.conclude import conclude, finite
from lorafit.trials.rows import Rows

ROWS, TOKENS = 60, 4


def found(
    spec: ModelSpec, losses: dict[int, float], text: str, spread: float = 0.02, count: int = ROWS, wall_s: float = 6.0
) -> dict[str, Any]:
    """The content of rank.json.

    losses: of each rank, about. text: of the furthest row. spread: between rows. count: how many are held out.
    wall_s: of the last session of its run.
    """
    chance = np.random.default_rng(0)
    weights = {name: shape for name, shape in spec.tensors.items() if name.endswith("proj.weight")}
    energies = {name: sorted(chance.exponential(size=6).tolist(), reverse=True) for name in weights}
    look = {
        "precision": "fp32", "is_text": False, "seconds": 1.0, "supervised_tokens": 1000,
        "distance": {
            "data": 3.0, "own": 1.0, "reference": 2.5, "surprise": 2.0, "rows": ROWS,
            "furthest": [{"origin": f"{text}:7", "loss": 9.0, "tokens": 4, "text": text}],
        },
        "spectra": {
            name.removesuffix(".weight"): {"shape": shape, "energies": energies[name], "rest": 0.1}
            for name, shape in weights.items()
        },
    }  # fmt: skip
    curve = dict[int, dict[str, Any]]()
    for r, loss in losses.items():
        nats = TOKENS * (loss + spread * chance.standard_normal(count))
        likeliest = chance.integers(3, 5, count).tolist()
        curve[r] = {"nats": nats.tolist(), "tokens": [TOKENS] * count, "likeliest": likeliest}
    by_rank = [{"r": r, "steps": 2, "lr": 1e-3, "helped": True, "loss": finite(loss)} for r, loss in losses.items()]
    result = {
        "steps": 9,
        "load_s": 0.5,
        "train_s": 3.0,
        "eval_s": 0.5,
        "halving_s": 1.0,
        "precision": "fp32",
        "by_rank": by_rank,
    }
    result["settings"] = {"lr": 3.2e-3}
    result["race"] = {
        "lr": 3.2e-3,
        "rates": [1e-3, 3.2e-3],
        "losses": [[2.5, 2.3, 2.1], [2.5, 2.2, 1.9]],
        "ahead": [2.0, 1.8],
        "seconds": 0.8,
    }
    config = RankConfig(model="m", data="d.jsonl", output="out")
    rows = Rows(Path("rows"), {"train": 200, "valid": count}, ["there is something to know"], {})
    return conclude(config, spec, rows, look, {"result": result, "wall_s": wall_s}, curve, [2.0, 1.5, 1.2])
