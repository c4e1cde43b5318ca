"""What the advice has cost: the recommended rank, its neighbours, and ranks by layer, each trained by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorafit.rank.advise import advise
from lorafit.rank.conclude import PATTERN, by_layer, finite

if TYPE_CHECKING:
    from lorafit.rank.line import Trials

Found = dict[str, Any]
# Rates that are tried for each, as multiples of that of the one run; further out where the best is at the edge.
FACTORS = (1.0, 0.5, 2.0)
FURTHEST = 4.0


def verify(trials: Trials, found: Mapping[str, Any]) -> Found:
    """Of each of these the best of a few rates, and the regret of the advice: its loss over that of the best.

    Ranks are judged row by row, on the base as its files have it; a rate by what the run itself computes with.
    as_good_r: the smallest rank that is as good as the best by the rule of the advice.
    """
    made = {name: _best(trials, name, found["run"]["lr"], *what) for name, what in candidates(found).items()}
    known = {name: one for name, one in made.items() if one["loss"] is not None}
    own = made[str(found["recommended_r"])]
    uniform = {int(name): one for name, one in known.items() if name != PATTERN}
    if own["loss"] is None:
        return {"trials": made, "regret": None, "best_r": None, "as_good_r": None}
    rows = {r: trials.losses(one["run"])["nats"] for r, one in uniform.items()}
    tokens = trials.losses(own["run"])["tokens"]
    judged = advise(rows, tokens)
    best = next(one for one in judged.curve if one.gap == 0)
    advised = next(one for one in judged.curve if one.r == found["recommended_r"])
    if not math.isfinite(advised.gap):
        return {"trials": made, "regret": None, "best_r": best.r, "as_good_r": judged.r}
    return {
        "trials": made,
        "best_r": best.r,
        "as_good_r": judged.r,
        "regret": advised.gap / best.loss if best.loss else 0.0,
        "gap": advised.gap,
        "gap_standard_error": finite(advised.se),
    }


def candidates(found: Mapping[str, Any]) -> dict[str, tuple[int, dict[str, int]]]:
    """What is trained, by name: a rank, and those of single layers where these differ."""
    ranks = [one["r"] for one in found["curve"]]
    at = ranks.index(found["recommended_r"])
    own: dict[str, tuple[int, dict[str, int]]] = {str(r): (r, {}) for r in ranks[max(0, at - 1) : at + 2]}
    if found["settings_by_layer"]:
        own[PATTERN] = (found["recommended_r"], found["settings_by_layer"]["rank_pattern"])
    return own


def _best(trials: Trials, name: str, begin: float, r: int, pattern: Mapping[str, int]) -> Found:
    """The run of the best rate, from `begin` outwards. pattern: ranks of single layers, each with its alpha."""
    tried = dict[float, Found]()
    while (factor := _next({key: one["loss"] for key, one in tried.items()})) is not None:
        lr = float(f"{begin * factor:.2g}")
        run = f"{'pattern' if pattern else 'r'}-{r}/lr-{lr:g}"
        settings = by_layer(r, pattern) | {"lr": lr}
        made = trials.train(run, f"{name if pattern else f'rank {r}'}, rate {lr:g}", settings)["result"]
        tried[factor] = {"run": run, "lr": lr, "loss": made["eval_loss"] if made else None}
    known = [one for one in tried.values() if one["loss"] is not None]
    best = min(known, key=lambda one: one["loss"], default=tried[1.0])
    return best | {"tried": [{"lr": one["lr"], "loss": one["loss"]} for one in tried.values()]}


def _next(losses: Mapping[float, float | None]) -> float | None:
    """Which multiple of the rate to try next; None when the search is over."""
    for factor in FACTORS:
        if factor not in losses:
            return factor
    known = {factor: loss for factor, loss in losses.items() if loss is not None}
    if not known:
        return None
    best = min(known, key=lambda factor: known[factor])
    outer = best * 2 if best == max(losses) else best / 2 if best == min(losses) else best
    return outer if outer not in losses and 1 / FURTHEST <= outer <= FURTHEST else None
