"""A method that is compared, by its name, and what became of it so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lorafit.config import METHOD_VARIANTS
from lorafit.errors import ConfigError, did_you_mean, listed
from lorafit.trials.records import Record


@dataclass
class Candidate:
    """A method and what became of it so far.

    rates: records of the search by factor of the usual rate. lr: the rate that was chosen. runs: records of seeds.
    out: why it was dropped or failed; status then says which.
    """

    name: str
    method: str
    variant: str
    rates: dict[float, Record] = field(default_factory=dict)
    lr: float | None = None
    runs: list[Record] = field(default_factory=list)
    status: str = "finished"
    out: str | None = None

    @property
    def slug(self) -> str:
        """Its directory."""
        return self.name.replace(":", "-")

    def losses(self) -> dict[float, float]:
        """Factor -> loss on the search rows, infinite where training failed."""
        return {factor: math.inf if record["loss"] is None else record["loss"] for factor, record in self.rates.items()}


def candidates(names: list[str]) -> list[Candidate]:
    """`lora:dora` -> a candidate. Raises ConfigError for a name that is unknown or stands twice."""
    found: list[Candidate] = []
    for name in (text.strip() for text in names):
        method, _, variant = name.partition(":")
        known = METHOD_VARIANTS.get(method)
        if known is None:
            hint = did_you_mean(method, METHOD_VARIANTS) or f"Known: {listed(METHOD_VARIANTS, 20)}"
            raise ConfigError(f"--methods names {method!r}, which is no method", hint)
        if variant and variant not in known:
            hint = did_you_mean(variant, known) or f"There are {listed(known)}"
            raise ConfigError(f"--methods names {name!r}, and {method} has no variant {variant!r}", hint)
        one = Candidate(method if (variant or known[0]) == known[0] else name, method, variant or known[0])
        if any(other.name == one.name for other in found):
            raise ConfigError(f"--methods names {one.name!r} twice", "Name each once")
        found.append(one)
    return found
