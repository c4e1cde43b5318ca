"""What a run would need and take, in each precision: memory by parts, operations, time, energy."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.model.spec import ModelSpec
from lorafit.plan import memory
from lorafit.plan.flops import Flop, causal_pairs, full_step, lora_step
from lorafit.plan.memory import MemoryEstimate, Split
from lorafit.plan.storage import BLOCK_TYPES
from lorafit.rates import Rates, way

PRECISIONS = ("int8", "bf16", "fp32")
# What is in which type.
TYPES = {
    "int8": "frozen weights and products in int8, activations in bf16; adapter, optimizer, norms and loss in fp32",
    "bf16": "frozen weights, products and activations in bf16; adapter, optimizer, norms and loss in fp32",
    "fp32": "everything in fp32",
}
# Where no run has told yet what share of the machine's rate training reaches, and what is left of it where weights
# are decoded for each product.
ASSUMED_MFU = {"fp32": 0.40, "bf16": 0.50, "int8": 0.35}
DECODING = 0.9
J_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Shape:
    """The rows of a run. batch: of an optimizer step. length: tokens of each. loss_share: of tokens with a loss."""

    batch: int
    length: int
    loss_share: float = 1.0
    micro_tokens: int = 1024

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.length

    def micro(self, at_most: int) -> int:
        """Tokens of the largest forward pass that stays below at_most; a row is never cut."""
        rows = max(1, min(self.tokens, at_most) // self.length)
        return min(rows, self.batch) * self.length


@dataclass(frozen=True)
class Forecast:
    """A run in one precision. step_s, tokens_per_s: None where this machine's rate is not known.

    storage: that of frozen weights, as --base-storage.
    split: how a step is computed. fits: into the memory given.
    """

    precision: str
    storage: str
    memory: MemoryEstimate
    split: Split
    fits: bool
    flop: Flop
    step_s: float | None
    tokens_per_s: float | None

    def energy_kwh(self, watts: float, steps: int) -> float | None:
        """Of so many steps at a steady power."""
        return None if self.step_s is None else watts * self.step_s * steps / J_PER_KWH


def ways(spec: ModelSpec) -> list[tuple[str, str]]:
    """(precision, storage of frozen weights) of every way in which the model could be trained."""
    in_blocks = any(name in BLOCK_TYPES for name in spec.storage)
    stored = ["nf4", "int8"] if spec.kind == "hf" else ["keep"] if in_blocks else []
    return [(precision, "auto") for precision in PRECISIONS] + [("bf16", storage) for storage in stored]


def forecast(
    spec: ModelSpec, r: int, shape: Shape, precision: str, limit: int, rates: Rates, storage: str = "auto"
) -> Forecast:
    """The fastest way to run in this precision that fits into `limit` bytes, or, where none does, what needs least."""
    tried = []
    for split in memory.splits(shape.micro_tokens):
        tokens = shape.micro(split.micro_tokens)
        predicted = max(1, round(shape.loss_share * tokens))
        estimate = memory.estimate(spec, r, precision, tokens, predicted, split.recompute, storage)
        tried.append((estimate, split))
        if estimate.fits(limit):
            break
    estimate, split = min(tried, key=lambda one: one[0].peak_bytes)
    flop = step_flop(spec, r, shape, ends_early=precision != "fp32")
    step_s = _seconds(spec, flop, precision, storage, split.recompute, rates)
    return Forecast(
        precision=precision,
        storage=storage,
        memory=estimate,
        split=split,
        fits=estimate.fits(limit),
        flop=flop,
        step_s=step_s,
        tokens_per_s=shape.tokens / step_s if step_s else None,
    )


def step_flop(spec: ModelSpec, r: int, shape: Shape, ends_early: bool = False) -> Flop:
    """Of one step of LoRA on rows that share nothing. ends_early: as the engine does in 16 bits (docs/plan.md)."""
    predicted = round(shape.loss_share * shape.tokens)
    pairs = causal_pairs([shape.length] * shape.batch)
    return lora_step(spec, r, shape.tokens, predicted, pairs, predicted if ends_early else None)


def full_flop(spec: ModelSpec, shape: Shape) -> Flop:
    """The same with all weights trained."""
    predicted = round(shape.loss_share * shape.tokens)
    return full_step(spec, shape.tokens, predicted, causal_pairs([shape.length] * shape.batch))


def _seconds(spec: ModelSpec, flop: Flop, precision: str, storage: str, recompute: bool, rates: Rates) -> float | None:
    rate = rates.flop_per_s.get(precision)
    if not rate:
        return None
    done = flop.total + (flop.forward if recompute else 0)
    return done / (rate * _reached(spec, precision, storage, rates))


def _reached(spec: ModelSpec, precision: str, storage: str, rates: Rates) -> float:
    """The share of the machine's rate that training reaches: measured, else what weights in 16 bits reach."""
    own = rates.mfu_of(way(precision, storage), spec.hidden)
    if own:
        return own
    plain = rates.mfu_of(precision, spec.hidden) or ASSUMED_MFU[precision]
    return plain * (1 if storage == "auto" else DECODING)


def fastest(forecasts: list[Forecast]) -> Forecast | None:
    """Of those that fit; where no time is known, the one of the fewest bits."""
    fitting = [one for one in forecasts if one.fits]
    return min(fitting, key=lambda one: one.step_s or 0.0) if fitting else None
