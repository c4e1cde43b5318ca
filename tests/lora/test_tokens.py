"""Trained rows of single tokens: the laws of an adapter, against torch's own embedding and autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from lorafit.config import LoRAConfig
from lorafit.errors import ConfigError, TargetError
from lorafit.lora.inject import adapter_parameters, adapter_state, detach, load_adapter_state, merge, set_scale, unmerge
from lorafit.lora.tokens import attach_rows, make_room, token_rows
from lorafit.methods import lora

IDS = torch.tensor([[3, 29, 7, 3, 28, 1], [29, 29, 0, 5, 7, 2]])
TRAINED = [29, 3, 28]
SIZES: dict[str, Any] = {
    "vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
MODELS = ("tied", "untied", "scaled")


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name == "scaled":  # an embedding that multiplies what it looks up
        return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=4)).double().eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=name == "tied")).double().eval()


def with_rows(model: Any, moved: float = 0.5) -> Any:
    """Adapted, with trained rows that are `moved` away from the base's."""
    lora.attach(model, LoRAConfig(r=2, alpha=6.0, targets="q_proj"))
    attach_rows(model, TRAINED)
    generator = torch.Generator().manual_seed(1)
    for rows in token_rows(model).values():
        if rows.tied_to is None:
            rows.rows.data += moved * torch.randn(rows.rows.shape, generator=generator, dtype=torch.float64)
    return model


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_fresh_rows_are_the_bases_own(name: str) -> None:
    # A head's few logits are a product of their own, which may round otherwise.
    torch.testing.assert_close(logits(with_rows(build(name), moved=0.0)), logits(build(name)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_scale_0_is_the_base_bitwise_and_other_scales_lie_between(name: str) -> None:
    before, model = logits(build(name)), with_rows(build(name))
    assert not torch.allclose(before, logits(model))
    set_scale(model, 0)
    assert torch.equal(before, logits(model))
    set_scale(model, 0.25)
    by_hand = build(name)
    for rows in token_rows(model).values():
        weight = by_hand.get_submodule(rows.name).weight.data
        base = build(name).get_submodule(rows.name).weight.data[TRAINED]
        weight[TRAINED] = base + 0.25 * (rows.rows.data - base)
    torch.testing.assert_close(logits(by_hand), logits(model), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_merged_equals_unmerged_and_unmerging_restores_bitwise(name: str, scale: float) -> None:
    model = with_rows(build(name))
    set_scale(model, scale)
    weights = copy.deepcopy(build(name).state_dict())
    expected = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-12, atol=1e-12)
    merged = [rows.base.weight[TRAINED].clone() for rows in token_rows(model).values()]
    merge(model)
    again = [rows.base.weight[TRAINED] for rows in token_rows(model).values()]
    assert all(torch.equal(one, other) for one, other in zip(merged, again, strict=True))
    unmerge(model)
    detach(model)
    assert not token_rows(model)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_whole_embedding_at_these_rows(name: str) -> None:
    model, whole = with_rows(build(name)), build(name)
    for rows in token_rows(model).values():
        whole.get_submodule(rows.name).weight.data[TRAINED] = rows.rows.data
    targets = IDS.roll(-1, 1).flatten()
    for one in (model, whole):
        F.cross_entropy(one(input_ids=IDS).logits.flatten(0, 1), targets).backward()
    for rows in token_rows(model).values():
        expected = whole.get_submodule(rows.name).weight.grad[TRAINED]
        torch.testing.assert_close(rows.rows.grad, expected, rtol=1e-10, atol=1e-12)
    trained = {parameter for parameter in model.parameters() if parameter.grad is not None}
    assert trained == set(adapter_parameters(model).values())


@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_in_the_state_and_comes_back(name: str) -> None:
    model, other = with_rows(build(name)), with_rows(build(name), moved=0.0)
    state = adapter_state(model)
    owners = [name for name in state if name.endswith(".rows")]
    assert len(owners) == (2 if name == "untied" else 1)
    load_adapter_state(other, state)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("name", MODELS)
def test_new_tokens_get_the_mean_row_and_a_tie_stays_a_tie(name: str) -> None:
    model = build(name)
    before = logits(model)
    means = [m.weight.float().mean(0) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    flags = {parameter.requires_grad for parameter in model.parameters()}
    assert make_room(model, [5, 32]) == 3
    assert make_room(model, [5, 32]) == 0
    torch.testing.assert_close(logits(model)[..., :30], before)
    for module, mean in zip((model.get_input_embeddings(), model.get_output_embeddings()), means, strict=True):
        assert module.weight.shape == (33, 8)
        assert torch.equal(module.weight[30:].float(), mean.expand(3, -1))
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert tied == (name != "untied")
    assert {parameter.requires_grad for parameter in model.parameters()} == flags


def test_a_token_may_begin_as_the_mean_of_others() -> None:
    model = build("tied")
    weight = model.get_input_embeddings().weight.detach().clone()
    lora.attach(model, LoRAConfig(r=2, alpha=6.0, targets="q_proj"))
    made = attach_rows(model, [4, 9], start=[(1, 2, 2), ()])
    rows = made["model.embed_tokens"].rows
    torch.testing.assert_close(rows[0], (weight[1] + 2 * weight[2]) / 3)
    assert torch.equal(rows[1], weight[9])


def test_an_embedding_that_is_adapted_already_is_refused_and_left_alone() -> None:
    model = build("tied")
    lora.attach(model, LoRAConfig(r=2, alpha=6.0, targets=["q_proj", "embed_tokens"]))
    with pytest.raises(TargetError, match="embed_tokens is adapted already"):
        attach_rows(model, TRAINED)
    assert not token_rows(model)


def test_other_modules_than_embeddings_and_linear_heads_are_refused() -> None:
    model = build("tied")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(TargetError, match="rows of single tokens cannot be trained in lm_head"):
        attach_rows(model, TRAINED)
    assert not token_rows(model)


def test_a_scale_that_is_not_finite_is_refused() -> None:
    model = with_rows(build("tied"))
    with pytest.raises(ConfigError, match="finite"):
        set_scale(model, float("nan"))
