"""An update that is brought to a lower rank is the nearest one of that rank, in every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit.errors import TargetError
from lorafit.lora import inject
from lorafit.lora.inject import lora_layers
from lorafit.lora.layer import LoRALayer
from lorafit.lora.truncate import truncate
from tests import tiny

IDS = torch.arange(12).view(2, 6)
KINDS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(7, 9), torch.randn(3, 7)),
    "hf_conv1d": (Conv1D(9, 7), torch.randn(3, 7)),
    "embedding": (nn.Embedding(12, 9), IDS),
    "conv": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
}


def adapted(model: nn.Module, **settings: object) -> list[LoRALayer]:
    """Adapters that do something: B is not zero."""
    usual = {"r": 4, "alpha": 6.0, "targets": "*", "variant": "lora", "rule": "alpha/sqrt(r)", "init": "gaussian"}
    usual |= {"dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}, "layers": None, "seed": 0}
    inject.attach(model, **usual | settings)  # type: ignore[arg-type]
    layers = list(lora_layers(model).values())
    with torch.no_grad():
        for parameter in inject.trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)"])
def test_it_is_the_truncated_svd_of_the_update_at_the_same_scaling(kind: str, r: int, rule: str) -> None:
    base, x = KINDS[kind]
    model = nn.Sequential(base)
    (layer,) = adapted(model, rule=rule)
    before, factor = layer.delta_weight().detach().double(), layer.scaling
    shapes = layer.lora_A.shape[1:], (len(layer.lora_B), *layer.lora_B.shape[2:])
    truncate(model, r, rule)
    U, S, Vh = torch.linalg.svd(before)
    nearest = (U[:, :r] * S[:r] @ Vh[:r]).float()
    torch.testing.assert_close(layer.delta_weight().detach(), nearest, atol=1e-5, rtol=1e-4)
    assert layer.r == len(layer.lora_A) == layer.lora_B.shape[1] == r and layer.scaling == pytest.approx(factor)
    assert (layer.lora_A.shape[1:], (len(layer.lora_B), *layer.lora_B.shape[2:])) == shapes
    layer(x).square().sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None
    inject.detach(model)


def test_layers_of_a_lower_rank_and_factors_that_are_not_trained_stay_as_they_are() -> None:
    model = tiny.llama()
    adapted(model, targets=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, variant="lora-fa")
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in inject.adapter_state(model).items()}
    truncate(model, 4, "alpha/sqrt(r)")
    assert all(torch.equal(tensor, state[name]) for name, tensor in inject.adapter_state(model).items())
    truncate(model, 3, "alpha/sqrt(r)")
    for name, layer in lora_layers(model).items():
        assert layer.r == (2 if name.endswith("q_proj") else 3)
        assert torch.equal(layer.lora_A, state[f"{name}.lora_A"]) == name.endswith("q_proj")
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == frozen


def test_a_head_that_shares_the_embeddings_factors_follows_them() -> None:
    model = tiny.llama()
    adapted(model, targets=["embed_tokens", "lm_head"])
    truncate(model, 2, "alpha/sqrt(r)")
    one, other = (layer.delta_weight() for layer in lora_layers(model).values())
    assert torch.linalg.matrix_rank(one) == 2
    torch.testing.assert_close(one, other.T)
    assert len(inject.trainable_parameters(model)) == 2


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(TargetError, match="no adapter"):
        truncate(tiny.llama(), 2, "alpha/r")
