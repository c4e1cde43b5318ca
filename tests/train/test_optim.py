from __future__ import annotations

import math

import pytest
import torch

from lorafit.train.optim import SCHEDULES, adamw, load_optimizer_state, optimizer_state, rate


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_rises_during_warm_up_and_never_exceeds_its_peak(schedule: str) -> None:
    rates = [rate(step, 40, 2e-3, schedule, warmup=0.1) for step in range(40)]
    assert rates[:4] == pytest.approx([2e-3 * n / 5 for n in (1, 2, 3, 4)])
    assert rates[4] == 2e-3
    assert all(0 < value <= 2e-3 for value in rates)


def test_linear_and_cosine_would_reach_zero_one_step_after_the_last() -> None:
    assert rate(10, 10, 1.0, "linear", 0.0) == 0
    assert rate(10, 10, 1.0, "cosine", 0.0) == pytest.approx(0, abs=1e-15)
    assert rate(5, 10, 1.0, "linear", 0.0) == pytest.approx(0.5)
    assert rate(5, 10, 1.0, "cosine", 0.0) == pytest.approx(0.5)


def test_a_run_of_one_step_learns_at_a_rate_above_zero() -> None:
    assert all(rate(0, 1, 1e-3, schedule, 0.05) > 0 for schedule in SCHEDULES)


def _three_steps(parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, first: int) -> None:
    for step in range(first, first + 3):
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, math.sin(step + index))
        optimizer.step()


def test_an_optimizer_restored_from_named_tensors_goes_on_bitwise() -> None:
    def fresh() -> tuple[list[torch.Tensor], torch.optim.AdamW]:
        parameters = [torch.ones(3, 5, requires_grad=True), torch.zeros(7, requires_grad=True)]
        return parameters, adamw(parameters, 1e-2, (0.9, 0.99), 0.01)

    through, optimizer = fresh()
    _three_steps(through, optimizer, 0)
    saved = {name: value.clone() for name, value in optimizer_state(optimizer, ["a", "b"]).items()}
    values = [parameter.detach().clone() for parameter in through]
    _three_steps(through, optimizer, 3)

    resumed, other = fresh()
    for parameter, value in zip(resumed, values, strict=True):
        parameter.data.copy_(value)
    load_optimizer_state(other, ["a", "b"], saved)
    _three_steps(resumed, other, 3)
    assert set(saved) == {f"{name}.{key}" for name in "ab" for key in ("step", "exp_avg", "exp_avg_sq")}
    assert all(torch.equal(expected, got) for expected, got in zip(through, resumed, strict=True))
