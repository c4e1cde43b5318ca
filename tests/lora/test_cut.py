"""An update that is cut to its first components is that of the factors' first rows and columns, in every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit.errors import TargetError
from lorafit.lora import inject
from lorafit.lora.inject import cut_to, lora_layers
from lorafit.lora.layer import LoRALayer
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
def test_a_cut_update_is_that_of_the_first_components_with_the_scaling_of_all(kind: str, r: int) -> None:
    base, x = KINDS[kind]
    model = nn.Sequential(base)
    (layer,) = adapted(model)
    before = base(x).detach()
    A, B = layer.lora_A.flatten(1), layer.lora_B.flatten(1)
    expected = 6.0 / 4**0.5 * B[:, :r] @ A[:r]
    with cut_to(model, r):
        torch.testing.assert_close(layer.delta_weight(), expected)
        torch.testing.assert_close(layer.merged_matrix(layer.kind.read_weight()), layer.kind.read_weight() + expected)
        y = layer(x)
        y.square().sum().backward()
        merged = layer.merged_weight()
    assert not torch.equal(y, before)
    base.weight.data, original = merged, base.weight.data
    torch.testing.assert_close(y, base(x), atol=1e-4, rtol=1e-4)
    base.weight.data = original
    for gradient in (layer.lora_A.grad, layer.lora_B.grad.transpose(0, 1)):  # type: ignore[union-attr]
        assert gradient is not None and gradient[r:].count_nonzero() == 0 and gradient[:r].count_nonzero() > 0
    inject.detach(model)


def test_layers_of_a_lower_rank_stay_whole_and_all_are_whole_again_afterwards() -> None:
    model = tiny.llama()
    adapted(model, targets=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})
    state = {name: tensor.clone() for name, tensor in inject.adapter_state(model).items()}
    whole = model(IDS).logits
    with pytest.raises(ZeroDivisionError), cut_to(model, 3):
        ranks = {name.rsplit(".", 1)[1]: len(layer.factors()[0]) for name, layer in lora_layers(model).items()}
        assert ranks == {"q_proj": 2, "v_proj": 3}
        assert not torch.equal(model(IDS).logits, whole)
        assert all(torch.equal(tensor, state[name]) for name, tensor in inject.adapter_state(model).items())
        raise ZeroDivisionError
    assert torch.equal(model(IDS).logits, whole)
    with cut_to(model, 4):
        assert torch.equal(model(IDS).logits, whole)


def test_a_head_that_shares_the_embeddings_factors_is_cut_with_them() -> None:
    model = tiny.llama()
    adapted(model, targets=["embed_tokens", "lm_head"])
    with cut_to(model, 2):
        one, other = (layer.delta_weight() for layer in lora_layers(model).values())
    assert torch.linalg.matrix_rank(one) == 2
    torch.testing.assert_close(one, other.T)


def test_a_model_without_an_adapter_cannot_be_cut() -> None:
    with pytest.raises(TargetError, match="no adapter"), cut_to(tiny.llama(), 2):
        pass
