"""How long SmolLM2's GGUF takes to load, model and tokenizer, in fresh processes: ours, and transformers' own loader.

python benchmarks/load_time/run.py
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OURS = """
import time, torch, transformers
from lorafit.model import load, spec
start = time.perf_counter()
load.load(spec.read("smollm2-135m"), torch.float32)
print(time.perf_counter() - start)
"""
THEIRS = """
import time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from lorafit.model import spec
path = spec.read("smollm2-135m").path
start = time.perf_counter()
AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
print(time.perf_counter() - start)
"""


def seconds(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    from lorafit.train.outcome import versions

    ours, theirs = [], []
    for repeat in range(5):
        ours.append(seconds(OURS))
        if repeat < 3:
            theirs.append(seconds(THEIRS))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
    result = {
        "commit": commit,
        "machine": platform.machine(),
        "versions": versions(),
        "lorafit_s": ours,
        "transformers_s": theirs,
        "lorafit_median_s": statistics.median(ours),
        "transformers_median_s": statistics.median(theirs),
    }
    (HERE / "results" / "smollm2-135m.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
