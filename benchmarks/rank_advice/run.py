"""Advice on a rank, held against ranks trained one by one, each at its own best rate.

    python benchmarks/rank_advice/run.py separate --data DIR [--sets chat12,mawps] [--ranks 16,2] [--seeds 1]
    python benchmarks/rank_advice/run.py again --data DIR --precision fp32 [--sets chat12,mawps] [--ranks 16,2]
    python benchmarks/rank_advice/run.py advise --data DIR [--sets chat12,mawps] [--seeds 1]
    python benchmarks/rank_advice/run.py scalings --data DIR [--sets chat12,mawps]
    python benchmarks/rank_advice/run.py layers --data DIR [--sets chat12,mawps]
    python benchmarks/rank_advice/table.py        (tables and a picture of all results, in docs)

DIR holds the sets that SETS names. Of each, TRAIN rows are trained on and VALID others of the same file measured after
each of EPOCHS epochs; the best of these evaluations counts, and its loss is measured row by row. A set whose name ends
in SHUFFLED has its words exchanged for each other, the same everywhere: a language that no model knows. One whose name
ends in LONGER is the set itself, trained for LONG_EPOCHS.

`separate` searches the rate of every rank with the first seed on a grid of four rates a decade, from the best one of
the nearest rank outwards, until both neighbours of the best have been tried; other seeds run at that rate. `advise` is
`lorafit rank` on the same rows, with each seed; its times are reported where it had all threads, so leave the machine
alone then. `scalings` searches the rate of some ranks under other scalings, `layers` that of ranks by layer, as
`lorafit rank` gives them, with as many parameters as LAYERED_RANK everywhere. Runs are in int8; where the processor has
no instructions for that, `--precision fp32`: the rate of a rank is searched in one of them, and `again` makes runs that
are there once more in another, to tell whether they can be compared. results/SET.json is written after each run, and
what it holds is not run again. Two of these may run side by side on sets of their own, with --threads 1: that makes
more runs an hour.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorafit.config import CompareConfig, RankConfig
from lorafit.rank.conclude import by_layer, spectra_of
from lorafit.rank.energies import allocate
from lorafit.trials import child
from lorafit.trials.rows import KEEP

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quantized_base.run import machine, revision

SETS = {
    "chat12": "banking77/chat12_train.jsonl",
    "mawps": "mawps/train.jsonl",
    "snips": "snips/json_train.jsonl",
    "e2e": "e2e/train.jsonl",
    "chat77": "banking77/chat77_train.jsonl",
    "canned": "bitext/canned_train.jsonl",
    "wikisql": "wikisql_mlx/chat_train.jsonl",
    "shakespeare": "tinyshakespeare/train.txt",
}
MODEL, PRECISION = "smollm2-135m", "int8"
TRAIN, VALID, EPOCHS = 320, 200, 3
TEXT_CHARS = 400  # of a row of running text
RANKS = (16, 2, 64, 8, 4, 32, 1)  # in this order: those first by which rates alone are judged
LAST_STEP = 8  # rates are 1e-4 * 10 ** (step / 4), up to 1e-2
FIRST_STEP = 5
SEEDS = 3
# What B A is multiplied by: the same at rank 16 in all of them.
USUAL = "2"
SCALINGS: dict[str, Callable[[int], dict[str, Any]]] = {
    USUAL: lambda r: {"alpha": 2 * r},
    "32 / r": lambda r: {"alpha": 32},
    "8 / sqrt(r)": lambda r: {"alpha": 8, "scaling_rule": "alpha/sqrt(r)"},
}
SCALED_RANKS = (16, 4, 1, 64)
# A run with ranks by layer in the place of one everywhere. A small one, which leaves the most to be gained by it.
BY_LAYER, LAYERED_RANK = "by layer", 4
SHUFFLED = " shuffled"
LONGER, LONG_EPOCHS = " longer", 8
WORD = re.compile(r"[^\W\d_]+")
RESULTS = Path(__file__).resolve().parent / "results"
Result = dict[str, Any]


def rate(step: int) -> float:
    """Of a step on the grid."""
    return float(f"{1e-4 * 10 ** (step / 4):.3g}")


def outward(first: int, loss: Callable[[int], float], last: int = LAST_STEP) -> int:
    """The step of the least loss, both of whose neighbours on a grid are worse, from a first one outwards."""
    tried = {first: loss(first)}
    while True:
        best = min(tried, key=lambda step: tried[step])
        missing = [step for step in (best - 1, best + 1) if 0 <= step <= last and step not in tried]
        if not missing:
            return best
        tried[missing[0]] = loss(missing[0])


def write_rows(data: Path, name: str, scratch: Path) -> tuple[Path, Path]:
    """(rows to train on, rows to measure), drawn from one file with a seed of their own."""
    rows = lines_of(data, name.removesuffix(SHUFFLED).removesuffix(LONGER))
    random.Random(0).shuffle(rows)
    rows = rows[: TRAIN + VALID]
    if name.endswith(SHUFFLED):
        rows = with_other_words(rows)
    sides = scratch / f"{name}.train.jsonl", scratch / f"{name}.valid.jsonl"
    for path, own in zip(sides, (rows[:TRAIN], rows[TRAIN:]), strict=True):
        path.write_text("\n".join(own) + "\n")
    return sides


def lines_of(data: Path, name: str) -> list[str]:
    """All rows of a set."""
    source = data / SETS[name]
    return list(pieces(source.read_text())) if source.suffix == ".txt" else source.read_text().splitlines()


def pieces(text: str) -> Iterator[str]:
    """Rows of running text, whole lines of about TEXT_CHARS characters."""
    own = ""
    for line in text.splitlines(keepends=True):
        if len(own) + len(line) > TEXT_CHARS and own:
            yield json.dumps({"text": own})
            own = ""
        own += line


def with_other_words(rows: list[str]) -> list[str]:
    """Every word of the rows' texts exchanged for another one of them, the same everywhere."""
    records = [json.loads(row) for row in rows]
    words = sorted({word for record in records for text in texts(record) for word in WORD.findall(text)})
    others = dict(zip(words, random.Random(1).sample(words, len(words)), strict=True))

    def changed(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: changed(own, name) for name, own in value.items()}
        if isinstance(value, list):
            return [changed(own, key) for own in value]
        return WORD.sub(lambda word: others[word[0]], value) if isinstance(value, str) and key != "role" else value

    return [json.dumps(changed(record)) for record in records]


def texts(value: Any, key: str = "") -> Iterator[str]:
    """All texts of a record but the names of roles."""
    if isinstance(value, dict):
        for name, own in value.items():
            yield from texts(own, name)
    elif isinstance(value, list):
        for own in value:
            yield from texts(own, key)
    elif isinstance(value, str) and key != "role":
        yield value


def trained(settings: Result, run: Path) -> Result:
    """One run and its best held-out loss; a loss of None where training failed. run: the directory it leaves."""
    try:
        told = child.call(child.TRAIN, (settings | {"output": str(run)},), run.parent / "log.txt")
    except child.Refused as error:
        return {"eval_loss": None, "error": str(error)}
    kept = ("eval_loss", "train_loss", "train_s", "steps", "precision", "trainable_params", "tokens_computed")
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line["loss"] for line in curve if line["kind"] == "eval"]
    return {key: told[key] for key in kept} | {"evaluations": evaluations}


def by_row(run: Path, settings: Result, precision: str) -> Result:
    """What a run loses on each of its held-out rows, in nats, and their tokens."""
    config = CompareConfig(model=MODEL, data=settings["data"], output=str(run.parent), threads=settings["threads"])
    log = run.parent / "log.txt"
    rows = child.call("lorafit.compare.measure:losses", (str(run), config, precision, settings["eval"]), log)
    return {"nats": [round(n, 5) for n in rows["nats"]], "tokens": rows["tokens"]}


class Set:
    """One set's runs, kept in a file."""

    def __init__(self, name: str, given: argparse.Namespace, scratch: Path) -> None:
        self.file = given.out / f"{name}.json"
        self.scratch = scratch / name
        self.scratch.mkdir()
        self.threads, self.precision = given.threads, given.precision
        self.train, self.valid = write_rows(given.data, name, scratch)
        self.epochs = LONG_EPOCHS if name.endswith(LONGER) else EPOCHS
        new = {"set": name, "machine": machine(), "rows": [TRAIN, VALID], "epochs": self.epochs, "runs": []}
        self.found: Result = json.loads(self.file.read_text()) if self.file.exists() else new

    def run(self, r: int, step: int, seed: int, scaling: str = USUAL, *, rows: bool = False) -> Result:
        """One run, made now if there is none yet in this precision.

        scaling: of SCALINGS, or BY_LAYER. rows: with its loss on each held-out row.
        """
        own = {"r": r, "step": step, "seed": seed, "scaling": scaling, "precision": self.precision}
        scaled = by_layer(r, self.pattern()) if scaling == BY_LAYER else SCALINGS[scaling](r)
        settings = self.settings(r, step, seed) | scaled
        directory = self.scratch / f"{r} {step} {seed}"
        found = next((run for run in self.found["runs"] if own.items() <= run.items()), None)
        if found is None:
            found = own | {"lr": rate(step), "threads": self.threads} | revision() | trained(settings, directory)
            self.found["runs"].append(found)
            self.write()
            told = (scaling, rate(step), seed, found["eval_loss"], found.get("evaluations"))
            print(self.found["set"], r, *told, flush=True)
        if rows and found["eval_loss"] is not None and "nats" not in found:
            if not directory.exists():
                trained(settings, directory)
            found |= by_row(directory, settings, found["precision"])
            self.write()
            self.clear()
        return found

    def settings(self, r: int, step: int, seed: int) -> Result:
        own = {
            "model": MODEL,
            "data": str(self.train),
            "eval": str(self.valid),
            "epochs": self.epochs,
            "precision": self.precision,
        }
        return own | {"r": r, "alpha": 2 * r, "lr": rate(step), "seed": seed, "threads": self.threads}

    def pattern(self) -> dict[str, int]:
        """Ranks by layer, from the spectra of the gradients, with as many parameters as LAYERED_RANK everywhere."""
        if "pattern" not in self.found:
            place = {"model": MODEL, "data": str(self.train), "output": str(self.scratch)}
            config = RankConfig(**place, precision=self.precision, threads=self.threads, epochs=self.epochs)
            given = config, max(RANKS), str(self.train), VALID, str(KEEP)
            look = child.call("lorafit.rank.looking:look", given, self.scratch / "log.txt")
            self.found["pattern"] = allocate(spectra_of(look), LAYERED_RANK, least=1)
            self.write()
        return dict(self.found["pattern"])

    def clear(self) -> None:
        """Leave no run behind."""
        shutil.rmtree(self.scratch)
        self.scratch.mkdir()

    def best_step(self, r: int, scaling: str = USUAL) -> int:
        """The step of the best rate of the first seed, both of whose neighbours on the grid are worse."""
        every = self.found.get("best", [])
        alike = [one for one in every if one["scaling"] == scaling]
        for one in alike:
            if one["r"] == r:
                return int(one["best_step"])
        near = min(alike, key=lambda one: abs(math.log2(one["r"] / r)), default=None)

        def loss(step: int) -> float:
            found = self.run(r, step, 0, scaling)["eval_loss"]
            return math.inf if found is None else float(found)

        best = outward(FIRST_STEP if near is None else int(near["best_step"]), loss)
        self.run(r, best, 0, scaling, rows=scaling in (USUAL, BY_LAYER))
        self.clear()
        found = {"r": r, "scaling": scaling, "precision": self.precision, "best_step": best, "lr": rate(best)}
        self.found["best"] = [*every, found]
        self.write()
        return best

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.found) + "\n")


def separate(given: argparse.Namespace) -> None:
    """Rank by rank over all sets, so that what is there is comparable at any time."""
    with tempfile.TemporaryDirectory(prefix="rank_advice.") as directory:
        scratch = Path(directory)
        sets = [Set(name, given, scratch) for name in given.sets.split(",")]
        for r in given.ranks:
            for one in sets:
                one.best_step(r)
        for seed in range(1, given.seeds):
            for r in given.ranks:
                for one in sets:
                    if seed not in [run["seed"] for run in best_runs(one.found)[r]]:
                        one.run(r, one.best_step(r), seed, rows=True)


def again(given: argparse.Namespace) -> None:
    """The best run of each rank once more, where it was in another precision."""
    with tempfile.TemporaryDirectory(prefix="rank_advice.") as directory:
        sets = [Set(name, given, Path(directory)) for name in given.sets.split(",")]
        for r in given.ranks:
            for one in sets:
                for known in one.found.get("best", []):
                    if (known["r"], known["scaling"]) == (r, USUAL):
                        one.run(r, known["best_step"], 0)


def scalings(given: argparse.Namespace) -> None:
    """Whether alpha steadies the rate: the best one of some ranks under each scaling, with the first seed."""
    with tempfile.TemporaryDirectory(prefix="rank_advice.") as directory:
        for name in given.sets.split(","):
            one = Set(name, given, Path(directory))
            for scaling, r in itertools.product(SCALINGS, SCALED_RANKS):
                one.best_step(r, same_as_usual(r, scaling))


def same_as_usual(r: int, scaling: str) -> str:
    """USUAL where a scaling multiplies B A by the same, else itself."""

    def factor(name: str) -> float:
        settings = SCALINGS[name](r)
        return float(settings["alpha"] / (math.sqrt(r) if "scaling_rule" in settings else r))

    return USUAL if factor(scaling) == factor(USUAL) else scaling


def layers(given: argparse.Namespace) -> None:
    """Whether ranks by layer are better than one everywhere, each at its own best rate, with the first seed."""
    with tempfile.TemporaryDirectory(prefix="rank_advice.") as directory:
        for name in given.sets.split(","):
            one = Set(name, given, Path(directory))
            one.run(LAYERED_RANK, one.best_step(LAYERED_RANK), 0, rows=True)
            one.best_step(LAYERED_RANK, BY_LAYER)


def advised(given: argparse.Namespace) -> None:
    """What `lorafit rank` says of each set with each seed, and what it took."""
    with tempfile.TemporaryDirectory(prefix="rank_advice.") as directory:
        scratch = Path(directory)
        sets = [Set(name, given, scratch) for name in given.sets.split(",")]
        for seed in range(given.seeds):
            for one in sets:
                known = one.found.setdefault("advice", [])
                if len(known) <= seed:
                    told = asked(one, seed, scratch / "ranked") | {"threads": one.threads} | revision()
                    known.append(told)
                    one.write()
                    print(one.found["set"], seed, told["recommended_r"], told["reason"], told["seconds"], flush=True)


def asked(one: Set, seed: int, out: Path) -> Result:
    """The advice of the command itself."""
    shutil.rmtree(out, ignore_errors=True)
    words = ["rank", MODEL, one.train, "--eval", one.valid, "-o", out, "--epochs", one.epochs, "--seed", seed]
    words += ["--precision", one.precision, *(["--threads", one.threads] if one.threads else [])]
    command = [sys.executable, "-m", "lorafit", *map(str, words), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found["gradients"].pop("by_weight")
    return dict(found)


def best_runs(found: Result) -> dict[int, list[Result]]:
    """Of each rank the runs at its best rate, one a seed: in the precision that the rate was searched in, if there."""
    runs = [run for run in found["runs"] if run["scaling"] == USUAL and "nats" in run]
    best = {}
    for one in sorted(found.get("best", []), key=lambda one: int(one["r"])):
        if one["scaling"] == USUAL:
            own = [run for run in runs if (run["r"], run["step"]) == (one["r"], one["best_step"])]
            own.sort(key=lambda run: run["precision"] == one["precision"])  # the last of a seed is kept
            best[one["r"]] = list({run["seed"]: run for run in own}.values())
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    for name, work in (
        ("separate", separate),
        ("again", again),
        ("advise", advised),
        ("scalings", scalings),
        ("layers", layers),
    ):
        action = actions.add_parser(name)
        action.add_argument("--data", type=Path, required=True)
        action.add_argument("--out", type=Path, default=RESULTS)
        action.add_argument("--sets", default=",".join(SETS))
        action.add_argument("--threads", type=int)
        action.add_argument("--precision", default=PRECISION)
        if work in (separate, again):
            action.add_argument("--ranks", type=lambda text: [int(r) for r in text.split(",")], default=RANKS)
        if work in (separate, advised):
            action.add_argument("--seeds", type=int, default=SEEDS)
        action.set_defaults(run=work)
    given = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)  # without --threads all there are, as its times are said to be of
    given.run(given)


if __name__ == "__main__":
    main()
