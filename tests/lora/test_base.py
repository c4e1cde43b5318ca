from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.perceiver.modeling_perceiver import Conv2dSamePadding
from transformers.pytorch_utils import Conv1D

from lorafit.errors import TargetError
from lorafit.lora.base import KINDS, kind_name, make_kind, refusal


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Named(nn.Linear):
    """A subclass that leaves forward alone."""


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 2), "linear"),
        (Named(3, 2), "linear"),
        (FalconLinear(3, 2), "linear"),
        (Conv1D(2, 3), "hf_conv1d"),
        (nn.Embedding(3, 2), "embedding"),
        (BartScaledWordEmbedding(3, 2, 0, embed_scale=2.0), "embedding"),
        (Gemma3TextScaledWordEmbedding(3, 2, 0, embed_scale=2.0), "embedding"),
        (nn.Conv1d(3, 2, 1), "conv"),
        (nn.Conv2d(3, 2, 1), "conv"),
        (nn.Conv3d(3, 2, 1), "conv"),
    ],
)
def test_a_module_is_of_the_kind_of_its_class_and_can_be_adapted(module, expected):
    assert kind_name(module) == expected
    assert refusal(module) is None
    assert type(make_kind(module)) is KINDS[expected]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(3), "is a LayerNorm, which has no low-rank update here"),
        (nn.ConvTranspose1d(3, 2, 1), "is a ConvTranspose1d, which has no low-rank update here"),
        (nn.LazyLinear(3), "is lazy and has no shape yet; run one batch through the model first"),
        (Doubled(3, 2), "is a Doubled with its own forward, which a low-rank branch may not follow"),
        (
            Conv2dSamePadding(3, 2, 1),
            "is a Conv2dSamePadding with its own forward, which a low-rank branch may not follow",
        ),
        (
            BartLearnedPositionalEmbedding(3, 2),
            "is a BartLearnedPositionalEmbedding with its own forward, which a low-rank branch may not follow",
        ),
        (
            nn.Embedding(3, 2, max_norm=1.0),
            "renormalises its rows (max_norm), so that no update can be added to it",
        ),
        (
            nn.Embedding(3, 2, scale_grad_by_freq=True),
            "scales its gradient by token frequency (scale_grad_by_freq), which factors A and B can't reproduce",
        ),
        (
            nn.MultiheadAttention(4, 2).out_proj,
            "belongs to nn.MultiheadAttention, which reads its weight and never calls it",
        ),
        (
            weight_norm(nn.Linear(3, 2)),
            "computes its weight from other tensors (a parametrization), so that no update can be written into it",
        ),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_a_reason(module, expected):
    assert refusal(module) == expected
    with pytest.raises(TargetError) as error:
        make_kind(module)
    assert str(error.value) == f"a layer can't be adapted: it {expected}. Leave it out of targets."


def test_a_weight_of_integers_is_refused():
    module = nn.Linear(3, 2)
    module.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    assert refusal(module) == "stores its weight as int8, and no kind reads that"


def test_a_forward_put_on_the_instance_is_refused():
    module = nn.Linear(3, 2)
    module.forward = lambda x: x
    assert refusal(module) == "is a Linear with its own forward, which a low-rank branch may not follow"


@pytest.mark.parametrize(
    ("module", "shape_A", "shape_B"),
    [
        (nn.Linear(5, 7), (2, 5), (7, 2)),
        (Conv1D(7, 5), (2, 5), (7, 2)),
        (nn.Embedding(5, 7), (2, 5), (7, 2)),
        (nn.Conv1d(6, 4, 3), (2, 6, 3), (4, 2, 1)),
        (nn.Conv2d(6, 4, (3, 5)), (2, 6, 3, 5), (4, 2, 1, 1)),
        (nn.Conv2d(6, 4, 3, groups=2), (2, 3, 3, 3), (4, 2, 1, 1)),
        (nn.Conv3d(6, 4, 3), (2, 6, 3, 3, 3), (4, 2, 1, 1, 1)),
    ],
)
def test_factors_have_the_documented_shapes(module, shape_A, shape_B):
    kind = make_kind(module)
    assert (kind.shape_A(2), kind.shape_B(2)) == (shape_A, shape_B)


@pytest.mark.parametrize("module", [nn.Linear(5, 7), Conv1D(7, 5), nn.Embedding(5, 7), nn.Conv2d(6, 4, 3, groups=2)])
def test_writing_what_was_read_changes_nothing(module):
    kind, expected = make_kind(module), copy.deepcopy(module.weight)
    kind.write_weight(kind.read_weight().clone())
    assert torch.equal(module.weight, expected)
    assert kind.read_weight().shape == (kind.out_features, kind.in_features)


def test_every_scaled_embedding_of_transformers_multiplies_by_embed_scale_and_nothing_else():
    """`base.py` trusts the name; this looks at each class that is so named in the transformers that is installed."""
    import importlib
    import pkgutil
    import re
    from pathlib import Path

    import transformers.models

    found = 0
    for info in pkgutil.iter_modules(transformers.models.__path__):
        path = Path(transformers.models.__path__[0]) / info.name / f"modeling_{info.name}.py"
        names = (
            re.findall(r"^class (\w+ScaledWordEmbedding)\(nn\.Embedding\)", path.read_text(), re.M)
            if path.exists()
            else []
        )
        for name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what other people's modules warn of on import is theirs
                cls = getattr(importlib.import_module(f"transformers.models.{info.name}.modeling_{info.name}"), name)
            module, ids = cls(5, 3, 0, embed_scale=2.5), torch.tensor([[1, 4, 2]])
            assert torch.equal(module(ids), module.weight[ids] * 2.5), name
            assert refusal(module) is None, name
            found += 1
    assert found >= 20
