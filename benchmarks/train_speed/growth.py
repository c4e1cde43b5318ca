"""How a step's time and memory grow with the length of rows, the rank, and the size of the model. See README.md.

    python benchmarks/train_speed/growth.py --out benchmarks/train_speed/results/growth.json
    python benchmarks/train_speed/growth.py --table benchmarks/train_speed/results/growth.json

Random weights, random tokens, all of them with a loss: a step's cost does not depend on their values. Every case is a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS = {  # hidden, intermediate, layers, heads, key heads, vocabulary
    "0.13B": (576, 1536, 30, 9, 3, 49152),
    "0.4B": (1024, 2816, 28, 16, 8, 32000),
    "1.1B": (2048, 5632, 22, 32, 4, 32000),
}
STEPS, TOKENS = 5, 4096
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
RANKS = (4, 8, 16, 32, 64, 128)

Case = dict[str, Any]


def cases() -> list[Case]:
    """One thing at a time, from 0.13B, rows of 512 tokens, rank 16. Every step has 4,096 tokens; of sizes, 2,048."""
    by_length = [{"grows": "length", "model": "0.13B", "length": n, "rows": TOKENS // n, "r": 16} for n in LENGTHS]
    by_rank = [{"grows": "rank", "model": "0.13B", "length": 512, "rows": TOKENS // 512, "r": r} for r in RANKS]
    by_size = [{"grows": "size", "model": name, "length": 512, "rows": 4, "r": 16} for name in MODELS]
    return by_length + by_rank + by_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measured(json.loads(given.case), given.precision)))
    elif given.table:
        print(table(json.loads(given.table.read_text())))
    else:
        run_all(given)


def run_all(given: argparse.Namespace) -> None:
    from run import machine

    from lorafit.files import write_json

    runs = []
    for case in cases():
        command = [sys.executable, __file__, "--case", json.dumps(case), "--precision", given.precision]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        runs.append(case | json.loads(printed.splitlines()[-1]))
        print(runs[-1], flush=True)
        write_json(given.out, {"machine": machine(), "precision": given.precision, "steps": STEPS, "runs": runs})


def measured(case: Case, precision: str) -> Case:
    """Seconds of each step, the first apart, FLOP of one, and the process's peak."""
    import torch

    from lorafit.engine import precision as rates
    from lorafit.plan import machine
    from lorafit.train.calibrate import measure, random_rows

    torch.set_num_threads(machine.physical_cores())
    model = random_llama(case["model"], rates.DTYPES[precision])
    parameters = sum(p.numel() for p in model.parameters())
    rows = random_rows(case["rows"], case["length"], model.config.vocab_size)
    speed = measure(model, precision, rows, case["r"], STEPS)
    return {
        "first_step_s": speed.first_s,
        "step_s": list(speed.step_s),
        "flop": speed.flop,
        "mfu": speed.mfu,
        "peak_rss_bytes": machine.peak_rss_bytes(),
        "parameters": parameters,
    }


def random_llama(name: str, dtype: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocab = MODELS[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=name == "0.13B",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def table(results: dict[str, Any]) -> str:
    lines = [
        "| grows | model | rows x tokens | rank | a step, s | tokens/s | GFLOP a token | MFU | peak, GB |",
        "|---" * 9 + "|",
    ]
    for run in results["runs"]:
        tokens, step = run["rows"] * run["length"], statistics.median(run["step_s"])
        spread = f"{step:.2f} ({min(run['step_s']):.2f} to {max(run['step_s']):.2f})"
        lines.append(
            f"| {run['grows']} | {run['model']} | {run['rows']} x {run['length']} | {run['r']} | {spread} "
            f"| {tokens / step:,.0f} | {run['flop'] / tokens / 1e9:.2f} | {run['mfu']:.2f} "
            f"| {run['peak_rss_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
