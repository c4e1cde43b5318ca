from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafit.errors import ConfigError
from lorafit.lora.dropout import DropoutKey, drop, drop_mask
from lorafit.lora.layer import Dropout, LoRALayer, new_layer

CPU = torch.device("cpu")
P = st.sampled_from([0.05, 0.3, 0.5])
SMALL = st.integers(1, 9)


def mask(shape, p=0.3, layer=7, **key):
    return drop_mask(shape, p=p, key=DropoutKey(**key), layer=layer, device=CPU)


def layer_over(base: nn.Module, p: float = 0.4) -> LoRALayer:
    layer = new_layer(
        base,
        name="layer",
        r=2,
        alpha=3.0,
        rule="alpha/r",
        variant="lora",
        init="gaussian",
        generator=torch.Generator().manual_seed(0),
        dropout=Dropout(p, DropoutKey(seed=1)),
    )
    nn.init.normal_(layer.lora_B)
    return layer


@given(SMALL, SMALL, SMALL, SMALL, P, st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_row_keeps_its_mask_whatever_the_padding_and_the_rows_around_it(
    rows, tokens, padding, features, p, row, step
):
    expected = mask((1, tokens, features), p, step=step, rows=[row])[0]
    others = list(range(rows))
    got = mask((rows + 1, tokens + padding, features), p, step=step, rows=[*others, row])[-1, :tokens]
    assert torch.equal(got, expected)


@given(st.lists(SMALL, min_size=1, max_size=4), SMALL, P)
def test_a_packed_row_keeps_its_mask(lengths, features, p):
    rows = torch.tensor([[10 + i for i, n in enumerate(lengths) for _ in range(n)]])
    tokens = torch.tensor([[t for n in lengths for t in range(n)]])
    got = mask((1, sum(lengths), features), p, rows=rows, tokens=tokens)[0]
    expected = torch.cat([mask((1, n, features), p, rows=[10 + i])[0] for i, n in enumerate(lengths)])
    assert torch.equal(got, expected)


def test_left_padding_keeps_the_mask_where_token_positions_are_given():
    expected = mask((1, 5, 6), rows=[3])[0]
    got = mask((1, 8, 6), rows=[3], tokens=torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]]))[0, 3:]
    assert torch.equal(got, expected)


def test_rows_are_numbered_by_the_batch_where_none_are_given():
    assert torch.equal(mask((3, 4, 5)), mask((3, 4, 5), rows=torch.arange(3)))


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"layer": 8}, {"rows": [1]}])
def test_masks_of_different_keys_agree_as_often_as_chance(change):
    p, n = 0.3, 64 * 512
    a, b = mask((1, 64, 512), p, rows=[0]), mask((1, 64, 512), p, **{"rows": [0], **change})
    chance = p * p + (1 - p) * (1 - p)
    assert abs(float((a == b).float().mean()) - chance) < 5 * math.sqrt(chance * (1 - chance) / n)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p(p):
    dropped = mask((4, 128, 256), p)
    limit = 5 * math.sqrt(p * (1 - p))
    assert abs(float(dropped.float().mean()) - p) < limit / math.sqrt(dropped.numel())
    assert float((dropped.float().mean((0, 1)) - p).abs().max()) < limit / math.sqrt(4 * 128)
    assert float((dropped.float().mean((0, 2)) - p).abs().max()) < limit / math.sqrt(4 * 256)


def test_neighbouring_elements_are_dropped_independently():
    kept = (~mask((2, 256, 256), 0.5)).float() - 0.5
    for pairs in (kept[:, 1:] * kept[:, :-1], kept[..., 1:] * kept[..., :-1], kept[:1] * kept[1:]):
        assert abs(float(pairs.mean())) < 5 * 0.25 / math.sqrt(pairs.numel())


def test_what_is_kept_is_divided_by_one_minus_p():
    x = torch.ones(2, 3, 50)
    got = drop(x, p=0.2, key=DropoutKey(), layer=0, feature_dim=-1)
    assert set(got.unique().tolist()) == {0.0, 1.25}


def test_a_convolution_drops_by_position_then_channel_so_a_longer_signal_keeps_the_mask():
    x = torch.ones(2, 4, 9)
    expected = drop(x[..., :5], p=0.4, key=DropoutKey(), layer=0, feature_dim=-2)
    got = drop(x, p=0.4, key=DropoutKey(), layer=0, feature_dim=-2)
    assert torch.equal(got[..., :5], expected)


def test_a_batch_without_a_token_axis_is_one_token_a_row():
    assert torch.equal(mask((3, 6), rows=[5, 6, 7]), mask((3, 1, 6), rows=[5, 6, 7])[:, 0])


def test_row_ids_of_another_batch_size_are_an_error():
    with pytest.raises(ConfigError) as error:
        mask((6, 4), rows=[0, 1])
    expected = (
        "dropout is keyed by row, and a layer got 6 x 1 rows x tokens where the batch has (2,) row ids. "
        "Set dropout to 0: this model mixes rows inside its layers."
    )
    assert str(error.value) == expected


def test_dropout_is_inactive_in_eval_mode():
    layer = layer_over(nn.Linear(5, 4))
    x = torch.randn(2, 3, 5)
    expected = layer_over(layer.base, p=0.0)
    expected.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), expected(x))
    assert not torch.equal(layer.train()(x), expected(x))


def test_dropout_leaves_the_base_output_alone():
    layer = layer_over(nn.Linear(5, 4)).train()
    nn.init.zeros_(layer.lora_B)
    x = torch.randn(2, 3, 5)
    assert torch.equal(layer(x), layer.base(x))


def test_token_ids_are_never_dropped():
    layer = layer_over(nn.Embedding(6, 4)).train()
    ids = torch.randint(0, 6, (2, 3))
    assert torch.equal(layer(ids), copy.deepcopy(layer).eval()(ids))


def test_the_output_of_a_row_does_not_depend_on_the_batch_around_it():
    layer = layer_over(nn.Linear(5, 4).double()).train()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    layer.dropout.key.rows = [40, 41, 42]
    together = layer(x)
    layer.dropout.key.rows = [41]
    alone = layer(x[1:2, :4])
    assert torch.allclose(together[1:2, :4], alone, rtol=0, atol=64 * 2**-53 * float(x.abs().max()) * 100)


def test_a_checkpointed_block_sees_the_same_mask_again():
    layer = layer_over(nn.Linear(5, 4)).train()
    x = torch.randn(2, 3, 5, requires_grad=True)
    layer(x).sum().backward()
    expected = [p.grad.clone() for p in (layer.lora_A, layer.lora_B)]
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip((layer.lora_A, layer.lora_B), expected, strict=True))


def test_dropout_does_not_touch_the_global_generator():
    layer, expected = layer_over(nn.Linear(5, 4)).train(), torch.get_rng_state()
    layer(torch.ones(2, 3, 5))
    assert torch.equal(torch.get_rng_state(), expected)
