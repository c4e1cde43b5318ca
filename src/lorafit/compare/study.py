"""The trials of a comparison: floors, a search of the rate, rounds of seeds; what is clearly worse is dropped in time.

Everything that was run leaves a record, a small JSON file, and is never run again: a comparison that was killed goes
through the same decisions up to where it was.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lorafit.compare.budget import Budget, Costs
from lorafit.compare.candidate import Candidate
from lorafit.compare.search import next_factor, sure_factors
from lorafit.compare.stats import Scores, difference, pooled
from lorafit.compare.together import together
from lorafit.config import EPOCHS, CompareConfig, usual_rate
from lorafit.rundir import RunDir
from lorafit.trials import child, records
from lorafit.trials.records import Record, Work
from lorafit.trials.rows import Rows
from lorafit.trials.watching import watched
from lorafit.units import format_seconds

LEAST_SEARCH_STEPS = 20
# What children compute beside trainings.
MEASURE = "lorafit.compare.measure"
# What a comparison says of all its runs.
SHARED = (
    "model", "r", "epochs", "batch_size", "loss_on", "precision", "threads", "trust_remote_code", "format", "rename",
    "template", "seq_len", "task",
)  # fmt: skip


@dataclass
class Study:
    """A comparison under way. precision: what all are measured in. generate: whether answers are compared.

    labels: what is known of rows with labels, as `labelled.look` says; None where the model is to write text. notes:
    what was left out and why, for the report. call: runs a trial, here or elsewhere. slots: how many trials run at the
    same time.
    """

    config: CompareConfig
    directory: Path
    rows: Rows
    keep: str
    precision: str
    generate: bool
    candidates: list[Candidate]
    budget: Budget
    console: Console
    costs: Costs = field(default_factory=Costs)
    notes: list[str] = field(default_factory=list)
    floors: dict[str, Record] = field(default_factory=dict)
    labels: dict[str, Any] | None = None
    call: Callable[[str, tuple[Any, ...], Path], Record] = field(default=child.call)
    slots: int = 1

    @property
    def active(self) -> list[Candidate]:
        """Those that are still in."""
        return [one for one in self.candidates if one.out is None]

    @property
    def steps(self) -> int:
        """Optimizer steps of a run of most methods."""
        per_epoch = math.ceil(self.rows.counts["train"] / self.config.batch_size)
        return self.config.max_steps or per_epoch * self.config.epochs

    @property
    def search_steps(self) -> int:
        """Of a trial of a rate of most methods."""
        return min(self.steps, self.config.search_steps or max(LEAST_SEARCH_STEPS, self.steps // 2))

    def times(self, one: Candidate) -> int:
        """How many times as many steps a method gets: a head alone, whose features are computed once, its usual."""
        return 1 if self.config.max_steps else EPOCHS.get(one.method, 1)

    # --- the floors -----------------------------------------------------------------------------------------------

    def measure_floors(self) -> None:
        """The base as it is, and with examples in its prompt."""
        works = self._floors_of_text() if self.labels is None else self._floors_of_labels(self.labels)
        self._ahead([partial(self._record, f"base/{name}", work) for name, work in works.items()])
        self.floors |= {name: self._once(f"base/{name}", work) for name, work in works.items()}
        if "kept" in works:
            self.floors["untuned"] = {"keep": self.floors.pop("kept")["keep"]}
        elif "untuned" in works:
            self.costs.measured("the base", self.floors["untuned"]["wall_s"])
        if "few_shot" in works:
            self._tell_shots(self.floors["few_shot"])

    def _floors_of_text(self) -> dict[str, Work]:
        untuned = partial(self._measure, self.config.model, ("test",), True)
        return {"untuned": untuned, "few_shot": partial(self._few_shot, self.generate)}

    def _floors_of_labels(self, labels: Mapping[str, Any]) -> dict[str, Work]:
        """The same for every row; of a base that writes text also what it says when it is shown examples."""
        arguments = (self.config, self.rows.path("train"), self.rows.path("test"))
        works: dict[str, Work] = {
            "mean" if labels["task"] == "regress" else "most_frequent": partial(
                self.call, f"{MEASURE}:constant", arguments
            )
        }
        self.notes.append("no untuned base: without a head, or examples, it was never told of the labels")
        if not labels["writes_text"]:
            self.notes.append("no few-shot base: an encoder writes no text; so forgetting is not measured either")
            return works
        works["kept"] = partial(self._measure, self.config.model, (), False)
        if labels["several"] or labels["task"] != "classify":
            self.notes.append("no few-shot base: it is asked for one label of a row alone")
        else:
            works["few_shot"] = partial(self._few_shot, True)
        return works

    def _few_shot(self, generate: bool, log: Path) -> Record:
        arguments = (self.config, self.precision, self.rows.path("train"), self.rows.path("test"), generate)
        try:
            return self.call(f"{MEASURE}:few_shot", arguments, log)
        except child.Refused as refused:
            return {"shots": 0} | _refusal(refused)

    def _tell_shots(self, found: Record) -> None:
        shots = found["shots"]
        if not shots:
            why = found.get("refused", "the rows have no replies, or no example fits into the context")
            self.notes.append(f"no few-shot base: {why}")
        elif shots < self.config.shots:
            self.notes.append(f"few-shot base with {shots} examples, as no more fit")

    # --- the search of the rate -----------------------------------------------------------------------------------

    def search(self) -> None:
        """A few rates for each method, by turns, as long as there is time; the best of each is chosen."""
        waiting, missed = list(self.active), dict[str, int]()
        while waiting:
            self._ahead_of_rates(waiting)
            for one in list(waiting):
                factor = next_factor(one.losses(), self.config.rate_trials)
                if factor is None:
                    waiting.remove(one)
                elif one.rates and not self.budget.has(self._of_search(one) + self._of_round()):
                    waiting.remove(one)
                    missed[one.name] = len(one.rates)
                elif not one.rates and self.budget.spent_s > 0 and not self.budget.has(self._of_search(one)):
                    waiting.remove(one)
                    self._out(one, "not tried", "the time was used up before its first trial")
                else:
                    one.rates[factor] = self._try_rate(one, factor)
        if missed:
            told = ", ".join(f"{name} {count}" for name, count in missed.items())
            self.notes.append(f"the time budget left room for fewer learning rates: {told}")
        for one in self.active:
            self._choose(one)

    def _of_search(self, one: Candidate) -> float:
        return self.costs.of_training(one.name, self.search_steps * self.times(one))

    def _of_run(self, one: Candidate) -> float:
        return self.costs.of_run(one.name, self.steps * self.times(one))

    def _of_round(self) -> float:
        """A round of seeds for all that are still in."""
        return sum(self._of_run(one) for one in self.active)

    def _choose(self, one: Candidate) -> None:
        losses = one.losses()
        best = min(losses, key=lambda factor: losses[factor])
        if math.isinf(losses[best]):
            self._out(one, "failed", str(one.rates[best]["refused"]))
            return
        one.lr = one.rates[best]["lr"]
        tried = sorted(losses)
        if best in (tried[0], tried[-1]) and len(tried) > 1:
            where = "lowest" if best == tried[0] else "highest"
            self.notes.append(f"{one.name}: the best learning rate is the {where} that was tried")
        for factor, record in one.rates.items():
            if factor != best:  # its record is all that is asked for later
                shutil.rmtree(self.directory / record["run"], ignore_errors=True)

    def _ahead_of_rates(self, waiting: list[Candidate]) -> None:
        """What will be tried whatever the others find: the first rates of a method at once, or its next one."""
        if math.isinf(self.budget.total_s):
            tried = [(one, factor) for one in waiting for factor in sure_factors(one.losses(), self.config.rate_trials)]
        elif self.budget.has(sum(map(self._of_search, waiting)) + self._of_round()):
            firsts = ((one, next_factor(one.losses(), self.config.rate_trials)) for one in waiting)
            tried = [(one, factor) for one, factor in firsts if factor is not None]
        else:
            return
        self._ahead([partial(self._record, *self._rate_trial(one, factor)) for one, factor in tried])

    def _rate_trial(self, one: Candidate, factor: float) -> tuple[str, Work]:
        lr = self._rate(one, factor)
        steps = self.search_steps * self.times(one)
        settings: dict[str, Any] = {"lr": lr, "seed": self.config.seed, "max_steps": steps}
        # Once, at the end, as a whole run ends: the best of several epochs would flatter rates that are too high.
        settings |= {"eval": self.rows.path("search"), "eval_every": steps}
        return self._trial(one, f"{one.slug}/lr-{lr:g}", settings)

    def _rate(self, one: Candidate, factor: float) -> float:
        is_encoder = self.labels is not None and not self.labels["writes_text"]
        return float(f"{usual_rate(one.method, one.variant, is_encoder) * factor:.4g}")

    def _try_rate(self, one: Candidate, factor: float) -> Record:
        lr, record = self._rate(one, factor), self._train(one, *self._rate_trial(one, factor))
        result, refused = record["result"], record["refused"] or "the loss is not a finite number"
        record |= {"lr": lr, "factor": factor, "loss": result["eval_loss"] if result else None, "refused": refused}
        shown = f"loss {record['loss']:.4f}" if record["loss"] is not None else f"failed: {refused}"
        steps = self.search_steps * self.times(one)
        self._say(f"{one.name}: lr {lr:g}, {steps} steps: {shown} ({format_seconds(record['wall_s'])})")
        return record

    # --- rounds of seeds --------------------------------------------------------------------------------------------

    def run_seeds(self) -> None:
        """Whole runs, a round of all methods for each seed, so that all have as many."""
        for number in range(self.config.seeds):
            self._make_room(self.config.seeds - number)
            if number and not self.budget.has(self._of_round()):
                count = f"{number} of {self.config.seeds} seeds"
                self.notes.append(f"the time budget left room for {count}")
                return
            self._ahead_of_seeds(number)
            for one in sorted(self.active, key=lambda one: min(one.losses().values())):
                if not number and not self.budget.has(self._of_run(one)) and self._has_any_run():
                    self._out(one, "dropped", "the time was used up before its first whole run; it is not known worse")
                else:
                    self._run(one, number)

    def _has_any_run(self) -> bool:
        return any(one.runs for one in self.candidates)

    def _ahead_of_seeds(self, number: int) -> None:
        """The round of this number, or without a budget all rounds at once."""
        if math.isinf(self.budget.total_s):
            numbers = list(range(self.config.seeds)) if number == 0 else []
        else:
            numbers = [number] if self.budget.has(self._of_round()) else []
        self._ahead([partial(self._run_and_measure, one, n) for n in numbers for one in self.active])

    def _run_and_measure(self, one: Candidate, number: int) -> None:
        record = self._record(*self._seed_trial(one, number))
        if record["result"] is not None:
            self._record(*self._measuring(record, number))

    def _seed_trial(self, one: Candidate, number: int) -> tuple[str, Work]:
        seed = self.config.seed + number
        settings = {"lr": one.lr, "seed": seed, "max_steps": self.config.max_steps}
        return self._trial(one, f"{one.slug}/seed-{seed}", settings)

    def _measuring(self, record: Record, number: int) -> tuple[str, Work]:
        target = str(self.directory / record["run"])
        name = f"{record['run'].removeprefix('trials/')}.measured"
        return name, lambda log: self._measure(target, ("valid", "test"), number == 0, log)

    def _run(self, one: Candidate, number: int) -> None:
        seed = self.config.seed + number
        record = self._train(one, *self._seed_trial(one, number))
        if record["result"] is None:
            self._out(one, "failed", str(record["refused"]))
            return
        try:
            measured = self._once(*self._measuring(record, number))
        except child.Refused as refused:
            self._out(one, "failed", f"seed {seed} cannot be measured: {refused}")
            return
        self.costs.measured(one.name, measured["wall_s"])
        one.runs.append({**record, "seed": seed, "measured": measured})
        test = measured["sides"]["test"]
        loss = sum(test["nats"]) / sum(test["tokens"])
        of = sum(test.get("of") or [1] * len(test["nats"]))
        right = "" if test["right"] is None else f", {sum(test['right'])} of {of} right"
        took = format_seconds(record["wall_s"] + measured["wall_s"])
        self._say(f"{one.name}: seed {seed}, {record['result']['steps']} steps: test loss {loss:.4f}{right} ({took})")

    def _make_room(self, seeds: int) -> None:
        """Drop what is clearly worse on the validation rows, half of the methods at most, where time is short."""
        if self.budget.has(self._of_round() * seeds) or len(self.active) < 2:
            return
        names = [one.name for one in self.active]
        scores = dict(zip(names, pooled([self._on_valid(one) for one in self.active]), strict=True))
        best = min(scores, key=lambda name: scores[name].value)
        gaps = {name: difference(own, scores[best]) for name, own in scores.items() if name != best}
        worse = sorted((name for name in gaps if gaps[name].low > 0), key=lambda name: -gaps[name].value)
        for name in worse[: len(scores) // 2]:
            if self.budget.has(self._of_round() * seeds):
                return
            gap = gaps[name]
            why = f"its loss on the validation rows is {gap.value:.3g} above that of {best} ({gap.low:.3g} to "
            (one,) = [one for one in self.active if one.name == name]
            self._out(one, "dropped", f"{why}{gap.high:.3g}), and the time budget has no room for all")

    def _on_valid(self, one: Candidate) -> Scores:
        """Its nats on the validation rows: of its runs, or before there are any, of its best trial."""
        if one.runs:
            sides = [run["measured"]["sides"]["valid"] for run in one.runs]
        else:
            best = min(one.rates.values(), key=lambda record: math.inf if record["loss"] is None else record["loss"])
            arguments = (str(self.directory / best["run"]), self.config, self.precision, self.rows.path("valid"))
            name = f"{best['run'].removeprefix('trials/')}.valid"
            sides = [self._once(name, lambda log: self.call(f"{MEASURE}:losses", arguments, log))]
        return Scores(np.array([side["nats"] for side in sides]).T, np.array(sides[0]["tokens"], dtype=np.float64))

    # --- one trial --------------------------------------------------------------------------------------------------

    def _trial(self, one: Candidate, name: str, settings: dict[str, Any]) -> tuple[str, Work]:
        """A name, and what makes a record of run.json's content as `result`, or None there and why as `refused`."""
        run = RunDir(self.directory / "trials" / name)
        wanted = {"method": one.method, "variant": one.variant, "output": str(run.path), **settings}
        wanted |= {name: getattr(self.config, name) for name in SHARED} | {"data": self.rows.path("train")}
        wanted["epochs"] = self.config.epochs * self.times(one)

        def work(log: Path) -> Record:
            try:
                result = self.call(child.TRAIN, (wanted,), log)
            except child.Refused as refused:
                return {"run": f"trials/{name}", "result": None} | _refusal(refused)
            shutil.rmtree(run.checkpoints, ignore_errors=True)  # a finished run needs none, and they are large
            return {"run": f"trials/{name}", "result": result, "refused": None}

        return name, work

    def _train(self, one: Candidate, name: str, work: Work) -> Record:
        record = self._once(name, work)
        if record["result"] is not None:
            result = record["result"]
            self.costs.trained(one.name, result["steps"], result["train_s"], record["wall_s"])
        return record

    def _measure(self, target: str, sides: tuple[str, ...], timed: bool, log: Path) -> Record:
        paths = {side: self.rows.path(side) for side in sides}
        arguments = (target, self.config, self.precision, paths, self.keep, self.generate, timed)
        return self.call(f"{MEASURE}:measure", arguments, log)

    def _ahead(self, jobs: Sequence[Callable[[], object]]) -> None:
        """Where there are slots, make these records at the same time; each is found when its turn comes."""
        if self.slots == 1 or len(jobs) < 2:
            return
        self._say(f"{len(jobs)} trials, {min(self.slots, len(jobs))} at a time")
        together(jobs, self.slots)

    def _once(self, name: str, work: Work) -> Record:
        """The record of that name, made now unless it is there. Counts it as spent."""
        record = self._record(name, work)
        self.budget.spent_s += record["wall_s"]
        return record

    def _record(self, name: str, work: Work) -> Record:
        """The record of that name, or what `work` gives, with the seconds it took. together: beside others."""
        directory, together = self.directory / "trials", self.slots > 1
        with nullcontext() if together else watched(self.console, name, records.log_of(directory, name)):
            return records.record(directory, name, work, together)

    def _out(self, one: Candidate, status: str, why: str) -> None:
        one.status, one.out = status, why
        self._say(f"{one.name}: {status}: {why}", style="yellow")

    def _say(self, line: str, style: str | None = None) -> None:
        spent = format_seconds(self.budget.spent_s)
        self.console.print(f"[{spent}] {line}", style=style, highlight=False, markup=False)


def _refusal(refused: child.Refused) -> Record:
    """As a part of a record; again: it may go better another time."""
    return {"refused": str(refused)} | ({"again": True} if refused.may_go_better else {})
