"""The intrinsic dimension of sets: how many directions of a random subspace training needs, beside the rank it needs.

    python benchmarks/rank_advice/intrinsic.py --data DIR [--sets chat12,mawps] [--precision fp32] [--threads N]

W0 + sum of g_i b_i a_i^T, with a_i, b_i drawn at random and frozen, spread evenly over all linear weights of the
blocks, and d numbers g trained: a random subspace of d rank-one directions. (Li et al. 2018 draw it from all of the
space; directions of rank one run at LoRA's speed.) d90 is the least d, on a line between those tried, at which the
held-out loss has fallen by 90% of what the best of LoRA's ranks made it fall by, as results/SET.json has it (`run.py
separate`). DIMENSIONS are gone through outwards until the two are known that d90 lies between; each is tried at
RATES from the one that was best before outwards. What results/SET.json holds is not run again.
Sources: Li et al. 2018, Measuring the intrinsic dimension of objective landscapes; Aghajanyan et al. 2020.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rank_advice.run import EPOCHS, MODEL, RESULTS, SETS, outward, revision, write_rows
from rank_advice.table import compared, mean_losses

from lorafit.config import LoRAConfig, TrainConfig
from lorafit.data.batching import step_rows
from lorafit.data.formats import read_examples
from lorafit.data.load import locate
from lorafit.data.mask import encode_all
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded
from lorafit.engine.engine import Engine, prepare
from lorafit.errors import NumericsError
from lorafit.infer.evaluate import mean_loss, model_loss
from lorafit.lora import gates
from lorafit.lora.inject import attached_layers
from lorafit.lora.targets import ALL_LINEAR, select
from lorafit.methods import lora
from lorafit.opening import open_target
from lorafit.plan import machine
from lorafit.train.optim import adamw, clip_gradients, rate, set_rate

DIMENSIONS = (64, 256, 1024, 4096, 16384, 32768)
FIRST_DIMENSION = 2
# Peak rates of the numbers g: each moves W by about its rate, whatever d is.
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
FIRST = 2
BATCH, MICRO_TOKENS, SEED = 16, 1024, 0
SHARE = 0.9


def ranks_of(names: list[str], d: int) -> dict[str, int]:
    """d directions over these weights, as evenly as can be; which get one more is drawn."""
    order = np.random.default_rng(SEED).permutation(len(names))
    each, more = divmod(d, len(names))
    found = {names[n]: each + (place < more) for place, n in enumerate(order)}
    return {name: r for name, r in found.items() if r}


def trained(d: int, lr: float, train: list[Encoded], valid: list[Encoded], model: Any) -> float:
    """The held-out loss of d directions after EPOCHS epochs, the best of an evaluation after each."""
    ranks = ranks_of(list(select(model, ALL_LINEAR).names), d)
    alphas = {name: float(r) for name, r in ranks.items()}  # scaling 1
    config = LoRAConfig(r=1, alpha=1, targets=sorted(ranks), rank_pattern=ranks, alpha_pattern=alphas)
    lora.attach(model, config)
    layers = list(attached_layers(model))
    gates.put_on(layers, SEED)
    for layer in layers:
        layer.lora_A.requires_grad_(False)
        layer.lora_B.requires_grad_(False)
    engine, numbers = prepare(model, share_prefix=True), [layer.gate for layer in layers]
    optimizer = adamw(numbers, lr, (0.9, 0.999), 0.0)
    per_epoch = -(-len(train) // BATCH)
    best, steps = mean(engine, valid), per_epoch * EPOCHS
    for step in range(steps):
        set_rate(optimizer, rate(step, steps, lr, "linear", 0.05))
        rows = step_rows(len(train), BATCH, SEED, *divmod(step, per_epoch))
        batches = list(micro_batches(train, rows, MICRO_TOKENS, engine.packing))
        supervised = sum(batch.supervised_tokens for batch in batches)
        for batch in batches:
            (engine.loss(batch) / supervised).backward()
        clip_gradients(numbers, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % per_epoch == 0:
            best = min(best, mean(engine, valid))
    return best


def mean(engine: Engine, rows: list[Encoded]) -> float:
    engine.model.eval()
    try:
        return mean_loss(engine, rows, MICRO_TOKENS, lambda _: None)
    except NumericsError:
        return math.inf


class Tried:
    """What d directions lose on one set at which rates, kept in its file."""

    def __init__(self, name: str, given: argparse.Namespace, scratch: Path) -> None:
        self.file = given.out / f"{name}.json"
        self.precision = given.precision
        self.sides = write_rows(given.data, name, scratch)
        self.whole = json.loads(self.file.read_text())
        self.found = self.whole.setdefault("intrinsic", {"runs": [], "precision": given.precision, **revision()})
        self.first = FIRST

    def opened(self) -> tuple[Any, list[Encoded], list[Encoded]]:
        """The base, rows to train on and rows to measure."""
        opened = open_target(MODEL, None, 1.0, self.precision, False, Console(stderr=True))
        seq_len = int(TrainConfig.model_fields["seq_len"].default)
        examples = [read_examples(locate(str(side)).train().rows()) for side in self.sides]
        train, valid = (encode_all(own, opened.tokenizer, seq_len).encoded for own in examples)
        opened.model.requires_grad_(False)
        return opened.model, train, valid

    def base(self) -> float:
        """What the base loses."""
        if "base" not in self.found:
            model, _, valid = self.opened()
            self.found["base"] = model_loss(model, valid, MICRO_TOKENS)
            self.write()
        return float(self.found["base"])

    def loss(self, d: int, lr: float) -> float:
        """One run, made now if there is none yet."""
        known = next((run for run in self.found["runs"] if (run["d"], run["lr"]) == (d, lr)), None)
        if known is None:
            model, train, valid = self.opened()
            loss = trained(d, lr, train, valid, model)
            known = {"d": d, "lr": lr, "loss": loss if math.isfinite(loss) else None}
            self.found["runs"].append(known)
            self.write()
            print(self.file.stem, known, flush=True)
        return math.inf if known["loss"] is None else float(known["loss"])

    def best(self, d: int) -> float:
        """The loss at the best rate."""
        self.first = outward(self.first, lambda step: self.loss(d, RATES[step]), len(RATES) - 1)
        return self.loss(d, RATES[self.first])

    def write(self) -> None:
        self.file.write_text(json.dumps(self.whole) + "\n")


def search(one: Tried) -> None:
    """The two dimensions next to each other between which the loss has fallen enough, and d90 on the line of them."""
    best = min(mean_losses(compared(one.whole)).values())
    wanted = one.base() - SHARE * (one.base() - best)
    losses = dict[int, float]()

    def is_enough(n: int) -> bool:
        losses[DIMENSIONS[n]] = one.best(DIMENSIONS[n])
        return losses[DIMENSIONS[n]] <= wanted

    low, high = FIRST_DIMENSION - 1, FIRST_DIMENSION
    if is_enough(high):
        while low >= 0 and is_enough(low):
            low, high = low - 1, low
    else:
        low, high = high, high + 1
        while high < len(DIMENSIONS) and not is_enough(high):
            low, high = high, high + 1
    one.found |= {"wanted": wanted, "d90": between(low, high, losses, wanted)}
    one.write()
    print(one.file.stem, "d90", one.found["d90"], losses, wanted, flush=True)


def between(low: int, high: int, losses: dict[int, float], wanted: float) -> float | None:
    """Where the line between two dimensions, over their logarithms, crosses what is asked for; None beyond the last."""
    if high == len(DIMENSIONS):
        return None
    more = DIMENSIONS[high]
    if low < 0:
        return float(more)
    d = DIMENSIONS[low]
    return float(d * (more / d) ** ((losses[d] - wanted) / (losses[d] - losses[more])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--sets", default=",".join(list(SETS)[:2]))
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=machine.physical_cores())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="intrinsic.") as directory:
        for name in given.sets.split(","):
            search(Tried(name, given, Path(directory)))


if __name__ == "__main__":
    main()
