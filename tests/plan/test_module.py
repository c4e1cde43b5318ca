"""Any network by its shapes, held against what is really attached."""

from __future__ import annotations

import pytest
from torch import nn

from lorafit import LoRAConfig, attach, plan_module
from lorafit.errors import TargetError


def network() -> nn.Module:
    convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1152, 24), nn.ReLU(), nn.Linear(24, 10))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


@pytest.mark.parametrize("targets", [["0", "2", "4", "6"], ["2", "6"], ["4"]])
def test_counts_are_those_that_are_attached(targets: list[str]) -> None:
    module = network()
    plan = plan_module(shapes(module), [f"{name}.weight" for name in targets], ranks=[3])
    attached = attach(module, LoRAConfig(r=3, alpha=7, targets=targets))
    (one,) = plan.lora
    assert (plan.parameters, one.params) == (attached.total_params, attached.trainable_params)
    assert one.file_bytes == 4 * one.params and one.state_bytes == 16 * one.params


def test_sizes_follow_from_the_number_of_parameters_and_ranks_that_are_too_high_are_named() -> None:
    module = network()
    plan = plan_module(shapes(module))
    count = sum(p.numel() for p in module.parameters())
    assert plan.size_bytes == {
        "fp32": 4 * count,
        "bf16": 2 * count,
        "fp16": 2 * count,
        "int8": count,
        "nf4": round(count / 2),
    }
    assert plan.full_state_bytes == 16 * count
    by_rank = {one.r: one.too_high_for for one in plan.lora}
    assert by_rank[8] == () and by_rank[16] == ("0.weight", "6.weight")  # 16 x 9 and 10 x 24


def test_a_name_that_is_not_there_is_said_with_what_is_near() -> None:
    with pytest.raises(TargetError, match=r"'4.weigth' is no weight"):
        plan_module(shapes(network()), ["4.weigth"])
    with pytest.raises(TargetError, match=r"'4.bias' is no weight"):
        plan_module(shapes(network()), ["4.bias"])
