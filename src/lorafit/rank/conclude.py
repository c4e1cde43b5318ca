"""What a search of the rank found: how far the rows are, the curve, where ranks belong, and what to type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from lorafit.config import RankConfig
from lorafit.model.spec import ModelSpec
from lorafit.plan.counts import lora_params
from lorafit.rank.advise import Advice, advise
from lorafit.rank.energies import Spectrum, allocate, held, mean_effective_rank
from lorafit.trials.rows import Rows

# Settings that a training has as the search had them, beside those that every command names.
AS_SEARCHED = (
    "format", "template", "loss_on", "seq_len", "batch_size", "max_steps", "seed", "precision", "threads",
    "trust_remote_code",
)  # fmt: skip
Found = dict[str, Any]
# By rank, of each held-out row: nats, tokens and likeliest, as RunDir.read_held_out gives them.
Curve = Mapping[int, Mapping[str, Sequence[Any]]]
# The directory of runs in that of a search, and the run in it that leaves an adapter of each rank.
TRIALS, ONE_RUN = "trials", "all-ranks"
# Settings of a training with ranks by layer, and what it is called among those that verify.
BY_LAYER, PATTERN = "by-layer.toml", "ranks by layer"
# What share of the held-out loss may fall in the last epoch of the one run. Above, a larger rank looks better than it
# is, as it learns faster: docs/log.md, "One training, then halved and trained on".
FALLING = 0.1
# Of a gradient's energy, what a rank is asked to hold to be called enough by the spectra alone.
HELD = 0.9


def conclude(
    config: RankConfig,
    spec: ModelSpec,
    rows: Rows,
    look: Mapping[str, Any],
    made: Found,
    curve: Curve,
    evaluations: Sequence[float],
) -> Found:
    """The content of rank.json. evaluations: the one run's held-out losses, epoch by epoch."""
    nats = {r: [math.nan if one is None else one for one in own["nats"]] for r, own in curve.items()}
    advice = advise(nats, next(iter(curve.values()))["tokens"])
    r = advice.r
    result = made["result"]
    found: Found = {
        "model": config.model,
        "data": config.data,
        "rows": rows.counts,
        "files": files_of(config, rows),
        "notes": [*rows.notes, *still_falling(evaluations)],
        "recommended_r": r,
        "recommended_alpha": 2 * r,
        "recommended_lr": result["settings"]["lr"],
        "targets": "all-linear",
        "reason": advice.reason,
        "curve": _curve(advice, curve, spec, look["is_text"]),
        "error_between_trainings": finite(advice.error),
        "distance": look["distance"],
        "capacity": _capacity(spec, r, look["supervised_tokens"]),
        "gradients": _gradients(look, list(nats), r),
        "run": {
            "lr": result["settings"]["lr"], "race": result.get("race"), "epochs": config.epochs,
            "steps": result["steps"], "stopped_early": result.get("stopped_early"), "wall_s": made["wall_s"],
            "train_s": result["train_s"], "halving_s": result["halving_s"],
            "precision": result["precision"], "by_rank": result["by_rank"],
            "evaluations": list(evaluations), "expected_s": look.get("expected"),
        },
        "seconds": {"look": look["seconds"], "train": max(made["wall_s"], _counted_s(result))},
        "training_s": _training_s(result),
        "verified": None,
    }  # fmt: skip
    return found | commands(config, found)


def _training_s(result: Found) -> float | None:
    """What the run took without a race and lower ranks; None of one that an earlier version made."""
    return result["load_s"] + result["train_s"] + result["eval_s"] if "eval_s" in result else None


def _counted_s(result: Found) -> float:
    """What the run itself counted: more than it took from its start to its end where it was resumed meanwhile."""
    race = (result.get("race") or {"seconds": 0.0})["seconds"]
    return (_training_s(result) or 0.0) + float(race) + float(result["halving_s"])


def still_falling(evaluations: Sequence[float]) -> list[str]:
    """A warning where the loss was far from its end when training stopped."""
    fell = 1 - evaluations[-1] / evaluations[-2] if len(evaluations) > 1 and evaluations[-2] > 0 else 0.0
    if not fell > FALLING:
        return []
    return [
        f"The held-out loss still fell by {fell:.0%} in the last epoch. At too low a rate or in too few steps a larger "
        "rank looks better than it is. --verify, with --resume also afterwards, trains this one and its neighbours by "
        "themselves, each at its own rate."
    ]


def files_of(config: RankConfig, rows: Rows) -> Found:
    """Where what was trained on and judged by is: as the user named it, or as the search split it."""
    if rows.as_given:
        return {"train": config.data, "valid": config.eval}
    return {side: rows.path(side) for side in ("train", "valid")}


def finite(number: float) -> float | None:
    """None for what JSON has no number for: a loss that was none, the error of a single row."""
    return number if math.isfinite(number) else None


def _curve(advice: Advice, curve: Curve, spec: ModelSpec, is_text: bool) -> list[Found]:
    """A line for each rank. right: share of rows whose reply is the greedy answer; None of running text."""
    return [
        {
            "r": one.r,
            "loss": finite(one.loss),
            "standard_error": finite(one.loss_se),
            "gap": finite(one.gap),
            "gap_standard_error": finite(one.se),
            "as_good": one.as_good,
            "right": None if is_text else float(np.mean(np.equal(curve[one.r]["likeliest"], curve[one.r]["tokens"]))),
            "params": lora_params(spec, one.r),
        }
        for one in advice.curve
    ]


def _capacity(spec: ModelSpec, r: int, supervised: int) -> Found:
    """How many numbers there are for each token that they learn from."""
    params = lora_params(spec, r)
    return {"params": params, "supervised_tokens": supervised, "params_per_token": params / max(1, supervised)}


def _gradients(look: Mapping[str, Any], ranks: Sequence[int], r: int) -> Found:
    """What the spectra say, of all weights and of each; rank_pattern: where as many parameters as of r belong."""
    spectra = spectra_of(look)
    total = sum(one.total for one in spectra.values()) or 1.0
    shared = {str(rank): held(spectra, rank) for rank in ranks}
    kinds: dict[str, float] = {}
    for name, spectrum in spectra.items():
        kind = name.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0.0) + spectrum.total / total
    return {
        "held": shared,
        "enough_r": next((rank for rank in ranks if shared[str(rank)] >= HELD), None),
        "effective_rank": mean_effective_rank(spectra),
        "by_kind": dict(sorted(kinds.items(), key=lambda one: -one[1])),
        "by_weight": {
            name: {"share": one.total / total, "effective_rank": one.effective_rank} for name, one in spectra.items()
        },
        "rank_pattern": allocate(spectra, r, least=1),
    }


def spectra_of(look: Mapping[str, Any]) -> dict[str, Spectrum]:
    """Of each weight, as a look has left them."""
    return {
        name: Spectrum(tuple(one["shape"]), np.array(one["energies"]), one["rest"])
        for name, one in look["spectra"].items()
    }


def with_verified(config: RankConfig, found: Found, verified: Found) -> Found:
    """With what trainings of their own came to: the rate at which the recommended rank did best is the one to use."""
    own = verified["trials"][str(found["recommended_r"])]
    lr = found["recommended_lr"] if own["loss"] is None else own["lr"]
    found = found | {"verified": verified, "recommended_lr": lr}
    return found | commands(config, found)


def by_layer(r: int, pattern: Mapping[str, int]) -> dict[str, Any]:
    """Settings of a training with ranks by layer, each with its alpha. Without a pattern: of rank r everywhere."""
    alphas = {layer: 2.0 * rank for layer, rank in pattern.items()}
    return {"r": r, "alpha": 2.0 * r, "rank_pattern": dict(pattern), "alpha_pattern": alphas}


def commands(config: RankConfig, found: Found) -> Found:
    """What to type: to train the advised rank, or ranks by layer (None where all are alike), or to take what is there.

    The second is trained from a file, BY_LAYER, whose content is `settings_by_layer`.
    """
    r, lr, pattern = found["recommended_r"], found["recommended_lr"], found["gradients"]["rank_pattern"]
    verified = ((found["verified"] or {}).get("trials") or {}).get(PATTERN)
    best = verified["lr"] if verified and verified["loss"] is not None else lr
    layers = f"-o runs/by-layer --config {quote(str(Path(config.output) / BY_LAYER))} --lr {best:g}"
    alike, own = len(set(pattern.values())) < 2, f"-o runs/r{r} --r {r} --alpha {found['recommended_alpha']:g}"
    return {
        "command": train_command(config, found["files"], f"{own} --lr {lr:g}"),
        "by_layer": None if alike else train_command(config, found["files"], layers),
        "settings_by_layer": None if alike else by_layer(r, pattern),
        "shrink": f"lorafit shrink {quote(str(Path(config.output) / TRIALS / ONE_RUN))} --r {r} -o adapters/r{r}",
    }


def train_command(config: RankConfig, rows: Mapping[str, str], what: str) -> str:
    """A training of the same rows in the same way. rows: `files_of`. what: the flags that differ, without defaults."""
    fields = RankConfig.model_fields
    given = {name: value for name in AS_SEARCHED if (value := getattr(config, name)) != fields[name].default}
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {quote(str(value))}")
        for name, value in given.items()
    ]
    renamed = quote(",".join(f"{old}={new}" for old, new in config.rename.items()))
    flags += [f"--rename {renamed}"] if config.rename else []
    judged = f"--epochs {config.epochs} --patience 1 --eval {quote(rows['valid'])}"
    return " ".join(["lorafit train", quote(config.model), quote(rows["train"]), what, judged, *flags])
