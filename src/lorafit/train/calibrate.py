"""How fast this machine trains: a few steps of a small random model in each precision, kept for plans.

Random weights and tokens will do: what a step costs does not depend on their values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from lorafit.model.spec import ModelSpec
from lorafit.plan import memory
from lorafit.train.optim import adamw

STEPS = 5
# Two passes of 768 tokens: between the smallest and the largest that there usually are.
ROWS, LENGTH, MICRO_TOKENS = 6, 256, 1024
# A few layers of the model, with as large a part of its vocabulary: what they cost is in the same proportions.
# Twelve do not stay in the caches, as the whole model does not.
LAYERS = 12
# A model whose few layers are larger is stood in for by a small one.
MOST_PARAMETERS = 200_000_000
VOCAB, WIDTH = 16384, 768


@dataclass(frozen=True)
class Speed:
    """Of some steps. first_s: the first, apart. step_s: the others. flop: of one. flop_per_s: of the others' median.

    mfu: the share of the rate of products that this is. number_s: see `rates.Rates`; it is not in flop_per_s.
    """

    first_s: float
    step_s: tuple[float, ...]
    flop: int
    flop_per_s: float
    mfu: float
    number_s: float


def calibrate(threads: int, spec: ModelSpec, console: Console) -> None:
    """Measure products, and training of a part of this model in every precision; keep what was found.

    Takes about half a minute.
    """
    torch.set_num_threads(threads)
    for name in precision.known():
        model, width = _part_of(spec, precision.DTYPES[name])
        vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        speed = measure(model, name, random_rows(ROWS, LENGTH, vocabulary), r=16)
        reached = {rates.run_key(name, width): speed.flop_per_s}
        rates.keep(threads, rates.Rates(reached=reached, number_s=speed.number_s))
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
    seconds, updates = list[float](), list[float]()
    before = TALLY.flop
    for _ in range(steps):
        started = time.perf_counter()
        for batch in micro_batches(rows, numbers, MICRO_TOKENS, engine.packing):
            (engine.training_loss(batch) / supervised).backward()  # type: ignore[no-untyped-call]
        passed = time.perf_counter()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
        updates.append(time.perf_counter() - passed)
    flop = (TALLY.flop - before) // steps
    update = statistics.median(updates[1:])
    speed = flop / (statistics.median(seconds[1:]) - update)
    mfu = speed / precision.flop_per_s(again=True)[name]
    return Speed(seconds[0], tuple(seconds[1:]), flop, speed, mfu, update / sum(p.numel() for p in parameters))


def random_rows(count: int, length: int, vocab: int) -> list[Encoded]:
    """Rows of random tokens, all but the first with a loss."""
    random = np.random.default_rng(0)
    supervised = np.arange(length) > 0
    return [
        Encoded(random.integers(0, vocab, length).astype(np.int32), supervised, 0, f"random:{number}")
        for number in range(count)
    ]


def _part_of(spec: ModelSpec, dtype: torch.dtype) -> tuple[nn.Module, int]:
    """(a random model built as this one, with fewer layers and tokens; its width)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = min(LAYERS, spec.layers)
    share = layers / max(1, spec.layers)
    if not 0 < spec.parameters * share <= MOST_PARAMETERS:
        return _small_llama(dtype), WIDTH
    try:
        config = AutoConfig.for_model(**dict(spec.config))
        text = config.get_text_config()
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        text.num_hidden_layers, text.vocab_size = layers, max(1024, round(spec.vocab * share))
        text.pad_token_id = text.bos_token_id = text.eos_token_id = None
        build: Any = AutoModelForCausalLM.from_config  # transformers' Auto classes are untyped
        model: nn.Module = build(config, attn_implementation="eager")
    except (ValueError, KeyError, TypeError, AttributeError):  # what transformers cannot build from its config
        return _small_llama(dtype), WIDTH
    return model.to(dtype).eval(), spec.hidden


def _small_llama(dtype: torch.dtype) -> nn.Module:
    """As wide as small models are, a few layers deep."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(dtype).eval()
