"""How fast this machine trains: a few steps of a small random model in each precision, kept for plans.

Random weights and tokens will do: what a step costs does not depend on their values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from torch import nn

from lorafit import rates
from lorafit.config import LoRAConfig
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded
from lorafit.engine import precision
from lorafit.engine.engine import prepare
from lorafit.engine.tally import TALLY
from lorafit.methods import lora
from lorafit.plan import memory
from lorafit.train.optim import adamw

STEPS = 5
ROWS, LENGTH, MICRO_TOKENS = 8, 256, 1024
VOCAB, WIDTH = 16384, 768


@dataclass(frozen=True)
class Speed:
    """Of some steps. first_s: the first, apart. step_s: the others. flop: of one. mfu: of the others' median."""

    first_s: float
    step_s: tuple[float, ...]
    flop: int
    mfu: float


def calibrate(threads: int, console: Console) -> None:
    """Measure products and training in every precision, about half a minute, and keep what was found."""
    torch.set_num_threads(threads)
    precision.flop_per_s()
    for name in ("fp32", "bf16", "int8"):
        speed = measure(_small_llama(precision.DTYPES[name]), name, random_rows(ROWS, LENGTH, VOCAB), r=16)
        rates.keep(threads, rates.Rates(mfu={rates.run_key(name, WIDTH): speed.mfu}))
        console.print(f"{name}: training reaches {speed.mfu:.0%} of what products reach", highlight=False)


def measure(model: nn.Module, name: str, rows: Sequence[Encoded], r: int, steps: int = STEPS) -> Speed:
    """Train a model without an adapter for some steps on all rows at once. name: the precision it was loaded for."""
    lora.attach(model, LoRAConfig(r=r, alpha=2 * r))
    engine = prepare(model, share_prefix=True)
    numbers = range(len(rows))
    if name == "int8":
        engine.use_int8(micro_batches(rows, numbers, memory.CALIBRATION_TOKENS, engine.packing)[0], release=True)
    engine.release_weights()
    parameters = list(lora.METHOD.trainable(model).values())
    optimizer = adamw(parameters, 2e-4, (0.9, 0.999), 0.0)
    supervised = sum(int(row.supervised.sum()) for row in rows)
    seconds: list[float] = []
    before = TALLY.flop
    for _ in range(steps):
        started = time.perf_counter()
        for batch in micro_batches(rows, numbers, MICRO_TOKENS, engine.packing):
            (engine.training_loss(batch) / supervised).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    flop = (TALLY.flop - before) // steps
    mfu = flop / statistics.median(seconds[1:]) / precision.flop_per_s()[name]
    return Speed(seconds[0], tuple(seconds[1:]), flop, mfu)


def random_rows(count: int, length: int, vocab: int) -> list[Encoded]:
    """Rows of random tokens, all but the first with a loss."""
    random = np.random.default_rng(0)
    supervised = np.arange(length) > 0
    return [
        Encoded(random.integers(0, vocab, length).astype(np.int32), supervised, 0, f"random:{number}")
        for number in range(count)
    ]


def _small_llama(dtype: torch.dtype) -> nn.Module:
    """As wide as small models are, a few layers deep."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(dtype).eval()
