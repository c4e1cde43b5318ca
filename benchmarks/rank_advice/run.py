"""Ranks trained one by one, each at its own best rate: what advice on a rank is held against.

    python benchmarks/rank_advice/run.py separate --data DIR --out benchmarks/rank_advice/results [--sets chat12,mawps]

DIR holds the sets that SETS names. Of each, TRAIN rows are trained on and VALID others of the same file measured after
each of EPOCHS epochs; the best of these evaluations counts, and its loss is measured row by row. The rate of every rank
is searched with the first seed on a grid of four rates a decade, from the best one of the nearest rank outwards, until
both neighbours of the best have been tried; other seeds run at that rate. results/SET.json is written after each run,
and what it holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafit.compare import measure
from lorafit.config import CompareConfig
from lorafit.trials import child, measuring

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_speed"))
from engines import revision
from run import machine

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
MODEL = "smollm2-135m"
TRAIN, VALID, EPOCHS = 400, 200, 3
TEXT_CHARS = 400  # of a row of running text
RANKS = (16, 2, 64, 8, 4, 32, 1)  # in this order: those first by which rates alone are judged
LAST_STEP = 8  # rates are 1e-4 * 10 ** (step / 4), up to 1e-2
FIRST_STEP = 5
SEEDS = 3
Result = dict[str, Any]


def rate(step: int) -> float:
    """Of a step on the grid."""
    return float(f"{1e-4 * 10 ** (step / 4):.3g}")


def write_rows(data: Path, name: str, scratch: Path) -> tuple[Path, Path]:
    """(rows to train on, rows to measure), drawn from one file with a seed of their own."""
    source = data / SETS[name]
    rows = list(pieces(source.read_text())) if source.suffix == ".txt" else source.read_text().splitlines()
    random.Random(0).shuffle(rows)
    sides = scratch / f"{name}.train.jsonl", scratch / f"{name}.valid.jsonl"
    for path, own in zip(sides, (rows[:TRAIN], rows[TRAIN : TRAIN + VALID]), strict=True):
        path.write_text("\n".join(own) + "\n")
    return sides


def pieces(text: str) -> Iterator[str]:
    """Rows of running text, whole lines of about TEXT_CHARS characters."""
    own = ""
    for line in text.splitlines(keepends=True):
        if len(own) + len(line) > TEXT_CHARS and own:
            yield json.dumps({"text": own})
            own = ""
        own += line


def trained(settings: Result, valid: Path, scratch: Path) -> Result:
    """One run: its best held-out loss, and that of each row; a loss of None where training failed."""
    run, log = scratch / "run", scratch / "log.txt"
    shutil.rmtree(run, ignore_errors=True)
    try:
        told = child.call(measuring.train, (settings | {"output": str(run)},), log)
        config = CompareConfig(model=MODEL, data=settings["data"], output=str(scratch))
        rows = child.call(measure.losses, (str(run), config, told["precision"], str(valid)), log)
    except child.Refused as error:
        return {"eval_loss": None, "error": str(error)}
    kept = ("eval_loss", "train_loss", "train_s", "steps", "precision", "trainable_params", "tokens_computed")
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line["loss"] for line in curve if line["kind"] == "eval"]
    return {key: told[key] for key in kept} | {"evaluations": evaluations, "nats": [round(n, 5) for n in rows["nats"]]}


class Set:
    """One set's runs, kept in a file."""

    def __init__(self, name: str, given: argparse.Namespace, scratch: Path) -> None:
        self.file = given.out / f"{name}.json"
        self.scratch = scratch
        self.train, self.valid = write_rows(given.data, name, scratch)
        new = {"set": name, "machine": machine(), "rows": [TRAIN, VALID], "epochs": EPOCHS, "runs": []}
        self.found: Result = json.loads(self.file.read_text()) if self.file.exists() else new

    def loss(self, r: int, step: int, seed: int) -> float:
        """Of a run, made now if there is none yet; infinite where it failed."""
        for run in self.found["runs"]:
            if (run["r"], run["step"], run["seed"]) == (r, step, seed):
                break
        else:
            settings = {"model": MODEL, "data": str(self.train), "eval": str(self.valid), "epochs": EPOCHS}
            settings |= {"r": r, "alpha": 2 * r, "lr": rate(step), "seed": seed, "precision": "int8"}
            run = {"r": r, "step": step, "lr": rate(step), "seed": seed} | revision()
            run |= trained(settings, self.valid, self.scratch)
            self.found["runs"].append(run)
            self.file.write_text(json.dumps(self.found) + "\n")
            print(self.found["set"], r, rate(step), seed, run["eval_loss"], run.get("evaluations"), flush=True)
        return math.inf if run["eval_loss"] is None else float(run["eval_loss"])

    def best_step(self, r: int) -> int:
        """The step of the best rate of the first seed, both of whose neighbours on the grid are worse."""
        known = {run["r"]: run["best_step"] for run in self.found.get("best", [])}
        near = min(known, key=lambda other: abs(math.log2(other / r)), default=None)
        tried = {step: self.loss(r, step, 0) for step in [FIRST_STEP if near is None else known[near]]}
        while True:
            best = min(tried, key=lambda step: tried[step])
            missing = [s for s in (best - 1, best + 1) if 0 <= s <= LAST_STEP and s not in tried]
            if not missing:
                break
            tried[missing[0]] = self.loss(r, missing[0], 0)
        others = [one for one in self.found.get("best", []) if one["r"] != r]
        self.found["best"] = [*others, {"r": r, "best_step": best, "lr": rate(best)}]
        self.file.write_text(json.dumps(self.found) + "\n")
        return best


def separate(given: argparse.Namespace) -> None:
    """Rank by rank over all sets, so that what is there is comparable at any time."""
    with tempfile.TemporaryDirectory(prefix="rank_advice.") as directory:
        scratch = Path(directory)
        sets = [Set(name, given, scratch) for name in given.sets.split(",")]
        for r in RANKS:
            for one in sets:
                one.best_step(r)
        for seed in range(1, SEEDS):
            for r in RANKS:
                for one in sets:
                    one.loss(r, one.best_step(r), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    action = actions.add_parser("separate")
    action.add_argument("--data", type=Path, required=True)
    action.add_argument("--out", type=Path, required=True)
    action.add_argument("--sets", default=",".join(SETS))
    action.set_defaults(run=separate)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
