from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lorafit.data.split import DIGEST, digest, held_out
from lorafit.errors import ConfigError, DataError


def digests(values: list[int]) -> NDArray[Any]:
    return np.frombuffer(b"".join(digest({"text": str(value)}) for value in values), DIGEST)


def no_labels(count: int) -> NDArray[np.int32]:
    return np.full(count, -1, np.int32)


def test_the_order_of_columns_makes_no_other_record() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": "2"})


@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers(0, 2**63 - 1))
def test_both_sides_have_rows_and_equal_records_are_on_one(values: list[int], share: float, seed: int) -> None:
    given = digests(values), no_labels(len(values)), share, seed
    if len(set(values)) == 1:
        with pytest.raises(DataError, match="cannot be split"):
            held_out(*given)
        return
    held = held_out(*given)
    sides = [{value for value, out in zip(values, held, strict=True) if out == side} for side in (True, False)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert (held == held_out(*given)).all()
    smallest = min(values.count(value) for value in set(values))
    assert held.sum() <= max(round(share * len(values)), smallest)


@given(st.integers(0, 2**63 - 1), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(seed: int, random: Any) -> None:
    values = list(range(50))
    held = held_out(digests(values), no_labels(50), 0.2, seed)
    chosen = {value for value, out in zip(values, held, strict=True) if out}
    random.shuffle(values)
    held = held_out(digests(values), no_labels(50), 0.2, seed)
    assert chosen == {value for value, out in zip(values, held, strict=True) if out}


def test_the_share_is_held_out_and_depends_on_the_seed() -> None:
    one, other = (held_out(digests(list(range(200))), no_labels(200), 0.1, seed) for seed in (0, 1))
    assert one.sum() == other.sum() == 20
    assert (one != other).any()


@given(st.lists(st.integers(0, 3), min_size=20, max_size=200), st.integers(0, 1000))
def test_every_label_gives_its_share(numbers: list[int], seed: int) -> None:
    labels = np.array(numbers, np.int32)
    held = held_out(digests(list(range(len(numbers)))), labels, 0.25, seed)
    for label in set(numbers):
        assert abs(held[labels == label].sum() - 0.25 * (labels == label).sum()) <= 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 10.0, float("nan")])
def test_a_share_that_leaves_one_side_empty_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="Give a share between 0 and 1"):
        held_out(digests([1, 2, 3]), no_labels(3), share, 0)
