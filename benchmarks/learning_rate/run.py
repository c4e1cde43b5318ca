"""Which learning rate suits LoRA in short runs: one epoch of 320 rows, loss on 160 rows that training does not see.

    python benchmarks/learning_rate/run.py chat12=TRAIN.jsonl,TEST.jsonl free=TRAIN.jsonl,TEST.jsonl ...
    python benchmarks/learning_rate/run.py --table

Each run is a `lorafit train` of its own; results/NAME.json is written after each, and what it holds is not run again.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RATES = ("2e-4", "5e-4", "1e-3", "2e-3", "5e-3")
TRAIN_ROWS, TEST_ROWS = 320, 160


def measure(name: str, train: Path, test: Path) -> None:
    path = HERE / "results" / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else {"set": name, **machine(), "runs": {}}
    for lr in RATES:
        if lr not in result["runs"]:
            result["runs"][lr] = one_run(train, test, lr)
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(name, lr, result["runs"][lr]["eval_loss"], flush=True)


def one_run(train: Path, test: Path, lr: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        rows = first_rows(train, TRAIN_ROWS, Path(directory) / "train.jsonl")
        held_out = first_rows(test, TEST_ROWS, Path(directory) / "test.jsonl")
        command = [sys.executable, "-m", "lorafit", "train", "smollm2-135m", str(rows), "--eval", str(held_out)]
        command += ["-o", f"{directory}/run", "--lr", lr, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"eval_loss": None, "error": done.stderr.splitlines()[-1]}
        told = json.loads(done.stdout)
        return {key: told[key] for key in ("eval_loss", "train_loss", "train_s", "steps", "tokens_seen", "precision")}


def first_rows(path: Path, count: int, to: Path) -> Path:
    with open(path, encoding="utf-8") as file:
        to.write_text("".join(itertools.islice(file, count)), encoding="utf-8")
    return to


def machine() -> dict[str, Any]:
    from lorafit.train.outcome import versions

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    return {"commit": commit, "machine": platform.machine(), "versions": versions()}


def table() -> str:
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    lines = ["| lr | " + " | ".join(result["set"] for result in results) + " | mean excess over the best |"]
    lines.append("|---" * (len(results) + 2) + "|")
    best = [min(run["eval_loss"] or math.inf for run in result["runs"].values()) for result in results]
    for lr in RATES:
        losses = [result["runs"][lr]["eval_loss"] or math.inf for result in results]
        excess = sum(loss / low - 1 for loss, low in zip(losses, best, strict=True)) / len(losses)
        lines.append(f"| {lr} | " + " | ".join(f"{loss:.3f}" for loss in losses) + f" | {excess:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print(table())
    for argument in sys.argv[1:]:
        if "=" in argument:
            name, _, paths = argument.partition("=")
            measure(name, *map(Path, paths.split(",")))
