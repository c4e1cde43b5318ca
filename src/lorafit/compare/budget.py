"""Time: what was spent, and what is to come, judged by the trials so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Kept back for what is not a trial: reading rows, intervals, the page.
KEPT_BACK = 0.03


@dataclass
class Budget:
    """total_s: infinite without a budget. spent_s: in trials and measurements, those before a resume included."""

    total_s: float = math.inf
    spent_s: float = 0.0

    @property
    def left_s(self) -> float:
        """What trials may still take."""
        return self.total_s * (1 - KEPT_BACK) - self.spent_s

    def has(self, needed_s: float) -> bool:
        """Whether that much is left."""
        return needed_s <= self.left_s


@dataclass
class Costs:
    """Seconds of a trial by its method and steps, from what earlier ones took: around the steps, and for each step."""

    around_s: dict[str, float] = field(default_factory=dict)
    step_s: dict[str, float] = field(default_factory=dict)
    measuring_s: dict[str, float] = field(default_factory=dict)

    def trained(self, method: str, steps: int, train_s: float, wall_s: float) -> None:
        """Note what a trial took."""
        self.around_s[method] = max(self.around_s.get(method, 0.0), wall_s - train_s)
        self.step_s[method] = train_s / steps

    def measured(self, method: str, wall_s: float) -> None:
        """Note what measuring a run took."""
        self.measuring_s[method] = wall_s

    def of_training(self, method: str, steps: int) -> float:
        """Predicted seconds; by the slowest of the others where nothing is known of this method, 0 at the start."""
        return _known(self.around_s, method) + _known(self.step_s, method) * steps

    def of_run(self, method: str, steps: int) -> float:
        """Predicted seconds of training and measuring."""
        return self.of_training(method, steps) + _known(self.measuring_s, method)


def _known(seconds: dict[str, float], method: str) -> float:
    return seconds.get(method, max(seconds.values(), default=0.0))
