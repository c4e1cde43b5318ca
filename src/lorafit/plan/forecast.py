"""What a run would need and take, in each precision: memory by parts, operations, time, energy."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.model.spec import ModelSpec
from lorafit.plan import memory
from lorafit.plan.flops import Flop, causal_pairs, full_step, lora_step
from lorafit.plan.memory import MemoryEstimate
from lorafit.rates import Rates

PRECISIONS = ("int8", "bf16", "fp32")
# Where no run has told yet what share of the machine's rate training reaches.
ASSUMED_MFU = {"fp32": 0.40, "bf16": 0.50, "int8": 0.35}
# What must stay free: the prediction is a few percent off.
MARGIN = 0.95
LEAST_MICRO_TOKENS = 256
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

    micro_tokens: of a forward pass. recompute: whether layers keep their input alone. fits: into the memory given.
    """

    precision: str
    memory: MemoryEstimate
    micro_tokens: int
    recompute: bool
    fits: bool
    flop: Flop
    step_s: float | None
    tokens_per_s: float | None

    def energy_kwh(self, watts: float, steps: int) -> float | None:
        """Of so many steps at a steady power."""
        return None if self.step_s is None else watts * self.step_s * steps / J_PER_KWH


def forecast(spec: ModelSpec, r: int, shape: Shape, precision: str, limit: int, rates: Rates) -> Forecast:
    """The fastest way to run in this precision that fits into `limit` bytes, or, where none does, what needs least."""
    tried = []
    for micro_tokens, recompute in _splits(shape):
        tokens = shape.micro(micro_tokens)
        predicted = max(1, round(shape.loss_share * tokens))
        estimate = memory.estimate(spec, r, precision, tokens, predicted, recompute)
        tried.append((estimate, micro_tokens, recompute))
        if estimate.peak_bytes <= MARGIN * limit:
            break
    estimate, micro_tokens, recompute = min(tried, key=lambda one: one[0].peak_bytes)
    flop = step_flop(spec, r, shape)
    step_s = _seconds(spec, flop, precision, recompute, rates)
    return Forecast(
        precision=precision,
        memory=estimate,
        micro_tokens=micro_tokens,
        recompute=recompute,
        fits=estimate.peak_bytes <= MARGIN * limit,
        flop=flop,
        step_s=step_s,
        tokens_per_s=shape.tokens / step_s if step_s else None,
    )


def _splits(shape: Shape) -> list[tuple[int, bool]]:
    """(tokens of a forward pass, whether layers are recomputed), the fastest first."""
    sizes = [shape.micro_tokens]
    while sizes[-1] // 2 >= LEAST_MICRO_TOKENS:
        sizes.append(sizes[-1] // 2)
    return [(size, recompute) for recompute in (False, True) for size in sizes]


def step_flop(spec: ModelSpec, r: int, shape: Shape) -> Flop:
    """Of one step of LoRA on rows that share nothing."""
    predicted = round(shape.loss_share * shape.tokens)
    return lora_step(spec, r, shape.tokens, predicted, causal_pairs([shape.length] * shape.batch))


def full_flop(spec: ModelSpec, shape: Shape) -> Flop:
    """The same with all weights trained."""
    predicted = round(shape.loss_share * shape.tokens)
    return full_step(spec, shape.tokens, predicted, causal_pairs([shape.length] * shape.batch))


def _seconds(spec: ModelSpec, flop: Flop, precision: str, recompute: bool, rates: Rates) -> float | None:
    rate = rates.flop_per_s.get(precision)
    if not rate:
        return None
    done = flop.total + (flop.forward if recompute else 0)
    return done / (rate * (rates.mfu_of(precision, spec.hidden) or ASSUMED_MFU[precision]))


def fastest(forecasts: list[Forecast]) -> Forecast | None:
    """Of those that fit; where no time is known, the one of the fewest bits."""
    fitting = [one for one in forecasts if one.fits]
    return min(fitting, key=lambda one: one.step_s or 0.0) if fitting else None
