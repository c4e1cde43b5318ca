"""AdaLoRA: which directions of which layers are worth their parameters, found while training.

All layers begin with the same rank; from some step on the least important triplets (`lora.gates`) of all layers are
taken away, until the mean rank is the one that is meant. One that was taken away still has a gradient, and comes back
where it matters more than another. Source: Zhang et al. 2023 (AdaLoRA), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafit.errors import ConfigError
from lorafit.lora.gates import crookedness
from lorafit.lora.layer import LoRALayer

# How much of the past importance remembers. Source: Zhang et al. 2023, section 4.1, beta 1 and beta 2.
SENSITIVITY_DECAY, UNCERTAINTY_DECAY = 0.85, 0.85
PARTS = ("lora_A", "lora_B", "gate")


@dataclass(frozen=True)
class Budget:
    """Triplets in force after each step. first, last: of all layers together, at the beginning and at the end.

    hold: steps before any is taken away. settled: the step that takes the last.
    """

    first: int
    last: int
    hold: int
    settled: int

    def after(self, step: int) -> int:
        """After `step` steps, 1 being the first. Source: Zhang et al. 2023, eq. 12."""
        if step <= self.hold:
            return self.first
        if step >= self.settled:
            return self.last
        left = 1 - (step - self.hold) / (self.settled - self.hold)
        return int((self.first - self.last) * left**3 + self.last)


class RankSchedule:
    """Importance of every number that is trained, and the triplets in force.

    layers: with gates, by name. orthogonality: what `crookedness`, in the mean over all factors, is weighted with.
    """

    def __init__(self, layers: Mapping[str, LoRALayer], budget: Budget, orthogonality: float) -> None:
        self.layers, self.budget, self.orthogonality = dict(layers), budget, orthogonality
        self.kept = {name: torch.ones(layer.r, dtype=torch.bool) for name, layer in self.layers.items()}
        self.sensitivity = {key: torch.zeros_like(p, requires_grad=False) for key, p in self._trained().items()}
        self.uncertainty = {key: torch.zeros_like(value) for key, value in self.sensitivity.items()}

    def is_settled(self, step: int) -> bool:
        """Whether ranks are final after `step` steps."""
        return step >= self.budget.settled

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add those of what keeps factors orthonormal to the loss's."""
        share = self.orthogonality / (2 * len(self.layers))
        for layer in self.layers.values() if share else ():
            for factor, is_B in ((layer.lora_A, False), (layer.lora_B, True)):
                rows = factor.flatten(1).T if is_B else factor.flatten(1)
                slope = crookedness(rows)[1]
                if factor.grad is not None:
                    factor.grad.add_((slope.T if is_B else slope).reshape(factor.shape), alpha=share)

    @torch.no_grad()
    def after_step(self, step: int, learned: bool) -> None:
        """Look at the gradients of step number `step`, 1 being the first, and take away what the budget no longer has.

        Gradients must still be there. learned: whether the step was applied.
        """
        if learned and not self.is_settled(step):
            self._look()
        if self.budget.hold < step <= self.budget.settled:
            self._choose(self.budget.after(step))
        for name, layer in self.layers.items():
            assert layer.gate is not None, "put on before training"
            layer.gate.masked_fill_(~self.kept[name].to(layer.gate.device), 0)

    def scores(self) -> dict[str, Tensor]:
        """The importance of each triplet of each layer, (r,). Source: Zhang et al. 2023, eq. 7 and 11."""
        each = {key: value * self.uncertainty[key] for key, value in self.sensitivity.items()}
        return {
            name: each[f"{name}.gate"]
            + each[f"{name}.lora_A"].flatten(1).mean(1)
            + each[f"{name}.lora_B"].flatten(1).mean(0)
            for name in self.layers
        }

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know, by name; the tensors themselves."""
        kinds = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty, "kept": self.kept}
        return {f"{kind}.{name}": value for kind, values in kinds.items() for name, value in values.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for key, value in self.state().items():
            value.copy_(state[key])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {f"{name}.{part}": layer.get_parameter(part) for name, layer in self.layers.items() for part in PARTS}

    def _look(self) -> None:
        """Follow |w dL/dw| of each number, and how far it is from what it was. Zhang et al. 2023, eq. 8 to 10."""
        for key, parameter in self._trained().items():
            if parameter.grad is None:
                continue  # the loop says which layers do not reach the loss
            now = (parameter * parameter.grad).abs_()
            usual = self.sensitivity[key].mul_(SENSITIVITY_DECAY).add_(now, alpha=1 - SENSITIVITY_DECAY)
            self.uncertainty[key].mul_(UNCERTAINTY_DECAY).add_(now.sub_(usual).abs_(), alpha=1 - UNCERTAINTY_DECAY)

    def _choose(self, count: int) -> None:
        """Keep the `count` most important triplets of all layers; of equals the first."""
        scores = self.scores()
        order = torch.cat(list(scores.values())).cpu().sort(descending=True, stable=True).indices
        kept = torch.zeros(len(order), dtype=torch.bool)
        kept[order[:count]] = True
        sizes = [len(own) for own in scores.values()]
        self.kept = dict(zip(scores, torch.split(kept, sizes), strict=True))


def schedule(
    layers: Mapping[str, LoRALayer], r: int, steps: int, hold: float, settle: float, orthogonality: float
) -> RankSchedule:
    """The schedule of a run. r: the mean rank at the end. hold, settle: shares of the steps before and after changes.

    Raises ConfigError for a run of one step, in which nothing can be told.
    """
    if steps < 2:
        raise ConfigError("--rank-schedule is given for a run of 1 step", "Give it more steps, or leave it out")
    first = sum(layer.r for layer in layers.values())
    budget = Budget(first, r * len(layers), int(hold * steps), steps - int(settle * steps))
    return RankSchedule(layers, budget, orthogonality)
