"""Predictions against measurements: peak memory and time of runs over batch, length, rank, precision and storage.

    python benchmarks/plan_error/run.py measure --out results/NAME.json [--model llama-0.4b] [--repeats 3]
    python benchmarks/plan_error/run.py table results/NAME.json

Every cell is `lorafit train` in a fresh process, on rows of random text of one length that share nothing, all tokens
with a loss. The peak is VmHWM, the median of the repeats. Time is that of the steps after the first, which may compile;
predicted by what `lorafit plan --calibrate` found on this machine before the grid began, in a cache of its own.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_speed"))
from engines import revision
from run import machine

STEPS = 5
BATCHES, LENGTHS, RANKS = (4, 16), (128, 512), (8, 64)
WAYS = {
    "smollm2-135m": (("fp32", "auto"), ("bf16", "auto"), ("int8", "auto"), ("bf16", "keep")),
    "llama-0.4b": (("fp32", "auto"), ("bf16", "auto"), ("int8", "auto"), ("bf16", "nf4"), ("bf16", "int8")),
}
Result = dict[str, Any]


def measure(given: argparse.Namespace) -> None:
    found = json.loads(given.out.read_text()) if given.out.exists() else {"machine": machine(), "runs": []}
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="plan_error.") as directory:
        scratch = Path(directory)
        os.environ["LORAFIT_CACHE"] = str(scratch / "cache")
        model = given.model if given.model == "smollm2-135m" else str(write_llama(scratch / given.model))
        subprocess.run([sys.executable, "-m", "lorafit", "plan", model, "--calibrate", "--json"], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
        cells = itertools.product(range(given.repeats), WAYS[given.model], BATCHES, LENGTHS, RANKS)
        for repeat, (precision, storage), batch, length, r in cells:
            cell = {"model": given.model, "precision": precision, "storage": storage, "batch": batch}
            cell |= {"length": length, "r": r, "repeat": repeat}
            if any(all(run[key] == value for key, value in cell.items()) for run in found["runs"]):
                continue
            found["runs"].append(cell | revision() | one(model, cell, scratch))
            given.out.write_text(json.dumps(found, indent=1) + "\n")
            print(told(found["runs"][-1:]), flush=True)


def one(model: str, cell: Result, scratch: Path) -> Result:
    data, run = scratch / "text.jsonl", scratch / "run"
    words = random.Random(0)
    text = " ".join(
        "".join(words.choices("etaoinshrdlu", k=words.randint(2, 9))) for _ in range(24 * cell["batch"] * 128)
    )
    data.write_text(json.dumps({"text": text[: 6 * cell["batch"] * cell["length"]]}))
    command = [sys.executable, "-m", "lorafit", "train", model, str(data), "-o", str(run), "--json", "--no-shuffle"]
    command += ["--precision", cell["precision"], "--base-storage", cell["storage"], "--r", str(cell["r"])]
    command += ["--batch-size", str(cell["batch"]), "--seq-len", str(cell["length"]), "--max-steps", str(STEPS)]
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
        "predicted_step_s": expected / STEPS if expected is not None else None,
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


def told(runs: list[Result]) -> str:
    """One line of the table, of the repeats of one cell."""
    first = runs[0]
    peak = statistics.median(run["peak_rss_bytes"] for run in runs)
    step = statistics.median(run["step_s"] for run in runs)
    expected = first["predicted_step_s"]
    time = f"{expected / step:.2f}" if expected is not None else "-"
    way = first["precision"] if first["storage"] == "auto" else f"{first['precision']}, {first['storage']}"
    return (
        f"| {first['model']} | {way} | {first['batch']} x {first['length']} | {first['r']} | {peak / 1e9:.2f} "
        f"| {first['predicted_peak_bytes'] / peak:.3f} | {step:.2f} | {time} |"
    )


def table(given: argparse.Namespace) -> None:
    runs: list[Result] = json.loads(given.results.read_text())["runs"]
    keys = ("model", "precision", "storage", "batch", "length", "r")
    cells: dict[tuple[Any, ...], list[Result]] = {}
    for run in runs:
        cells.setdefault(tuple(run[key] for key in keys), []).append(run)
    print("| model | way | rows x tokens | rank | peak, GB | predicted / measured | a step, s | predicted / measured |")
    print("|---|---|---|---|---|---|---|---|")
    for own in cells.values():
        print(told(own))
    ratios = [
        own[0]["predicted_peak_bytes"] / statistics.median(run["peak_rss_bytes"] for run in own)
        for own in cells.values()
    ]
    within = sum(0.95 <= ratio <= 1.10 for ratio in ratios)
    print(f"\npeak: {min(ratios):.3f} to {max(ratios):.3f}; {within} of {len(ratios)} cells within 0.95..1.10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    action = actions.add_parser("measure")
    action.add_argument("--out", type=Path, required=True)
    action.add_argument("--model", choices=WAYS, default="smollm2-135m")
    action.add_argument("--repeats", type=int, default=3)
    action.add_argument("--scratch", type=Path)
    action.set_defaults(run=measure)
    action = actions.add_parser("table")
    action.add_argument("results", type=Path)
    action.set_defaults(run=table)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
