"""How fast LoRA trains: lorafit, TRL, Unsloth's CPU backend and a bare PEFT loop on the same rows. See README.md.

    python benchmarks/train_speed/run.py prepare --hf-model DIR
    python benchmarks/train_speed/run.py measure --hf-model DIR --data DIR --out results/NAME.json

Each run is a process of its own; the results file is rewritten after each, and what it holds is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from engines import ALPHA, ENGINES, LR, WORKS, R, Result, Work, one_run, revision
from inputs import prepare, write_rows

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")


# --- the results file -----------------------------------------------------------------------------------------------


def measure(given: argparse.Namespace) -> int:
    """Run all that the results file does not hold yet. Returns how many runs failed."""
    from lorafit.files import write_json

    results = opened(given)
    failed = 0
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="train_speed.") as scratch:
        for seed, name, engine in wanted(given):
            if any((run["engine"], run["work"], run["repeat"]) == (engine, name, seed) for run in results["runs"]):
                continue
            try:
                run = one_run(engine, name, seed, given, write_rows(name, seed, given, Path(scratch)))
            except RuntimeError as error:
                failed += 1
                print(f"FAILED {name} {engine} {seed}: {error}", file=sys.stderr, flush=True)
                continue
            results["versions"][engine] = run.pop("versions")
            results["runs"].append(run)
            write_json(given.out, results)
            print(told(run), flush=True)
    return failed


def wanted(given: argparse.Namespace) -> list[tuple[int, str, str]]:
    """Repeat, work, engine in the order in which they run: every engine once, then every one again."""
    return [
        (seed, name, engine)
        for seed in range(given.repeats)
        for name in given.works
        for engine in given.engines or default_engines(WORKS[name])
    ]


def default_engines(work: Work) -> list[str]:
    """The engines of the work's kinds; rows of like length together are for whoever asks by --engines."""
    return [name for name, engine in ENGINES.items() if engine.kind in work.kinds and engine.mode != "grouped"]


def opened(given: argparse.Namespace) -> Result:
    """The results file as it stands, or a new one. Leaves with a sentence if it was measured otherwise."""
    settings = {"r": R, "alpha": ALPHA, "lr": float(LR), "rows": given.rows, "eval_rows": given.eval_rows}
    settings |= {"threads": given.threads, "model": Path(given.model).name, "hf_model_sha256": sha256(given.hf_model)}
    if not given.out.exists():
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        head = {"commit": revision()["commit"], "date": today, "machine": machine()}
        return head | {"settings": settings, "versions": {}, "runs": []}
    results: Result = json.loads(given.out.read_text())
    was, now = (results["settings"], results["machine"]["cpu"]), (settings, machine()["cpu"])
    if was != now:
        raise SystemExit(f"{given.out} was measured with {was}, now it would be {now}. Give another --out")
    return results


def told(run: Result) -> str:
    loss = f", eval loss {run['eval_loss']:.4f}" if run.get("eval_loss") is not None else ""
    return f"{run['work']} {run['engine']} {run['repeat']}: {run['train_s']:.1f} s{loss}"


def machine() -> dict[str, Any]:
    import psutil

    from lorafit.plan.machine import physical_cores

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.replace("\t", "").split(":", 1) for line in info.splitlines() if ":" in line)
    flags = lines.get("flags", "").split()
    return {
        "cpu": lines.get("model name", platform.processor()).strip(),
        "architecture": platform.machine(),
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "flags": [flag for flag in FLAGS if flag in flags],
        "system": f"{platform.system()} {platform.release()}",
    }


def sha256(model: Path) -> str:
    with open(model / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the command line -----------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    from lorafit.plan.machine import physical_cores

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("prepare", "measure"):
        action = actions.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        action.add_argument("--hf-model", type=path, required=True, help="the peers' model, made by `prepare`")
    action.add_argument("--data", type=path, required=True, help="holds banking77/ and bitext/")
    action.add_argument("--out", type=path, required=True, help="the results file")
    action.add_argument(
        "--model", type=path_or_name, default="smollm2-135m", help="the same model, as lorafit reads it"
    )
    action.add_argument("--engines", type=names(ENGINES), help=f"of {', '.join(ENGINES)}")
    action.add_argument("--works", type=names(WORKS), default=list(WORKS), help=f"of {', '.join(WORKS)}")
    action.add_argument("--repeats", type=int, default=3, help="repeat k has seed k")
    action.add_argument("--rows", type=int, default=320, help="most rows that are trained on")
    action.add_argument("--eval-rows", type=int, default=160)
    action.add_argument("--threads", type=int, default=physical_cores())
    action.add_argument("--peers-python", default=sys.executable, help="has TRL and PEFT")
    action.add_argument("--unsloth-python", help="has Unsloth")
    action.add_argument("--scratch", type=path, help="where runs are written, and removed again")
    return parser.parse_args()


def path(text: str) -> Path:
    return Path(text).absolute()


def path_or_name(text: str) -> str:
    return str(path(text)) if Path(text).exists() else text


def names(known: dict[str, Any]) -> Any:
    def parse(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := [name for name in asked if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return asked

    return parse


def main() -> None:
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception it ends the child too
    if given.action == "prepare":
        prepare(given.hf_model)
        return
    needs_unsloth = any(ENGINES[engine].kind == "unsloth" for _, _, engine in wanted(given))
    if needs_unsloth and not given.unsloth_python:
        raise SystemExit("--unsloth-python is missing; or leave Unsloth out by --engines")
    if failed := measure(given):
        raise SystemExit(f"{failed} runs failed; the same command tries them again")


if __name__ == "__main__":
    main()
