"""What the peers' scripts share: arguments, rows, clocks, settings of the trainers, the line of JSON that each prints.

Imports the standard library alone, so that what a script imports is timed as its peer's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

R, ALPHA, LR = 16, 32, 2e-4
# All linear layers of a Llama block, by name: PEFT does not take `all-linear` together with layers_to_transform.
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VERSIONED = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "unsloth", "unsloth_zoo")
Row = dict[str, Any]


def options(modes: Iterable[str]) -> argparse.Namespace:
    """The command line, the same for every peer. layers: how many of the last decoder layers are adapted, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=list(modes))
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("data", type=Path, help="rows of `messages` or of `text`")
    parser.add_argument("out", type=Path, help="where the adapter is saved in PEFT's format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def read_rows(path: Path) -> list[Row]:
    """Rows as TRL wants them: `text` as it is; a conversation's last message is the completion, which is learned."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {"text": row["text"]} if "text" in row else {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        for row in rows
    ]


def adapted_layers(model_dir: Path, last: int | None) -> list[int] | None:
    """Indices of the last decoder layers, for PEFT's layers_to_transform; None for all."""
    if last is None:
        return None
    count = json.loads((model_dir / "config.json").read_text())["num_hidden_layers"]
    return list(range(count - last, count))


def trainer_settings(given: argparse.Namespace) -> dict[str, Any]:
    """What TRL's SFTConfig is told, by TRL's script and by Unsloth's. The rest is its default."""
    return {
        "output_dir": str(given.out),
        "num_train_epochs": given.epochs,
        "per_device_train_batch_size": given.batch_size,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "gradient_checkpointing": False,
        "seed": given.seed,
        "train_sampling_strategy": "sequential",  # the benchmark has shuffled the file, for all engines alike
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class Clock:
    """Seconds of each phase, one after the other."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def step_clock(base: type) -> Any:
    """A trainer's callback, of the class `base`, whose `seconds` holds how long each optimizer step took.

    The first counts from where training begins.
    """

    class StepClock(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._last = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self._last)
            self._last = now

    return StepClock()


def tokens_of(dataset: Any) -> int:
    """Tokens of a data set that a trainer has tokenised, padding not counted."""
    return sum(len(ids) for ids in dataset["input_ids"])


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, mapped pages included."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def report(clock: Clock, step_s: list[float], **result: Any) -> None:
    """Print the result. result: train_loss (mean over all steps), tokens, dtype."""
    common = {"steps": len(step_s), "step_s": step_s, "peak_rss_bytes": peak_rss_bytes(), "versions": versions()}
    print(json.dumps(clock.laps | result | common), flush=True)
