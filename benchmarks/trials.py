"""What the reproductions share: runs by the command line, results that are kept one by one, tables in a document.

A run is a dictionary: what it was (its cell and seed), `quiet` (whether nothing else ran on the machine, so that its
times can be quoted), what `lorafit train --json` and `lorafit eval --json` told, the commit and the versions.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from quantized_base.run import machine, revision

from lorafit.compare.stats import Estimate, Scores, estimate, pooled
from lorafit.files import write_atomic

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reproductions.md"
# Of what `train --json` tells.
KEPT = (
    "method", "variant", "trainable_params", "total_params", "train_s", "load_s", "steps", "tokens_computed",
    "train_loss", "eval_loss", "eval_accuracy", "precision", "peak_rss_bytes", "threads", "settings", "versions",
)  # fmt: skip
LONG = ("wrong", "settings", "versions", "samples")  # not printed
Result = dict[str, Any]


# --- the command line -----------------------------------------------------------------------------------------------


def arguments(text: str | None, seeds: int) -> argparse.Namespace:
    """What every reproduction is asked."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("measure", "table"))
    parser.add_argument("--data", type=Path, help="the directory of the rows")
    parser.add_argument("--scratch", type=Path, help="where runs are written, and removed again")
    parser.add_argument("--seeds", type=int, default=seeds, help="seeds 0, 1, ... of each")
    parser.add_argument("--only", help="the ways that are run, with commas without spaces between. Default: all")
    parser.add_argument("--quiet", action="store_true", help="nothing else runs: the times may be quoted")
    parser.add_argument("--threads", type=int, help="as for lorafit")
    given = parser.parse_args()
    if given.work == "measure" and given.data is None:
        parser.error("measure needs --data")
    # As an exception it ends the child too, and scratch files go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return given


def main(
    text: str | None, seeds: int, measure: Callable[[argparse.Namespace], None], table: Callable[[], str], begin: str
) -> None:
    """Measure where that is asked for, and put the table into the document behind `begin`."""
    given = arguments(text, seeds)
    if given.work == "measure":
        measure(given)
    put(table(), begin)


def wanted(given: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The ways that were asked for. Leaves with a sentence if one is unknown."""
    only = names if given.only is None else re.split(r",(?! )", given.only)
    if unknown := [name for name in only if name not in names]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(names)}")
    return list(only)


# --- results --------------------------------------------------------------------------------------------------------


class Results:
    """A file of runs: a line each, the file written anew after each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: Result = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "runs": []}
        self.revision = revision()  # of the code, before the first result changes a file of the checkout

    @property
    def runs(self) -> list[Result]:
        return self.found["runs"]  # type: ignore[no-any-return]

    def holds(self, **key: Any) -> bool:
        return any(all(run.get(name) == value for name, value in key.items()) for run in self.runs)

    def add(self, run: Result) -> None:
        if self.found["machine"]["cpu"] != machine()["cpu"]:
            raise SystemExit(f"{self.path} was measured on {self.found['machine']['cpu']}: start another file")
        if self.path.exists():  # what another command measured meanwhile stays
            self.found["runs"] = json.loads(self.path.read_text())["runs"]
        self.runs.append(run | self.revision)
        head = [f" {json.dumps(name)}: {json.dumps(self.found[name])}" for name in self.found if name != "runs"]
        lines = ",\n  ".join(json.dumps(run, ensure_ascii=False) for run in self.runs)
        write_atomic(self.path, "{\n" + ",\n".join(head) + f',\n "runs": [\n  {lines}\n ]\n' + "}\n")
        print(json.dumps({name: run[name] for name in run if name not in LONG}), flush=True)

    def each_seed(self, **key: Any) -> list[Result]:
        """One run of each seed: what was learned does not depend on who else used the machine."""
        own = [run for run in self.runs if all(run.get(name) == value for name, value in key.items())]
        return list({run["seed"]: run for run in own}.values())

    def seconds(self, **key: Any) -> str:
        """The median training time of quiet runs; nothing where there are none."""
        own = [run["train_s"] for run in self.each_seed(**key, quiet=True)]
        return f"{statistics.median(own):.1f}" if own else "-"


def measured(path: Path) -> Results:
    """What was measured. Leaves with a sentence where nothing was."""
    if not path.exists():
        raise SystemExit(f"{path} is not there: measure first")
    return Results(path)


# --- runs -----------------------------------------------------------------------------------------------------------


class Diverged(SystemExit):
    """A command stopped because its loss was no number."""


def lorafit(*words: object) -> Result:
    """What a command tells by --json. Leaves with its name where it fails."""
    command = [sys.executable, "-m", "lorafit", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        kind = Diverged if "finite" in done.stderr[-500:] else SystemExit
        raise kind(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@contextmanager
def trained(
    model: str, data: Path, flags: Sequence[object], given: argparse.Namespace
) -> Iterator[tuple[Path, Result]]:
    """A run directory, which goes at the end, and what is kept of what its training told."""
    threads = ["--threads", given.threads] if given.threads else []
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="reproduction.") as directory:
        run = Path(directory) / "run"
        told = lorafit("train", model, data, "-o", run, *flags, *threads)
        yield run, {name: told[name] for name in KEPT if name in told}


def evaluated(target: object, data: Path, given: argparse.Namespace) -> tuple[Result, list[Result]]:
    """What `eval` told, and the answer to every row."""
    threads = ["--threads", given.threads] if given.threads else []
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="answers.") as directory:
        answers = Path(directory) / "answers.jsonl"
        told = lorafit("eval", target, data, "--answers", answers, "--samples", 0, *threads)
        return told, [json.loads(line) for line in answers.read_text().splitlines()]


def wrong(answers: Sequence[Result]) -> list[int]:
    """Numbers of the rows that were answered wrong."""
    return [number for number, one in enumerate(answers) if not one["right"]]


# --- tables ---------------------------------------------------------------------------------------------------------


def estimates(cells: Sequence[Sequence[Result]], rows: int, weights: Sequence[float] | None = None) -> list[Estimate]:
    """The share of rows that are right, for each cell of runs; the spread of seeds is that of all cells together.

    weights: of rows, all alike by default.
    """
    weight = np.ones(rows) if weights is None else np.asarray(weights, dtype=np.float64)
    scores = []
    for runs in cells:
        right = np.ones((rows, len(runs)))
        for column, run in enumerate(runs):
            right[run["wrong"], column] = 0
        scores.append(Scores(right * weight[:, None], weight))
    return [estimate(one, least=0, most=1) for one in pooled(scores)]


def percent(found: Estimate) -> str:
    """72.0% (70.1 to 73.9)."""
    return f"{100 * found.value:.1f}% ({100 * found.low:.1f} to {100 * found.high:.1f})"


def put(table: str, begin: str) -> None:
    """Write the table between its marks into the document."""
    end = "<!-- /generated -->"
    before, mark, rest = DOCUMENT.read_text().partition(begin)
    if not mark:
        raise SystemExit(f"{DOCUMENT} has no line {begin}")
    DOCUMENT.write_text(f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}")
