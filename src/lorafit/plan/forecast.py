"""What a run would need and take, in each precision: memory by parts, operations, time, energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lorafit import processor
from lorafit.config import MethodConfig
from lorafit.model.spec import ModelSpec
from lorafit.plan import gpus, memory, trained
from lorafit.plan.flops import Flop
from lorafit.plan.gpus import Gpu
from lorafit.plan.memory import MemoryEstimate, Split
from lorafit.plan.storage import BLOCK_TYPES
from lorafit.plan.work import Work, flop_once, largest, step_flop
from lorafit.rates import Rates, kind_of, run_key, way

PRECISIONS = ("int8", *(["fp16"] if processor.has_fp16() else []), "bf16", "fp32")
# What is in which type.
TYPES = {
    "int8": "frozen weights and products in int8, activations in bf16; adapter, optimizer, norms and loss in fp32",
    "bf16": "frozen weights, products and activations in bf16; adapter, optimizer, norms and loss in fp32",
    "fp16": "as bf16, in fp16, with the loss scaled so that gradients do not vanish",
    "fp32": "everything in fp32",
}
# Where no run has told yet what share of the machine's rate training reaches, and what is left of that where weights
# are decoded for each product (SmolLM2-135M, micro-batches of 500 to 1,024 tokens).
ASSUMED_MFU = {"fp32": 0.40, "bf16": 0.50, "fp16": 0.50, "int8": 0.35}
DECODING = {"keep": 0.95, "nf4": 0.9, "int8": 0.95}
J_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Forecast:
    """A run by one method in one precision. step_s, tokens_per_s: None where this machine's rate is not known.

    params: that are trained. storage: that of frozen weights, as --base-storage. split: how a step is computed. fits:
    into the memory given. flop: of a step. once_s: of a step's seconds, what later epochs do not take, as the layers
    below all that is trained are computed once. speed_from: how the speed is known, see SPEEDS.
    """

    params: int
    precision: str
    storage: str
    memory: MemoryEstimate
    split: Split
    fits: bool
    flop: Flop
    step_s: float | None
    once_s: float | None
    tokens_per_s: float | None
    speed_from: str | None

    def train_s(self, steps: int, epochs: int) -> float | None:
        """Of so many steps, in so many epochs."""
        if self.step_s is None or self.once_s is None:
            return None
        return self.step_s * steps - self.once_s * (steps - -(-steps // epochs))

    def energy_kwh(self, watts: float, steps: int, epochs: int) -> float | None:
        """Of the same at a steady power."""
        seconds = self.train_s(steps, epochs)
        return None if seconds is None else watts * seconds / J_PER_KWH


def ways(spec: ModelSpec, method: str = "lora") -> list[tuple[str, str]]:
    """(precision, storage of frozen weights) of every way in which a method can train the model."""
    if method == "full":  # an update of 16 bits would be lost in the weights
        return [("fp32", "auto")]
    if not spec.writes_text:  # an encoder's layers run as they are
        return [("bf16", "auto"), ("fp32", "auto")]
    in_blocks = any(name in BLOCK_TYPES for name in spec.storage)
    stored = ["nf4", "int8"] if spec.kind == "hf" else ["keep"] if in_blocks else []
    plain = [name for name in PRECISIONS if name != "int8" or method != "head"]  # int8 is calibrated by going back
    return [(precision, "auto") for precision in plain] + [("bf16", storage) for storage in stored]


def on_gpu(spec: ModelSpec, config: MethodConfig, work: Work, gpu: Gpu, labels: int = 0) -> list[Forecast]:
    """The same runs on a GPU, by its datasheet alone. Memory is that of this engine, which is no measurement either."""
    kind = kind_of(config.method, config.variant, config.layers)
    reached = {
        run_key(way(name, "auto", kind), spec.hidden): gpus.ASSUMED_MFU * rate for name, rate in gpu.flop_per_s.items()
    }
    rates = Rates(gpu.flop_per_s, reached)
    ways = [name for name in gpu.flop_per_s if config.method != "full" or name == "fp32"]
    return [forecast(spec, config, work, (name, "auto"), gpu.memory_bytes, rates, labels=labels) for name in ways]


def forecast(
    spec: ModelSpec,
    config: MethodConfig,
    work: Work,
    by: tuple[str, str],
    limit: int,
    rates: Rates,
    data: int = 0,
    labels: int = 0,
) -> Forecast:
    """The fastest way to run in this precision that fits into `limit` bytes, or, where none does, what needs least.

    by: precision, and storage of frozen weights. data: bytes of the rows. labels: of a head that tells them apart.
    """
    precision, storage = by
    tried, adds = [], trained.of(spec, config, labels, padded=bool(labels) and not spec.writes_text)
    for split in memory.splits(work.micro_tokens):
        tokens, predicted = largest(work, split.micro_tokens)
        estimate = memory.estimate(spec, adds, precision, tokens, predicted, split.recompute, storage, data)
        tried.append((estimate, split))
        if estimate.fits(limit):
            break
    estimate, split = min(tried, key=lambda one: one[0].peak_bytes)
    flop = step_flop(spec, config, work, split.micro_tokens, labels, in_16_bits=precision in ("bf16", "int8"))
    speed = speed_of(spec, config, precision, storage, rates)
    step_s = once_s = None
    if speed is not None:
        step_s = flop_of_step(flop, split) / speed.flop_per_s + rates.number_s * adds.params
        once_s = flop_once(spec, config, work, split.micro_tokens) / speed.flop_per_s
    return Forecast(
        params=adds.params,
        precision=precision,
        storage=storage,
        memory=estimate,
        split=split,
        fits=estimate.fits(limit),
        flop=flop,
        step_s=step_s,
        once_s=once_s,
        tokens_per_s=work.tokens / step_s if step_s else None,
        speed_from=speed.told if speed is not None else None,
    )


def flop_of_step(flop: Flop, split: Split) -> int:
    """All that is computed, what is computed a second time included."""
    return flop.total + (flop.forward if split.recompute else 0)


class Speed(NamedTuple):
    """Operations a second that training reaches, and how that is known: one of SPEEDS."""

    flop_per_s: float
    told: str


# How a speed is known.
SPEEDS = {
    "measured": "of runs of this kind on this machine",
    "lora": "at the speed of LoRA: no run of this kind was timed here yet",
    "assumed": "at a share of the rate of products that is assumed: no run was timed here yet",
}


def speed_of(spec: ModelSpec, config: MethodConfig, precision: str, storage: str, rates: Rates) -> Speed | None:
    """What runs of this method reached here, else LoRA's in the same precision, else what is assumed; None: unknown."""
    kind = kind_of(config.method, config.variant, config.layers)
    own = measured_speed(spec, precision, storage, rates, kind)
    if own:
        return Speed(own, "measured")
    loras = measured_speed(spec, precision, storage, rates)
    if loras:
        return Speed(loras, "lora")
    assumed = ASSUMED_MFU[precision] * rates.flop_per_s.get(precision, 0.0) * DECODING.get(storage, 1.0)
    return Speed(assumed, "assumed") if assumed else None


def measured_speed(spec: ModelSpec, precision: str, storage: str, rates: Rates, kind: str = "") -> float | None:
    """FLOP/s that training reached so, or, in fewer bits, what follows from that of weights in 16; None: unknown.

    kind: of method, see `rates.kind_of`; LoRA by default.
    """
    keys = (way(precision, storage, kind), way(precision, "auto", kind))
    own, plain = (rates.reached_by(key, spec.hidden) for key in keys)
    if own:
        return own
    return plain * DECODING.get(storage, 1.0) if plain else None


def fastest(forecasts: list[Forecast]) -> Forecast | None:
    """Of those that fit; where no time is known, the one of the fewest bits."""
    fitting = [one for one in forecasts if one.fits]
    return min(fitting, key=lambda one: one.step_s or 0.0) if fitting else None
