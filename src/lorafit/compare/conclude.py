"""What the records say: figures with intervals, who is tied with the best, and what to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorafit.compare.candidate import Candidate
from lorafit.compare.stats import LEVEL, Estimate, Scores, difference, estimate, pooled
from lorafit.compare.study import Study
from lorafit.trials.records import Record
from lorafit.units import format_bytes, format_count, format_seconds

# Costs nearer than this, as a share of the larger, are no reason to prefer one method.
ALIKE = 0.1
ONE_SEED = "one seed each: the intervals are those of other rows, and say nothing of other seeds, which may differ more"
SHARED = (
    "* times and latencies of trials that ran beside others, maybe on unlike machines: a small difference between "
    "methods may be theirs"
)
# What the loss is of, by task.
UNITS = {
    "generate": "nats a token",
    "classify": "nats a row",
    "tag": "nats a word",
    "regress": "squared deviations a row",
}
FLOOR_NAMES = {
    "most_frequent": "always telling what is most frequent",
    "mean": "always telling the mean",
    "untuned": "the untuned base",
    "few_shot": "the base with examples in its prompt",
}
Found = dict[str, Any]


def conclude(study: Study) -> Found:
    """The content of compare.json."""
    metric, why_metric = _metric(study)
    scores = _all_scores(study)
    methods = [_method(one, study, scores, metric) for one in study.candidates]
    floors = {name: _floor(own, scores[name], metric) for name, own in study.floors.items() if name in scores}
    verdict = Verdict(scores, [one.name for one in study.candidates if one.runs], metric)
    for method in methods:
        versus = verdict.gaps.get(method["name"])
        method["versus_best"] = None if versus is None else {key: _json(one) for key, one in versus.items()}
        method["tied_with_best"] = method["name"] in verdict.tied
        method["pareto"] = [cost for cost in COSTS if method in front(methods, cost)]
    found: Found = {
        "model": study.config.model,
        "data": study.config.data,
        "rows": study.rows.counts,
        "metric": metric,
        "metric_reason": why_metric,
        "level": LEVEL,
        "seeds": study.config.seeds,
        "steps": study.steps,
        "search_steps": study.search_steps,
        "more_steps": {one.name: study.times(one) for one in study.candidates if study.times(one) > 1},
        "unit": UNITS[study.labels["task"] if study.labels is not None else "generate"],
        "precision": study.precision,
        "budget_s": None if math.isinf(study.budget.total_s) else study.budget.total_s,
        "spent_s": study.budget.spent_s,
        "methods": methods,
        "floors": floors,
        "best": verdict.best,
        "tied": verdict.tied,
    }
    recommended, reason = _recommend(found, verdict, study)
    most = max((len(one.runs) for one in study.candidates), default=0)
    notes = [*study.notes, ONE_SEED] if most == 1 else list(study.notes)
    if study.labels and any(one.method == "head" for one in study.candidates):
        notes.append("head: forgetting is not measured, as it leaves the model alone")
    notes += [SHARED] if any(method["times_shared"] for method in methods) else []
    return found | {"recommended": recommended, "reason": reason, "notes": notes}


def _metric(study: Study) -> tuple[str, str]:
    """What decides, and why."""
    rights = [run["measured"]["sides"]["test"]["right"] for one in study.candidates for run in one.runs]
    task = study.labels["task"] if study.labels is not None else None
    if task == "regress":
        return "loss", "loss decides: the squared error, in deviations of the training rows' numbers"
    if task is not None and study.config.metric != "loss":
        what = "words whose tag" if task == "tag" else "rows whose label"
        return "accuracy", f"accuracy decides ({what} is told right), and the loss where that cannot tell"
    if not study.generate or any(right is None for right in rights):
        return "loss", "loss decides: replies are long or there are none, or it was asked for"
    if rights and not any(any(right) for right in rights):
        return "loss", "loss decides: no method answered a single row as expected"
    return "accuracy", "accuracy decides (answers that are the expected reply), and the loss where that cannot tell"


# --- figures ---------------------------------------------------------------------------------------------------------


def _test(record: Record) -> Record:
    """The test rows' scores in a record of the base or a run."""
    side: Record = record["sides"]["test"] if "sides" in record else record
    return side


def _scores(sides: Sequence[Record], metric: str) -> Scores:
    """Of the runs of one method. metric: accuracy or loss."""
    if metric == "accuracy":
        right = np.array([side["right"] for side in sides], dtype=np.float64).T
        return Scores(right, np.array(sides[0].get("of") or np.ones(len(right)), dtype=np.float64))
    return Scores(np.array([side["nats"] for side in sides]).T, np.array(sides[0]["tokens"], dtype=np.float64))


def _quality(scores: Mapping[str, Scores], metric: str) -> Found:
    """Figures by every measure that there is; the one that decides in front."""
    loss = _json(estimate(scores["loss"], 0.0))
    right = _json(estimate(scores["accuracy"], 0.0, 1.0)) if "accuracy" in scores else None
    chosen = right if metric == "accuracy" and right else loss
    return {"metric": metric, **chosen, "loss": loss, "accuracy": right}


def _all_scores(study: Study) -> dict[str, dict[str, Scores]]:
    """Of every method that was measured, and of the floors, by loss and, where answers were compared, by accuracy."""
    methods = {one.name: [_test(run["measured"]) for run in one.runs] for one in study.candidates if one.runs}
    floors = {name: [_test(record)] for name, record in study.floors.items() if "nats" in _test(record)}
    found: dict[str, dict[str, Scores]] = {name: {} for name in (methods | floors)}
    for measure in ("loss", "accuracy"):
        if measure == "accuracy" and any(
            side["right"] is None for some in (methods | floors).values() for side in some
        ):
            continue
        scores = pooled([_scores(sides, measure) for sides in methods.values()])
        for name, own in zip(methods, scores, strict=True):
            found[name][measure] = own
        for name, sides in floors.items():
            found[name][measure] = _scores(sides, measure)
    return found


def _json(one: Estimate) -> Found:
    """JSON has no infinity: None."""
    value, low, high = (number if math.isfinite(number) else None for number in (one.value, one.low, one.high))
    return {"value": value, "interval": [low, high]}


def _floor(record: Record, scores: Mapping[str, Scores], metric: str) -> Found:
    kept = record.get("keep")
    return {
        "quality": _quality(scores, metric),
        "shots": record.get("shots", 0),
        "keep_loss": _mean(kept) if kept else None,
        "latency_s": {name: s for name, s in record.get("latency_s", {}).items() if not name.startswith("base_")},
        "times_shared": record.get("together", False),
    }


def _mean(kept: Record) -> float:
    return float(sum(kept["nats"]) / sum(kept["tokens"]))


def _method(one: Candidate, study: Study, scores: Mapping[str, Mapping[str, Scores]], metric: str) -> Found:
    """All that is known of one; None where it was dropped before it was measured."""
    rates = [{"lr": r["lr"], "loss": r["loss"]} for r in sorted(one.rates.values(), key=lambda r: float(r["lr"]))]
    found: Found = {
        "name": one.name,
        "method": one.method,
        "variant": one.variant,
        "status": one.status,
        "dropped": one.out,
        "lr": one.lr,
        "rates": rates,
        "seeds": [run["seed"] for run in one.runs],
        "runs": [run["run"] for run in one.runs],
    }
    figures = (
        "quality",
        "macro_f1",
        "trainable_params",
        "file_bytes",
        "peak_rss_bytes",
        "train_s",
        "flop",
        "latency_s",
    )
    if not one.runs:
        return found | {"times_shared": False} | dict.fromkeys((*figures, "keep_loss", "forgetting"))
    results = [run["result"] for run in one.runs]
    kept, forgetting = _forgetting(one, study)
    return found | {
        "quality": _quality(scores[one.name], metric),
        "macro_f1": _macro_f1(one),
        "trainable_params": results[0]["trainable_params"],
        "file_bytes": _weight_bytes(study.directory / one.runs[0]["run"] / "adapter"),
        "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
        "train_s": float(np.median([result["train_s"] for result in results])),
        "flop": results[0]["flop"],
        "latency_s": one.runs[0]["measured"]["latency_s"],  # another seed is as fast
        "times_shared": any(record.get("together", False) for run in one.runs for record in (run, run["measured"])),
        "keep_loss": kept,
        "forgetting": forgetting,
    }


def _macro_f1(one: Candidate) -> float | None:
    """The mean over seeds, where rows have labels."""
    found = [_test(run["measured"]).get("macro_f1") for run in one.runs]
    return float(np.mean([value for value in found if value is not None])) if None not in found else None


def _forgetting(one: Candidate, study: Study) -> tuple[float | None, float | None]:
    """The loss on the text to be kept, and by what it has risen; None where the model writes none, or is left alone."""
    records = [run["measured"]["keep"] for run in one.runs]
    if any(record is None for record in records):
        return None, None
    kept = float(np.mean([_mean(record) for record in records]))
    return kept, kept - _mean(study.floors["untuned"]["keep"])


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


COSTS = ("trainable_params", "peak_rss_bytes", "train_s")


def front(methods: Sequence[Found], cost: str) -> list[Found]:
    """The methods than which no other is both as good and as cheap, by one cost: the Pareto front, cheapest first."""
    measured = [method for method in methods if method["quality"] and method["quality"]["value"] is not None]
    reached, found = -math.inf, []
    for method in sorted(measured, key=lambda method: (method[cost], -goodness(method["quality"]))):
        if goodness(method["quality"]) > reached:
            found.append(method)
            reached = goodness(method["quality"])
    return found


def goodness(quality: Mapping[str, Any]) -> float:
    """More is better."""
    return float(quality["value"] if quality["metric"] == "accuracy" else -quality["value"])


# --- who is the best, and who is tied with it -------------------------------------------------------------------------


class Verdict:
    """best: its name, None where nothing was measured. tied: it and those that cannot be told apart from it.

    gaps: of each other method what it differs by, {measure: Estimate}. scores: of each and of the floors by measure.
    """

    def __init__(self, scores: Mapping[str, Mapping[str, Scores]], names: Sequence[str], metric: str) -> None:
        """names: of the methods that were measured. metric: where it is the loss, that alone decides."""
        self.measures = ("accuracy", "loss") if metric == "accuracy" else ("loss",)
        self.scores, self.best, self.tied = scores, None, list[str]()
        self.gaps: dict[str, dict[str, Estimate]] = {}
        if not names:
            return
        self.best = self._best_of(names)
        self.gaps = {name: self.gap(name) for name in names if name != self.best}
        self.tied = [name for name in names if name == self.best or not is_worse(self.gaps[name])]

    def _best_of(self, names: Sequence[str]) -> str:
        """Of those that answer as many rows right as any, as far as can be told, the one with the least loss."""
        as_good = list(names)
        if "accuracy" in self.measures:
            top = max(names, key=lambda name: self.scores[name]["accuracy"].value)
            of_top = self.scores[top]["accuracy"]
            as_good = [name for name in names if difference(self.scores[name]["accuracy"], of_top).high >= 0]
        return min(as_good, key=lambda name: (not math.isfinite(self.loss_of(name)), self.loss_of(name)))

    def loss_of(self, name: str) -> float:
        """Its mean loss."""
        return self.scores[name]["loss"].value

    def gap(self, name: str) -> dict[str, Estimate]:
        """What it has more than the best, by each measure that decides."""
        assert self.best is not None
        return {key: difference(self.scores[name][key], self.scores[self.best][key]) for key in self.measures}


def is_worse(gap: Mapping[str, Estimate]) -> bool:
    """Whether a method is worse than the best: it answers fewer rows right, or, where that cannot tell, loses more."""
    accuracy, loss = gap.get("accuracy"), gap["loss"]
    if accuracy is not None and accuracy.excludes_zero:
        return accuracy.value < 0
    return not math.isfinite(loss.value) or loss.low > 0


# --- what to take -----------------------------------------------------------------------------------------------------


def _recommend(found: Found, verdict: Verdict, study: Study) -> tuple[str | None, str]:
    """A name, and the reason in two sentences."""
    if verdict.best is None:
        return None, "No method was measured on the test rows. Give more time with --budget, or fewer methods."
    floor = next((name for name in found["floors"] if not is_worse(verdict.gap(name))), None)
    by_name = {method["name"]: method for method in found["methods"]}
    seeds = len(by_name[verdict.best]["seeds"])
    where = f"on these {found['rows']['test']} test rows with {seeds} {'seed' if seeds == 1 else 'seeds'}"
    if floor is not None:
        first = f"No method can be told from {FLOOR_NAMES[floor]} {where} ({_said(found['floors'][floor]['quality'])})."
        return floor, f"{first} There is nothing to gain from training until more test rows or more data show it."
    best = by_name[verdict.best]
    if len(verdict.tied) == 1:
        first = f"{best['name']} is the best {where} ({_said(best['quality'])}), and {_others(verdict, seeds)}."
        return verdict.best, f"{first} I{_costs(best)[1:]}."
    tied = [by_name[name] for name in verdict.tied]
    chosen, because = _cheapest(tied)
    names = f"{', '.join(verdict.tied[:-1])} and {verdict.tied[-1]}"
    first = f"{names} cannot be told apart {where} ({_all_said(tied)})."
    return chosen["name"], f"{first} Of them {chosen['name']} {because}: {_costs(chosen)}."


def _others(verdict: Verdict, seeds: int) -> str:
    """What became of the other methods."""
    if not verdict.gaps:
        return "no other method was measured"
    return "every other method is worse" + (" beyond doubt" if seeds > 1 else ", as far as one run of each can tell")


def _cheapest(tied: Sequence[Found]) -> tuple[Found, str]:
    """By the time to train; where that is alike, by parameters."""
    fastest = min(method["train_s"] for method in tied)
    alike = [method for method in tied if method["train_s"] * (1 - ALIKE) <= fastest]
    chosen = min(alike, key=lambda method: (method["trainable_params"], method["train_s"]))
    return chosen, "trains fastest" if len(alike) == 1 else "trains as fast as any and has the fewest parameters"


def _costs(method: Found) -> str:
    return (
        f"it takes {format_seconds(method['train_s'])} and a peak of {format_bytes(method['peak_rss_bytes'])} for "
        f"{format_count(method['trainable_params'])} parameters, at a learning rate of {method['lr']:g}"
    )


def _all_said(methods: Sequence[Found]) -> str:
    """`accuracy 73.1% and 71.9%, loss 0.136 and 0.167`."""
    measures = ("accuracy", "loss") if methods[0]["quality"]["metric"] == "accuracy" else ("loss",)
    figures = {key: [_value(method["quality"][key], key) for method in methods] for key in measures}
    return ", ".join(f"{key} {', '.join(some[:-1])} and {some[-1]}" for key, some in figures.items())


def _value(one: Found, metric: str) -> str:
    return (
        "not finite"
        if one["value"] is None
        else f"{one['value']:.1%}"
        if metric == "accuracy"
        else f"{one['value']:.3g}"
    )


def _said(quality: Found) -> str:
    """`accuracy 91.2% (84.1 to 96.3), loss 0.081`."""
    told = f"{quality['metric']} {figure(quality, quality['metric'])}"
    return told if quality["metric"] == "loss" else f"{told}, loss {_value(quality['loss'], 'loss')}"


def figure(one: Found | None, metric: str, sign: str = "") -> str:
    """A figure with its interval: `91.2% (84.1 to 96.3)` or `0.0812 (0.06 to 0.12)`; - where there is none.

    sign: `+` for a difference.
    """
    if one is None:
        return "-"
    value, (low, high) = one["value"], one["interval"]
    if value is None or low is None:
        return "not finite"
    if metric == "accuracy":
        return f"{100 * value:{sign}.1f}% ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"
    return f"{value:{sign}.3g} ({low:{sign}.3g} to {high:{sign}.3g})"
