"""The engines, the works, and one run of an engine on a work: a process that trains, and one that evaluates."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
R, ALPHA, LR = 16, 32, "2e-4"
Result = dict[str, Any]


@dataclass(frozen=True)
class Engine:
    """kind: whose it is. mode: lorafit's precision, or the mode of the peer's script. env: what it is started with."""

    kind: str
    mode: str
    env: dict[str, str] = field(default_factory=dict)


COMPILED = {"UNSLOTH_CPU_COMPILE": "1"}
ENGINES = {
    "lorafit-fp32": Engine("lorafit", "fp32"),
    "lorafit-bf16": Engine("lorafit", "bf16"),
    "lorafit-int8": Engine("lorafit", "int8"),
    "lorafit-auto": Engine("lorafit", "auto"),
    "trl-default": Engine("trl", "default"),
    "trl-bf16": Engine("trl", "bf16"),
    "trl-autocast": Engine("trl", "autocast"),
    "unsloth": Engine("unsloth", "default"),
    "unsloth-compiled": Engine("unsloth", "default", COMPILED),
    "unsloth-grouped": Engine("unsloth", "grouped"),
    "unsloth-compiled-grouped": Engine("unsloth", "grouped", COMPILED),
    "peft-fp32": Engine("peft", "fp32"),
    "peft-bf16": Engine("peft", "bf16"),
    "peft-autocast": Engine("peft", "autocast"),
}
SCRIPTS = {"trl": "trl_sft.py", "unsloth": "unsloth_sft.py", "peft": "peft_loop.py"}


@dataclass(frozen=True)
class Work:
    """What is trained. data: the path of its rows below --data without `_train.jsonl`; None for random tokens.

    last: how many of the last decoder layers are adapted, None for all. kinds: whose engines run when none is named.
    """

    data: str | None
    kinds: tuple[str, ...]
    batch: int = 16
    epochs: int = 1
    last: int | None = None
    is_evaluated: bool = False


WORKS = {
    "chat12": Work("banking77/chat12", ("lorafit", "trl", "unsloth"), is_evaluated=True),
    "free": Work("bitext/free", ("lorafit", "trl", "unsloth"), is_evaluated=True),
    "step512": Work(None, ("lorafit", "peft"), batch=4),
    "last2": Work("banking77/chat12", ("lorafit", "peft"), epochs=3, last=2),
}

# --- one run --------------------------------------------------------------------------------------------------------


def one_run(engine: str, name: str, seed: int, given: argparse.Namespace, files: tuple[Path, Path | None]) -> Result:
    """Train in a process of its own, then measure the adapter. Raises RuntimeError with what a failed process said."""
    train, test = files
    with tempfile.TemporaryDirectory(dir=train.parent) as directory:
        out = Path(directory) / "run"
        result: Result = {"engine": engine, "work": name, "repeat": seed, "seed": seed, **revision()}
        result |= {"load_average": os.getloadavg()[0]} | trained(engine, WORKS[name], seed, given, train, out)
        if test is not None:
            is_ours = ENGINES[engine].kind == "lorafit"
            result["eval_loss"] = eval_loss(out / "adapter" if is_ours else out, test, given, directory)
        return result


def trained(engine: str, work: Work, seed: int, given: argparse.Namespace, train: Path, out: Path) -> Result:
    """Train into `out`.

    wall_s: seconds of the whole process, imports and loading included. later_epoch_s, later_step_s: seconds of an epoch
    (mean) and of a step (median), the first left out.
    """
    is_ours = ENGINES[engine].kind == "lorafit"
    command = (lorafit_command if is_ours else peer_command)(engine, work, seed, given, train, out)
    begun = time.perf_counter()
    printed = process(command, str(out.parent), ENGINES[engine].env)
    wall_s = time.perf_counter() - begun
    result = lorafit_result(out) if is_ours else last_json(printed)
    step_s = result["step_s"]
    result["later_epoch_s"] = later_epoch_s(step_s, work.epochs)
    result["later_step_s"] = statistics.median(step_s[1:]) if len(step_s) > 1 else None
    return {"wall_s": wall_s} | result


def lorafit_command(engine: str, work: Work, seed: int, given: argparse.Namespace, train: Path, out: Path) -> list[str]:
    settings = {
        "--precision": ENGINES[engine].mode,
        "--r": R,
        "--alpha": ALPHA,
        "--lr": LR,
        "--schedule": "constant",
        "--warmup": 0,
        "--weight-decay": 0,
        "--init": "kaiming",  # as PEFT starts A; our own default learns faster at the same rate
        "--batch-size": work.batch,
        "--epochs": work.epochs,
        "--seed": seed,
        "--threads": given.threads,
    }
    if work.last is not None:
        settings["--layers"] = f"last:{work.last}"
    flags = ["--no-shuffle", *(str(part) for pair in settings.items() for part in pair)]
    return [sys.executable, "-m", "lorafit", "train", given.model, str(train), "-o", str(out), *flags]


def peer_command(engine: str, work: Work, seed: int, given: argparse.Namespace, train: Path, out: Path) -> list[str]:
    kind = ENGINES[engine].kind
    python = given.unsloth_python if kind == "unsloth" else given.peers_python
    command = [python, str(HERE / "peers" / SCRIPTS[kind]), ENGINES[engine].mode, str(given.hf_model), str(train)]
    command += [str(out), "--seed", str(seed), "--epochs", str(work.epochs), "--batch-size", str(work.batch)]
    command += ["--threads", str(given.threads)]
    return command if work.last is None else [*command, "--layers", str(work.last)]


def process(command: list[str], directory: str, env: dict[str, str]) -> str:
    """What the command prints. Raises RuntimeError if it fails."""
    whole = os.environ | {"HF_HUB_OFFLINE": "1"} | env
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=whole)
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).splitlines()[-12:])
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{last}")
    return done.stdout


def lorafit_result(out: Path) -> Result:
    """Out of run.json and metrics.jsonl. train_loss: the mean over all steps, as trainers report it."""
    told = parsed((out / "run.json").read_text())
    lines = [parsed(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("kind") == "step"]
    losses = [step["loss"] for step in steps]
    names = (
        "train_s",
        "load_s",
        "prepare_s",
        "peak_rss_bytes",
        "steps",
        "tokens_seen",
        "tokens_computed",
        "flop",
        "mfu",
    )
    names += ("precision", "versions")
    return {name: told.get(name) for name in names} | {
        "step_s": [step["step_s"] for step in steps],
        "train_loss": None if None in losses else statistics.fmean(losses),
        "last_loss": told["train_loss"],
    }


def last_json(printed: str) -> Result:
    """The last line that is a JSON object."""
    for line in reversed(printed.splitlines()):
        try:
            found = parsed(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    raise RuntimeError(f"no line of JSON in: {printed[-500:]!r}")


def parsed(text: str) -> Any:
    """JSON; NaN and infinity, which it does not have, become None."""
    return json.loads(text, parse_constant=lambda _: None)


def later_epoch_s(step_s: list[float], epochs: int) -> float | None:
    """Mean seconds of the epochs after the first; None if there is one epoch."""
    return sum(step_s[len(step_s) // epochs :]) / (epochs - 1) if epochs > 1 else None


def eval_loss(adapter: Path, test: Path, given: argparse.Namespace, directory: str) -> float:
    """The yardstick, one for all: the adapter on lorafit's own base in fp32, with the base's tokenizer."""
    command = [sys.executable, str(HERE / "yardstick.py"), given.model, str(test), str(adapter), str(given.threads)]
    for name in ("tokenizer.json", "tokenizer_config.json"):  # an adapter's own tokenizer would win over the base's
        (adapter / name).unlink(missing_ok=True)
    return float(last_json(process(command, directory, {}))["loss"])


def revision() -> dict[str, str]:
    """The commit, with `-dirty` behind it where more than results and documents differs, and the time."""

    def said(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=HERE.parents[1]).stdout.strip()

    written = ":!benchmarks/*/results", ":!docs", ":!README.md"
    changed = said("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    commit = said("rev-parse", "HEAD") + ("-dirty" if changed else "")
    return {"commit": commit, "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
