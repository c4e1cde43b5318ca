"""The loss of any adapter in PEFT's format on rows, in fp32: `lorafit eval` without generation, one for all engines.

python benchmarks/train_speed/yardstick.py MODEL ROWS ADAPTER THREADS
"""

from __future__ import annotations

import json
import sys

from rich.console import Console

from lorafit.config import EvalConfig
from lorafit.use import evaluate


def main() -> None:
    model, rows, adapter, threads = sys.argv[1:]
    config = EvalConfig(
        target=model, data=rows, adapter=adapter, precision="fp32", generate=False, threads=int(threads)
    )
    report = evaluate(config, Console(stderr=True))
    print(json.dumps({"loss": report["loss"], "tokens_supervised": report["tokens_supervised"]}))


if __name__ == "__main__":
    main()
