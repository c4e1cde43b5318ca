"""Which ranks the rows of a step train, and what cannot be trained so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafit.config import TrainConfig
from lorafit.errors import ConfigError
from lorafit.train.nested import check, ladder, ranks, shares, shares_of, slower_by_rank


def config(**settings: Any) -> TrainConfig:
    base = {"model": "m", "data": "d", "output": "o", "r": 12, "alpha": 7.0, "rank_schedule": "nested"}
    return TrainConfig(**base | settings)


@pytest.mark.parametrize(
    ("r", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_the_ranks_are_powers_of_two_and_the_whole(r: int, expected: list[int]) -> None:
    assert ladder(r) == expected


def test_the_largest_rank_of_any_layer_is_the_whole() -> None:
    assert ranks(config(rank_pattern={"q_proj": 20})) == [1, 2, 4, 8, 16, 20]
    assert ranks(config(rank_schedule="none")) == []


@given(st.integers(2, 70), st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(1, 20))
def test_every_row_of_a_step_is_there_once_and_all_hangs_on_the_arguments_alone(
    r: int, seed: int, step: int, count: int
) -> None:
    rows = list(range(100, 100 + count))
    found = shares(ladder(r), seed, step, rows)
    assert found == shares(ladder(r), seed, step, rows)
    assert sorted(row for _, own in found for row in own) == rows
    assert all(own for _, own in found)
    drawn = [rank for rank, _ in found]
    assert len(set(drawn)) == len(drawn) and {r if rank is None else rank for rank in drawn} <= set(ladder(r))
    assert count < 3 or {None, 1} <= set(drawn)


@given(st.integers(3, 70), st.integers(0, 99))
def test_each_rank_between_has_its_turn_before_any_has_a_second(r: int, seed: int) -> None:
    between = ladder(r)[1:-1]
    for turn in (0, 1, 7):
        steps = range(turn * len(between), (turn + 1) * len(between))
        assert sorted(shares(ladder(r), seed, step, [0, 1, 2])[2][0] or 0 for step in steps) == between


def test_the_order_of_ranks_differs_by_seed() -> None:
    def orders(seed: int) -> list[list[tuple[int | None, list[int]]]]:
        return [shares(ladder(64), seed, step, [0, 1, 2]) for step in range(12)]

    assert orders(0) != orders(1)


def test_single_rows_train_the_whole_update_its_first_component_and_a_rank_between_by_turns() -> None:
    found = [shares(ladder(8), 0, step, [5])[0][0] for step in range(6)]
    assert [rank if rank in (None, 1) else "between" for rank in found] == [None, 1, "between"] * 2
    assert [shares(ladder(2), 0, step, [5])[0][0] for step in range(4)] == [None, 1] * 2


def test_without_the_schedule_a_step_is_whole() -> None:
    assert shares_of(config(rank_schedule="none"), 3, [4, 5, 6]) == [(None, [4, 5, 6])]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "ia3"}, "--method ia3, which has no rank"),
        ({"variant": "dora"}, "--variant dora"),
        ({"variant": "vera"}, "--variant vera"),
        ({"init": "pissa"}, "--init pissa"),
        ({"add_tokens": ["<call>"]}, "--add-tokens"),
        ({"r": 1}, "rank 1, below which there is none"),
    ],
)
def test_what_cannot_be_cut_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"--rank-schedule nested is given with {told}"):
        check(config(**settings), labelled=False)
    check(config(**settings, rank_schedule="none"), labelled=False)


def test_a_head_of_labels_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="rows with labels"):
        check(config(), labelled=True)
    check(config(variant="lora-fa", init="eva"), labelled=False)


def test_later_components_move_less_by_the_root_of_their_number() -> None:
    moved = {"a.lora_A": torch.zeros(5, 3), "a.lora_B": torch.zeros(2, 5), "conv.lora_B": torch.zeros(2, 5, 1, 1)}
    start = {name: tensor.copy_(torch.randn(tensor.shape)).clone() for name, tensor in moved.items()}
    with slower_by_rank(moved):
        for tensor in moved.values():
            tensor += 3.0
    shares = torch.tensor([1, 2, 3, 4, 5.0]).rsqrt()
    torch.testing.assert_close(moved["a.lora_A"] - start["a.lora_A"], 3 * shares.view(5, 1).expand(5, 3))
    torch.testing.assert_close(moved["a.lora_B"] - start["a.lora_B"], 3 * shares.expand(2, 5))
    torch.testing.assert_close((moved["conv.lora_B"] - start["conv.lora_B"])[..., 0, 0], 3 * shares.expand(2, 5))
