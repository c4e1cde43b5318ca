"""What every method would take, each in every way in which it can be trained, and one of them over other shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lorafit.config import MethodConfig
from lorafit.errors import ConfigError
from lorafit.model.spec import ModelSpec
from lorafit.plan.counts import why_not
from lorafit.plan.forecast import Forecast, forecast, ways
from lorafit.plan.work import Shape, Work
from lorafit.rates import Rates

# A method's usual variant, those that take markedly other memory or time, and two blocks alone of full fine-tuning.
SURVEYED = (
    ("lora", "lora", None), ("lora", "dora", None), ("adapter", "pfeiffer", None), ("adapter", "houlsby", None),
    ("prefix", "p-tuning-v2", None), ("prefix", "reparametrised", None), ("prompt", "prompt", None),
    ("ia3", "ia3", None), ("bitfit", "bitfit", None), ("full", "full", "last:2"), ("full", "full", None),
    ("head", "head", None),
)  # fmt: skip
BATCHES, LENGTHS = (1, 4, 16, 64), (128, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Around:
    """What all forecasts have in common. limit: bytes. data: of the rows. labels: of a head that tells them apart."""

    spec: ModelSpec
    limit: int
    rates: Rates
    data: int
    labels: int


@dataclass(frozen=True)
class Row:
    """A method in all of its ways. impossible: why the model cannot be trained so, and then there are none."""

    name: str
    runs: tuple[Forecast, ...]
    impossible: str | None = None


def survey(around: Around, chosen: MethodConfig, work_of: Callable[[MethodConfig], Work]) -> list[Row]:
    """Every method of SURVEYED, and the one that was asked for, first where it is none of them.

    work_of: the steps of a run by a method, with its virtual tokens.
    """
    asked = (chosen.method, chosen.variant, chosen.layers)
    names = [one for one in SURVEYED if one[0] != "head" or around.labels]
    if around.spec.layers <= 2:
        names.remove(("full", "full", "last:2"))
    found = []
    for method, variant, layers in names if asked in names else [asked, *names]:
        config = chosen.model_copy(update={"method": method, "variant": variant, "layers": layers})
        found.append(_row(around, config, work_of(config)))
    return found


def _row(around: Around, config: MethodConfig, work: Work) -> Row:
    reason = why_not(around.spec, config)
    if reason is not None:
        return Row(name_of(config), (), reason)
    return Row(name_of(config), tuple(in_all_ways(around, config, work)))


def in_all_ways(around: Around, config: MethodConfig, work: Work) -> list[Forecast]:
    """A method in each precision and storage. Raises ConfigError for one that does not go with the model."""
    reason = why_not(around.spec, config)
    if reason is not None:
        do = "Lower --r" if config.method == "lora" else "Choose another method"
        raise ConfigError(f"{around.spec.name} cannot be trained by {name_of(config)}: {reason}", do)
    return [_forecast(around, config, work, by) for by in ways(around.spec, config.method)]


def over_shapes(
    around: Around, config: MethodConfig, by: tuple[str, str], asked: Shape
) -> tuple[tuple[int, ...], tuple[int, ...], list[list[Forecast]]]:
    """(rows of a step, tokens of a row, a forecast for each of both), with the shape that was asked for among them."""
    batches = tuple(sorted({*BATCHES, asked.batch}))
    longest = around.spec.max_positions or max(LENGTHS)
    lengths = tuple(sorted({*(length for length in LENGTHS if length <= longest), asked.length}))

    def one(batch: int, length: int) -> Forecast:
        shape = replace(asked, batch=batch, length=length, lead=config.lead_tokens)
        return _forecast(around, config, shape, by)

    return batches, lengths, [[one(batch, length) for length in lengths] for batch in batches]


def _forecast(around: Around, config: MethodConfig, work: Work, by: tuple[str, str]) -> Forecast:
    return forecast(around.spec, config, work, by, around.limit, around.rates, around.data, around.labels)


def name_of(config: MethodConfig) -> str:
    """As in lists of methods: `lora`, `lora:dora`, `full, --layers last:2`."""
    own = config.method if config.variant == config.method else f"{config.method}:{config.variant}"
    return own if config.layers is None else f"{own}, --layers {config.layers}"
