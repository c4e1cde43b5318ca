"""What a run would need and take, in each precision: memory by parts, operations, time, energy."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.model.spec import ModelSpec
from lorafit.plan import gpus, memory, trained
from lorafit.plan.counts import lora_params
from lorafit.plan.flops import Flop
from lorafit.plan.gpus import Gpu
from lorafit.plan.memory import MemoryEstimate, Split
from lorafit.plan.storage import BLOCK_TYPES
from lorafit.plan.work import Work, largest, lora_flop
from lorafit.rates import Rates, run_key, way

PRECISIONS = ("int8", "bf16", "fp32")
# What is in which type.
TYPES = {
    "int8": "frozen weights and products in int8, activations in bf16; adapter, optimizer, norms and loss in fp32",
    "bf16": "frozen weights, products and activations in bf16; adapter, optimizer, norms and loss in fp32",
    "fp32": "everything in fp32",
}
# Where no run has told yet what share of the machine's rate training reaches, and what is left of that where weights
# are decoded for each product (SmolLM2-135M, micro-batches of 500 to 1,024 tokens).
ASSUMED_MFU = {"fp32": 0.40, "bf16": 0.50, "int8": 0.35}
DECODING = {"keep": 0.95, "nf4": 0.9, "int8": 0.95}
J_PER_KWH = 3.6e6


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
    if not spec.writes_text:  # an encoder's layers run as they are
        return [("bf16", "auto"), ("fp32", "auto")]
    in_blocks = any(name in BLOCK_TYPES for name in spec.storage)
    stored = ["nf4", "int8"] if spec.kind == "hf" else ["keep"] if in_blocks else []
    return [(precision, "auto") for precision in PRECISIONS] + [("bf16", storage) for storage in stored]


def on_gpu(spec: ModelSpec, r: int, work: Work, gpu: Gpu) -> list[Forecast]:
    """The same runs on a GPU, by its datasheet alone. Memory is that of this engine, which is no measurement either."""
    reached = {run_key(name, spec.hidden): gpus.ASSUMED_MFU * rate for name, rate in gpu.flop_per_s.items()}
    rates = Rates(gpu.flop_per_s, reached)
    return [forecast(spec, r, work, name, gpu.memory_bytes, rates) for name in gpu.flop_per_s]


def forecast(
    spec: ModelSpec,
    r: int,
    work: Work,
    precision: str,
    limit: int,
    rates: Rates,
    storage: str = "auto",
    data: int = 0,
) -> Forecast:
    """The fastest way to run in this precision that fits into `limit` bytes, or, where none does, what needs least.

    data: bytes of the rows.
    """
    tried = []
    for split in memory.splits(work.micro_tokens):
        tokens, predicted = largest(work, split.micro_tokens)
        estimate = memory.estimate(
            spec, trained.lora(spec, r), precision, tokens, predicted, split.recompute, storage, data
        )
        tried.append((estimate, split))
        if estimate.fits(limit):
            break
    estimate, split = min(tried, key=lambda one: one[0].peak_bytes)
    flop = lora_flop(spec, r, work, split.micro_tokens, ends_early=precision != "fp32")
    step_s = _seconds(spec, flop, r, precision, storage, split.recompute, rates)
    return Forecast(
        precision=precision,
        storage=storage,
        memory=estimate,
        split=split,
        fits=estimate.fits(limit),
        flop=flop,
        step_s=step_s,
        tokens_per_s=work.tokens / step_s if step_s else None,
    )


def _seconds(
    spec: ModelSpec, flop: Flop, r: int, precision: str, storage: str, recompute: bool, rates: Rates
) -> float | None:
    assumed = ASSUMED_MFU[precision] * rates.flop_per_s.get(precision, 0.0)
    speed = measured_speed(spec, precision, storage, rates) or assumed * DECODING.get(storage, 1.0)
    done = flop.total + (flop.forward if recompute else 0)
    return done / speed + rates.number_s * lora_params(spec, r) if speed else None


def measured_speed(spec: ModelSpec, precision: str, storage: str, rates: Rates) -> float | None:
    """FLOP/s that training reached so, or, in fewer bits, what follows from that of weights in 16; None: unknown."""
    own, plain = (rates.reached_by(name, spec.hidden) for name in (way(precision, storage), precision))
    if own:
        return own
    return plain * DECODING.get(storage, 1.0) if plain else None


def fastest(forecasts: list[Forecast]) -> Forecast | None:
    """Of those that fit; where no time is known, the one of the fewest bits."""
    fitting = [one for one in forecasts if one.fits]
    return min(fitting, key=lambda one: one.step_s or 0.0) if fitting else None
