"""LoRA and DoRA give what PEFT gives, module by module, with the tensors mapped by hand, in float64 to see formulas.

The limit is 1000 u times the largest output: no output here sums more than 300 products, three times over.
PEFT drops a convolution's dilation and can't merge groups, so neither appears here.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lorafit.lora.inject import attach, lora_layers, merge

MODULES = {
    "linear": (lambda: nn.Linear(11, 7), lambda: torch.randn(2, 5, 11, dtype=torch.float64)),
    "hf_conv1d": (lambda: Conv1D(7, 11), lambda: torch.randn(2, 5, 11, dtype=torch.float64)),
    "embedding": (lambda: nn.Embedding(11, 7, padding_idx=0), lambda: torch.randint(0, 11, (2, 5))),
    "scaled_embedding": (
        lambda: Gemma3TextScaledWordEmbedding(11, 7, 0, embed_scale=2.6),
        lambda: torch.randint(0, 11, (2, 5)),
    ),
    "conv1d": (lambda: nn.Conv1d(6, 7, 3, 2, 1), lambda: torch.randn(2, 6, 9, dtype=torch.float64)),
    "conv2d": (lambda: nn.Conv2d(6, 7, 3, 2, 1), lambda: torch.randn(2, 6, 9, 9, dtype=torch.float64)),
    "conv3d": (lambda: nn.Conv3d(2, 7, 3, 2, 1), lambda: torch.randn(2, 2, 5, 5, 5, dtype=torch.float64)),
}


class Holder(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.layer = base

    def forward(self, x):
        return self.layer(x)


def both(kind: str, variant: str, rule: str):
    """Our model and PEFT's over the same base, PEFT's layer, and an input."""
    torch.manual_seed(0)
    make, make_input = MODULES[kind]
    ours = Holder(make().double())
    theirs = peft.get_peft_model(
        copy.deepcopy(ours),
        peft.LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["layer"],
            use_dora=variant == "dora",
            use_rslora=rule == "alpha/sqrt(r)",
            fan_in_fan_out=kind == "hf_conv1d",
        ),
    )
    attach(
        ours,
        r=3,
        alpha=5,
        targets="layer",
        variant=variant,
        rule=rule,
        init="gaussian",
        dropout=0.0,
        rank_pattern={},
        alpha_pattern={},
        layers=None,
        seed=0,
    )
    return ours, theirs, theirs.base_model.model.layer, make_input()


def peft_tensors(layer) -> dict[str, nn.Parameter]:
    if hasattr(layer, "lora_embedding_A") and "default" in layer.lora_embedding_A:
        tensors = {"lora_A": layer.lora_embedding_A["default"], "lora_B": layer.lora_embedding_B["default"]}
    else:
        tensors = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    if "default" in (layer.lora_magnitude_vector or {}):
        tensors["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return tensors


def randomise(tensors: dict[str, nn.Parameter]) -> None:
    for name, tensor in tensors.items():
        if name == "magnitude":
            tensor.data.mul_(torch.rand_like(tensor) + 0.5)
        else:
            tensor.data.normal_()


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((got - expected).detach().abs().max()) <= 1000 * 2**-53 * float(expected.detach().abs().max())


@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", sorted(MODULES))
def test_our_tensors_in_peft_give_our_output_and_gradients(kind, variant, rule):
    ours, theirs, layer, x = both(kind, variant, rule)
    mine, other = dict(ours.layer.named_parameters(recurse=False)), peft_tensors(layer)
    randomise(mine)
    assert set(mine) == set(other)
    for name, tensor in mine.items():
        other[name].data = tensor.detach().reshape(other[name].shape).clone()
    expected, got = ours(x), theirs(x)
    assert_same(got, expected)
    probe = torch.randn_like(expected)
    (expected * probe).sum().backward()
    (got * probe).sum().backward()
    for name, tensor in mine.items():
        assert_same(other[name].grad.reshape(tensor.shape), tensor.grad)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", sorted(MODULES))
def test_pefts_tensors_in_ours_give_pefts_output_and_merged_weight(kind, variant):
    ours, theirs, layer, x = both(kind, variant, "alpha/r")
    mine, other = dict(ours.layer.named_parameters(recurse=False)), peft_tensors(layer)
    randomise(other)
    for name, tensor in mine.items():
        tensor.data.copy_(other[name].detach().reshape(tensor.shape))
    expected = theirs(x)
    assert_same(ours(x), expected)
    merge(ours)
    assert_same(ours(x), expected)
    merged = theirs.merge_and_unload()
    assert_same(lora_layers(ours)["layer"].base.weight, merged.layer.weight)
