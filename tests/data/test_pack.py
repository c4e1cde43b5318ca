from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.batching import TOKENS_PER_PASS, _alike, counted, step_rows
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded
from lorafit.engine.batch import Batch
from lorafit.engine.packing import Packing


def encoded(lengths: list[int]) -> list[Encoded]:
    """Rows of tokens 1, 2, ... whose second half has a loss."""
    return [
        Encoded(np.arange(1, n + 1, dtype=np.int32), (np.arange(n) >= n / 2) & (np.arange(n) > 0), 0, f"f:{n}")
        for n in lengths
    ]


@given(st.integers(0, 200), st.integers(1, 50), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_every_row_appears_once_in_an_epoch(count: int, batch_size: int, seed: int, epoch: int) -> None:
    steps = [step_rows(count, batch_size, seed, epoch, step) for step in range(-(-count // batch_size))]
    assert list(range(count)) == sorted(row for step in steps for row in step)
    assert all(len(step) == batch_size for step in steps[:-1])
    assert all(1 <= len(step) <= batch_size for step in steps)
    assert step_rows(count, batch_size, seed, epoch, len(steps)) == []


def test_the_order_depends_on_seed_and_epoch_and_is_the_same_on_every_machine() -> None:
    orders = [step_rows(50, 50, seed, epoch, 0) for seed, epoch in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert len({tuple(order) for order in orders}) == 4
    assert [step_rows(8, 3, 5, 2, step) for step in range(3)] == [[3, 5, 2], [7, 1, 0], [6, 4]]


def test_without_a_seed_rows_keep_their_order_in_every_epoch() -> None:
    epochs = [[step_rows(8, 3, None, epoch, step) for step in range(4)] for epoch in range(2)]
    assert epochs == [[[0, 1, 2], [3, 4, 5], [6, 7], []]] * 2


def padded(data: list[Encoded], ids: Sequence[int], limit: int) -> list[Batch]:
    return micro_batches(data, ids, limit, Packing(padded=True, share_prefix=False))


def rows_of(batches: list[Batch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.token_rows[:, 0]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 120), st.randoms())
def test_padded_batches_hold_every_row_once_and_respect_the_limit(
    lengths: list[int], limit: int, shuffler: random.Random
) -> None:
    data, ids = encoded(lengths), list(range(len(lengths)))
    batches = padded(data, ids, limit)
    assert ids == sorted(rows_of(batches))
    for batch in batches:
        assert batch.computed_tokens == batch.input_ids.numel() <= limit or batch.rows == 1
        assert batch.attention_mask is not None
        for number, row in enumerate(batch.token_rows[:, 0].tolist()):
            length = max(1, lengths[row] - 1)  # the last token is predicted, and seen by nobody
            assert data[row].input_ids[:length].tolist() == batch.input_ids[number, :length].tolist()
            assert [1] * length + [0] * (batch.input_ids.shape[1] - length) == batch.attention_mask[number].tolist()
    assert sum(lengths) == sum(batch.real_tokens for batch in batches)
    assert predicted(data, batches) == expected_predictions(data)
    shuffler.shuffle(ids)
    assert rows_of(batches) == rows_of(padded(data, ids, limit))


def test_rows_of_like_length_share_a_batch_and_a_too_long_row_stands_alone() -> None:
    batches = padded(encoded([2, 30, 10, 9, 3]), range(5), 20)
    assert [batch.token_rows[:, 0].tolist() for batch in batches] == [[1], [2, 3], [4, 0]]
    assert [batch.computed_tokens for batch in batches] == [29, 18, 4]
    assert [batch.real_tokens for batch in batches] == [30, 19, 5]


def test_short_rows_stand_apart_from_long_ones_where_that_saves_more_than_a_pass() -> None:
    lengths = [60] * 4 + [16] * 28
    groups = [batch.token_rows[:, 0].tolist() for batch in padded(encoded(lengths), range(32), 4096)]
    assert groups == [[0, 1, 2, 3], list(range(4, 32))]
    near = padded(encoded([18] * 4 + [16] * 28), range(32), 4096)
    assert [batch.rows for batch in near] == [32]  # it would save 56 tokens


@given(st.lists(st.integers(1, 200), min_size=1, max_size=7), st.integers(1, 600))
def test_no_way_to_put_rows_of_like_length_together_takes_less(lengths: list[int], limit: int) -> None:
    widths = sorted(lengths, reverse=True)

    def cost(parts: Sequence[Sequence[int]]) -> int:
        passes = (-(-len(part) // max(1, limit // part[0])) for part in parts)
        return sum(len(part) * part[0] + TOKENS_PER_PASS * own for part, own in zip(parts, passes, strict=True))

    places = [n for n in range(1, len(widths)) if widths[n] != widths[n - 1]]
    ways = []
    for cut in itertools.chain.from_iterable(itertools.combinations(places, k) for k in range(len(places) + 1)):
        ends = [*cut, len(widths)]
        ways.append(cost([widths[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]))
    found = _alike(list(range(len(widths))), widths, limit)
    assert [row for part in found for row in part] == list(range(len(widths)))
    assert cost([[widths[row] for row in part] for part in found]) == min(ways)


# --- what a packed batch means, read from its tensors alone --------------------------------------------------------


def contexts(batch: Batch) -> dict[int, tuple[int, ...]]:
    """For each token of a row, the tokens that it sees, itself last: by the layout if packed, else by its row."""
    ids = batch.input_ids.flatten().tolist()
    if batch.layout is None:
        width = batch.input_ids.shape[1]
        return {at: tuple(ids[at - at % width : at + 1]) for at in range(len(ids))}
    seen: dict[int, tuple[int, ...]] = {}
    for bucket in batch.layout:
        before = tuple(ids[bucket.prefix_start : bucket.prefix_start + bucket.prefix])
        for row, length in zip(bucket.tokens.view(bucket.rows, -1), bucket.lengths.tolist(), strict=True):
            assert (row[length:] == -1).all() and (row[:length] >= 0).all() and bucket.width == len(row)
            own = [ids[at] for at in row[:length].tolist()]
            for number, at in enumerate(row[:length].tolist()):
                assert at not in seen
                seen[at] = before + tuple(own[: number + 1])
    # What belongs to no row stands at the end, so that lengths repeat; it is less than one step of them.
    assert sorted(seen) == list(range(len(seen))) and batch.computed_tokens % 16 == 0
    assert len(ids) - len(seen) < 64
    return seen


def predicted(data: list[Encoded], batches: list[Batch]) -> Counter[tuple[tuple[int, ...], int]]:
    """How often each (tokens seen, token predicted) is counted in the loss."""
    counts: Counter[tuple[tuple[int, ...], int]] = Counter()
    for batch in batches:
        seen = contexts(batch)
        pairs = zip(batch.predicts.tolist(), batch.targets.tolist(), batch.weights.tolist(), strict=True)
        for at, target, weight in pairs:
            counts[seen[at], target] += int(weight)
        assert batch.supervised_tokens == int(batch.weights.sum())
    return counts


def expected_predictions(data: list[Encoded]) -> Counter[tuple[tuple[int, ...], int]]:
    return Counter(
        (tuple(row.input_ids[:at].tolist()), int(row.input_ids[at]))
        for row in data
        for at in np.flatnonzero(row.supervised)
    )


rows_with_prefixes = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 200), st.integers(0, 9), st.booleans()),
    min_size=1,
    max_size=20,
)


@given(rows_with_prefixes, st.integers(1, 400), st.booleans())
def test_packed_rows_see_and_predict_what_they_do_alone(
    specs: list[tuple[int, int, int, int, bool]], limit: int, share: bool
) -> None:
    data = []
    for family, prefix, length, seed, all_of_it in specs:
        start = np.random.default_rng(family).integers(0, 50, prefix)
        ids = np.concatenate([start, np.random.default_rng(seed).integers(0, 50, length)]).astype(np.int32)
        supervised = np.arange(len(ids)) >= (1 if all_of_it else max(1, len(ids) - 3))
        data.append(Encoded(ids, supervised, 0, "f:1"))
    batches = micro_batches(data, range(len(data)), limit, Packing(share_prefix=share))
    assert predicted(data, batches) == expected_predictions(data)
    assert counted(data, range(len(data)), limit, share) == [
        (batch.computed_tokens, len(batch.predicts), len(batch.predicting), batch.attended_pairs) for batch in batches
    ]
    assert sum(batch.rows for batch in batches) == len(data)
    assert sum(batch.real_tokens for batch in batches) == sum(len(row.input_ids) for row in data)
    for batch in batches:
        seen = contexts(batch)
        assert len(seen) <= limit or batch.rows == 1
        for at, tokens in seen.items():
            assert len(tokens) - 1 == batch.position_ids[0, at]
            assert tuple(data[batch.token_rows[0, at]].input_ids[: len(tokens)].tolist()) == tokens
    if not share:
        read = [max(1, len(row.input_ids) - 1) for row in data]
        assert sum(len(contexts(batch)) for batch in batches) == sum(read)


def test_a_common_beginning_is_computed_once_and_two_of_them_twice() -> None:
    first, second = np.arange(100, 190), np.arange(300, 350)
    tails = [np.arange(n, n + 5) for n in range(4)]
    rows = [np.concatenate([first if n < 2 else second, tail]) for n, tail in enumerate(tails)]
    data = [Encoded(row.astype(np.int32), np.arange(len(row)) > len(row) - 3, 0, "f:1") for row in rows]
    (batch,) = micro_batches(data, [2, 0, 3, 1], 1000, Packing())
    assert len(contexts(batch)) == 90 + 50 + 4 * 4
    assert sum(len(row) for row in rows) == batch.real_tokens
    (whole,) = micro_batches(data, [2, 0, 3, 1], 1000, Packing(share_prefix=False))
    assert len(contexts(whole)) == whole.real_tokens - 4


def test_what_comes_after_the_last_prediction_is_not_read() -> None:
    row = Encoded(np.arange(9, dtype=np.int32), np.isin(np.arange(9), [3, 4]), 0, "f:1")
    silent = Encoded(np.arange(5, dtype=np.int32), np.zeros(5, dtype=np.bool_), 0, "f:2")
    for packing in (Packing(), Packing(padded=True, share_prefix=False)):
        (batch,) = micro_batches([row, silent], [0, 1], 100, packing)
        assert set(contexts(batch).values()) >= {(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)}
        assert max(map(len, contexts(batch).values())) == 4
        assert (batch.real_tokens, batch.supervised_tokens, batch.rows) == (14, 2, 2)


def test_equal_rows_share_all_but_their_last_token_and_weigh_twice() -> None:
    data = encoded([40]) * 3
    (batch,) = micro_batches(data, [0, 1, 2], 1000, Packing())
    assert len(contexts(batch)) == 38 + 3
    assert {1.0, 3.0} == set(batch.weights.tolist())
    assert batch.supervised_tokens == 3 * 20


def test_only_packing_imports_torch() -> None:
    code = "import sys, lorafit.data.mask, lorafit.data.load; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
