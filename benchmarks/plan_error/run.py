"""Predictions against measurements: peak memory and time of runs over method, batch, length, rank, precision, storage.

    python benchmarks/plan_error/run.py measure --out results/NAME.json [--model llama-0.4b] [--repeats 3] [--methods]
    python benchmarks/plan_error/run.py predict results/NAME.json ...
    python benchmarks/plan_error/run.py table            (puts all results into docs/plan.md)

Every cell is `lorafit train` in a fresh process, on rows of random text of one length that share nothing, all tokens
with a loss. The peak is VmHWM, the median of the repeats. Time is that of the steps after the first.
`--methods` measures other methods than LoRA in the place of it, over fewer shapes.
`predict` asks `lorafit plan`, calibrated on this machine in a cache of its own, for every cell of results, and puts
what it says beside what was measured: predictions are those of the code at hand. Calibrating measures LoRA; of every
other method one run of PRACTICE is made before, as a user has it who has trained so once. It calibrates CALIBRATIONS
times, as the machine's speed drifts, and the median of what is predicted counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_speed"))
from engines import revision
from run import machine

# Of a step's time the median of those after the first; long steps spread less.
STEPS, STEPS_OF_MANY_ROWS = 5, 3
BATCHES, LENGTHS, RANKS = (4, 16), (128, 512), (8, 64)
WAYS = {
    "smollm2-135m": (("fp32", "auto"), ("bf16", "auto"), ("int8", "auto"), ("bf16", "keep")),
    "llama-0.4b": (("fp32", "auto"), ("bf16", "auto"), ("int8", "auto"), ("bf16", "nf4"), ("bf16", "int8")),
}
# Other methods than LoRA, by what their rows are called: what train and plan are told, and in which precisions.
METHODS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "adapter:pfeiffer": (["--method", "adapter"], ("bf16", "int8")),
    "adapter:houlsby": (["--method", "adapter", "--variant", "houlsby"], ("bf16",)),
    "prefix:p-tuning-v2": (["--method", "prefix"], ("bf16", "int8")),
    "ia3": (["--method", "ia3"], ("bf16",)),
    "bitfit": (["--method", "bitfit"], ("bf16",)),
    "lora:dora": (["--variant", "dora"], ("bf16", "int8")),
    "full": (["--method", "full"], ("fp32",)),
    "full, --layers last:2": (["--method", "full", "--layers", "last:2"], ("fp32",)),
}
# Of another shape than any cell; a run of ten steps is one that the machine's speed is known by.
PRACTICE: dict[str, Any] = {"storage": "auto", "batch": 8, "length": 256, "r": 16}
PRACTICE_STEPS = 10
CALIBRATIONS = 3
METHOD_BATCHES, METHOD_LENGTHS, METHOD_RANK = (4,), (128, 512), 16
Result = dict[str, Any]


def cells(given: argparse.Namespace) -> Iterator[Result]:
    """What is to be measured, one run after the other."""
    shapes = itertools.product(BATCHES, LENGTHS, RANKS)
    ways = [
        ("lora", precision, storage, *shape)
        for (precision, storage), shape in itertools.product(WAYS[given.model], shapes)
    ]
    if given.methods:
        shapes = itertools.product(METHOD_BATCHES, METHOD_LENGTHS, (METHOD_RANK,))
        kinds = [(name, precision, "auto") for name, (_, precisions) in METHODS.items() for precision in precisions]
        ways = [(*kind, *shape) for kind, shape in itertools.product(kinds, shapes)]
    for repeat, (method, precision, storage, batch, length, r) in itertools.product(range(given.repeats), ways):
        cell = {"model": given.model, "method": method, "precision": precision, "storage": storage, "batch": batch}
        yield cell | {"length": length, "r": r, "repeat": repeat}


def method_of(run: Result) -> str:
    """LoRA in results that are older than other methods."""
    return str(run.get("method", "lora"))


def flags_of(run: Result) -> list[str]:
    name = method_of(run)
    return METHODS[name][0] if name in METHODS else []


def measure(given: argparse.Namespace) -> None:
    found = json.loads(given.out.read_text()) if given.out.exists() else {"machine": machine(), "runs": []}
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="plan_error.") as directory:
        scratch = Path(directory)
        os.environ["LORAFIT_CACHE"] = str(scratch / "cache")
        model = given.model if given.model == "smollm2-135m" else str(write_llama(scratch / given.model))
        planned(model, "--calibrate")
        for cell in cells(given):
            known = ({"method": "lora"} | run for run in found["runs"])
            if any(all(run[key] == value for key, value in cell.items()) for run in known):
                continue
            found["runs"].append(cell | revision() | one(model, cell, scratch))
            given.out.write_text(json.dumps(found, indent=1) + "\n")
            print(told(found["runs"][-1:]), flush=True)


def write_rows(cell: Result, data: Path) -> None:
    """Random words, enough for a step."""
    words = random.Random(0)
    text = " ".join(
        "".join(words.choices("etaoinshrdlu", k=words.randint(2, 9))) for _ in range(24 * cell["batch"] * 128)
    )
    data.write_text(json.dumps({"text": text[: 6 * cell["batch"] * cell["length"]]}))


def predict(given: argparse.Namespace) -> None:
    """Put the plan's predictions into results, in the place of those of another time."""
    for file in given.results:
        found = json.loads(file.read_text())
        runs = [run for run in found["runs"] if given.method in (None, method_of(run))]
        with tempfile.TemporaryDirectory(dir=given.scratch, prefix="plan_error.") as directory:
            scratch, name = Path(directory), found["runs"][0]["model"]
            model = name if name == "smollm2-135m" else str(write_llama(scratch / name))
            os.environ["LORAFIT_CACHE"] = str(scratch / "cache")
            practise(model, runs, scratch)
            said = [predictions(model, runs, scratch) for _ in range(CALIBRATIONS)]
        for run in runs:
            own = [one[cell_of(run)] for one in said]
            run |= {key: statistics.median(one[key] for one in own) for key in own[0]}
        found["predicted"] = revision()
        file.write_text(json.dumps(found, indent=1) + "\n")


def practise(model: str, runs: list[Result], scratch: Path) -> None:
    """One run of every method but LoRA, whose speed is kept."""
    for method, precision in sorted({(method_of(run), run["precision"]) for run in runs}):
        if method in METHODS:
            one(model, PRACTICE | {"method": method, "precision": precision}, scratch, PRACTICE_STEPS)


def predictions(model: str, runs: list[Result], scratch: Path) -> dict[tuple[Any, ...], Result]:
    """Of every cell, after calibrating."""
    planned(model, "--calibrate")
    return {cell_of(run): prediction(model, run, scratch) for run in {cell_of(run): run for run in runs}.values()}


def cell_of(run: Result) -> tuple[Any, ...]:
    return tuple(run.get(key, "lora") for key in KEYS)


def prediction(model: str, run: Result, scratch: Path) -> Result:
    """What `lorafit plan` says of a cell. Its few rows are seen again and again: a step is one of a later epoch."""
    write_rows(run, scratch / "text.jsonl")
    flags = ["--batch-size", run["batch"], "--seq-len", run["length"], "--r", run["r"], "--epochs", STEPS]
    plan = planned(model, str(scratch / "text.jsonl"), *map(str, flags), *flags_of(run))
    ways = {(one["precision"], one["base_storage"]): one for one in plan["runs"]}
    own = ways[run["precision"], run["storage"]]
    first = plan["steps"] // STEPS
    later_s = (own["train_s"] - first * own["step_s"]) / (plan["steps"] - first)
    return {"predicted_peak_bytes": own["peak_bytes"], "predicted_step_s": later_s}


def planned(model: str, *more: str) -> Result:
    done = subprocess.run(
        [sys.executable, "-m", "lorafit", "plan", model, *more, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def one(model: str, cell: Result, scratch: Path, steps: int | None = None) -> Result:
    data, run = scratch / "text.jsonl", scratch / "run"
    steps = steps or (STEPS if cell["batch"] < max(BATCHES) else STEPS_OF_MANY_ROWS)
    write_rows(cell, data)
    command = [sys.executable, "-m", "lorafit", "train", model, str(data), "-o", str(run), "--json", "--no-shuffle"]
    command += ["--precision", cell["precision"], "--base-storage", cell["storage"], "--r", str(cell["r"])]
    command += ["--batch-size", str(cell["batch"]), "--seq-len", str(cell["length"]), "--max-steps", str(steps)]
    command += flags_of(cell)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    subprocess.run(["rm", "-rf", str(run)], check=True)
    expected = result["predicted_train_s"]
    return {
        "predicted_peak_bytes": result["predicted_peak_bytes"],
        "peak_rss_bytes": result["peak_rss_bytes"],
        "predicted_step_s": expected / steps if expected is not None else None,
        "step_s": statistics.median(line["step_s"] for line in lines[1:] if "step_s" in line),
        "tokens_computed": result["tokens_computed"],
    }


def write_llama(path: Path) -> Path:
    """A random Llama of 0.4 billion parameters with a tokenizer of bytes, as a Hugging Face directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


# --- the table ------------------------------------------------------------------------------------------------------


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- generated by benchmarks/plan_error/run.py table -->", "<!-- /generated -->"
KEYS = ("model", "method", "precision", "storage", "batch", "length", "r")
PEAK, TIME = (0.95, 1.10), (0.80, 1.20)


def ratios(runs: list[Result]) -> tuple[float, float | None]:
    """Predicted over measured, of the repeats of one cell: peak, and time of a step."""
    peak = statistics.median(run["peak_rss_bytes"] for run in runs)
    expected = [run["predicted_step_s"] for run in runs]
    step = statistics.median(run["step_s"] for run in runs)
    known = None if None in expected else statistics.median(expected) / step
    return statistics.median(run["predicted_peak_bytes"] for run in runs) / peak, known


def told(runs: list[Result]) -> str:
    """One line of the table, of the repeats of one cell."""
    first, (peak, time) = runs[0], ratios(runs)
    measured = statistics.median(run["peak_rss_bytes"] for run in runs) / 1e9
    step = statistics.median(run["step_s"] for run in runs)
    way = first["precision"] if first["storage"] == "auto" else f"{first['precision']}, {first['storage']}"
    return (
        f"| {first['model']} | {method_of(first)} | {way} "
        f"| {first['batch']} x {first['length']} | {first['r']} | {len(runs)} "
        f"| {measured:.2f} | {peak:.3f} | {step:.2f} | {'-' if time is None else f'{time:.2f}'} |"
    )


def table(given: argparse.Namespace) -> None:
    """All results as one table, with how many cells are within the bounds, into the document."""
    runs = [run for file in sorted(RESULTS.glob("*.json")) for run in json.loads(file.read_text())["runs"]]
    found: dict[tuple[Any, ...], list[Result]] = {}
    for run in runs:
        own = {"method": method_of(run)} | run
        found.setdefault(tuple(own[key] for key in KEYS), []).append(own)
    lines = [
        "| model | method | way | rows x tokens | rank | runs | peak, GB | predicted / measured | a step, s "
        "| predicted / measured |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(told, found.values()),
    ]
    both = [ratios(own) for own in found.values()]
    peaks, times = [peak for peak, _ in both], [time for _, time in both if time is not None]
    inside = sum(PEAK[0] <= peak <= PEAK[1] for peak in peaks), sum(TIME[0] <= time <= TIME[1] for time in times)
    lines += [
        "",
        f"Peak: {min(peaks):.3f} to {max(peaks):.3f} of what was measured, {inside[0]} of {len(peaks)} cells within "
        f"{PEAK[0]} to {PEAK[1]}. Time: {min(times):.2f} to {max(times):.2f}, {inside[1]} of {len(times)} within 20%.",
    ]
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    action = actions.add_parser("measure")
    action.add_argument("--out", type=Path, required=True)
    action.add_argument("--model", choices=WAYS, default="smollm2-135m")
    action.add_argument("--repeats", type=int, default=3)
    action.add_argument("--methods", action="store_true", help="other methods in the place of LoRA")
    action.add_argument("--scratch", type=Path)
    action.set_defaults(run=measure)
    action = actions.add_parser("predict")
    action.add_argument("results", type=Path, nargs="+")
    action.add_argument("--method", help="of this method alone")
    action.add_argument("--scratch", type=Path)
    action.set_defaults(run=predict)
    action = actions.add_parser("table")
    action.set_defaults(run=table)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
