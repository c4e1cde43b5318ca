from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.mask import Encoded
from lorafit.data.pack import Batch, micro_batches, step_rows

PAD = 7


def encoded(lengths: list[int]) -> list[Encoded]:
    """Rows of tokens 1, 2, ... whose second half has a loss; PAD is among them."""
    return [
        Encoded(np.arange(1, n + 1, dtype=np.int32), (np.arange(n) >= n / 2) & (np.arange(n) > 0), 0, f"f:{n}")
        for n in lengths
    ]


@given(st.integers(0, 200), st.integers(1, 50), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_every_row_appears_once_in_an_epoch(count: int, batch_size: int, seed: int, epoch: int) -> None:
    steps = step_rows(count, batch_size, seed, epoch)
    assert list(range(count)) == sorted(row for step in steps for row in step)
    assert all(len(step) == batch_size for step in steps[:-1])
    assert all(1 <= len(step) <= batch_size for step in steps)
    assert steps == step_rows(count, batch_size, seed, epoch)


def test_the_order_depends_on_seed_and_epoch_and_is_the_same_on_every_machine() -> None:
    orders = [step_rows(50, 50, seed, epoch)[0] for seed, epoch in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4
    assert step_rows(8, 3, seed=5, epoch=2) == [[3, 5, 2], [7, 1, 0], [6, 4]]


def rows_of(batches: list[Batch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.row_ids]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 120), st.randoms())
def test_micro_batches_hold_every_row_once_and_respect_the_limit(
    lengths: list[int], limit: int, shuffler: random.Random
) -> None:
    data = encoded(lengths)
    ids = list(range(len(lengths)))
    batches = micro_batches(data, ids, limit, PAD)
    assert ids == sorted(rows_of(batches))
    for batch in batches:
        assert batch.computed_tokens == batch.input_ids.numel() <= limit or batch.input_ids.shape[0] == 1
        for number, row in enumerate(batch.row_ids.tolist()):
            length = lengths[row]
            assert data[row].input_ids.tolist() == batch.input_ids[number, :length].tolist()
            assert data[row].supervised.tolist() == batch.supervised[number, :length].tolist()
            assert [1] * length == batch.attention_mask[number, :length].tolist()
            assert not batch.attention_mask[number, length:].any() and not batch.supervised[number, length:].any()
            assert (batch.input_ids[number, length:] == PAD).all()
    assert sum(lengths) == sum(batch.real_tokens for batch in batches)
    assert sum(int(row.supervised.sum()) for row in data) == sum(batch.supervised_tokens for batch in batches)
    shuffler.shuffle(ids)
    assert rows_of(batches) == rows_of(micro_batches(data, ids, limit, PAD))


def test_rows_of_like_length_share_a_batch_and_a_too_long_row_stands_alone() -> None:
    batches = micro_batches(encoded([2, 30, 10, 9, 3]), range(5), 20, PAD)
    assert [batch.row_ids.tolist() for batch in batches] == [[1], [2, 3], [4, 0]]
    assert [batch.computed_tokens for batch in batches] == [30, 20, 6]
    assert [batch.real_tokens for batch in batches] == [30, 19, 5]


def test_labels_are_the_ids_with_a_loss_and_the_first_token_never_is_one() -> None:
    (batch,) = micro_batches(encoded([4, 2]), [0, 1], 100, PAD)
    assert batch.labels.tolist() == [[-100, -100, 3, 4], [-100, 2, -100, -100]]
    assert {torch.int64} == {batch.labels.dtype, batch.input_ids.dtype, batch.attention_mask.dtype, batch.row_ids.dtype}
    assert torch.bool == batch.supervised.dtype


def test_only_packing_imports_torch() -> None:
    code = "import sys, lorafit.data.mask, lorafit.data.load; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
