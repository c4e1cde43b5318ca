"""The laws of one adapted layer, over every base kind, variant, dtype and odd shape.

Tolerances are derived, not tuned. u is the unit roundoff of the base's dtype, u_acc that of the accumulator (float32,
or float64 over float64: a CPU sums half-precision products in float32), gamma(n) = n u / (1 - n u) (Higham 2002, lemma
3.1). A sum of n products is off by at most gamma_acc(n) times the same sum of absolute values, and every value stored
in the base's dtype by u times itself. On the way to y, unmerged, values are stored at most ROUNDINGS times: A, B, A x,
its scaling, B h, embed_scale (2), the base's product, its bias and embed_scale (2), y - bias, g - 1, g, two products,
their sum, the scale, the last sum; merged: the weight, the product, the bias and embed_scale. The bound is the sum over
both ways.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import gguf
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from lorafit.lora.base import KINDS, kind_name
from lorafit.lora.dropout import DropoutKey
from lorafit.lora.init import INITS
from lorafit.lora.layer import Dropout, LoRALayer, new_layer
from lorafit.lora.update import SCALING, delta_weight, scaling
from lorafit.lora.variants import VARIANTS
from lorafit.quant.blocks import Blocks
from lorafit.quant.codecs import CODECS
from lorafit.quant.modules import QuantizedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROUNDINGS = 24
SIZE = st.integers(1, 13)


@dataclass
class Case:
    layer: LoRALayer
    x: Tensor
    variant: str

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.kind.weight.dtype


def linear(draw, generator):
    batch = draw(st.sampled_from([(3,), (2, 5), (1, 2, 3)]))
    module = nn.Linear(draw(SIZE), draw(SIZE), bias=draw(st.booleans()))
    return module, torch.randn(*batch, module.in_features, generator=generator)


def hf_conv1d(draw, generator):
    module = Conv1D(draw(SIZE), draw(SIZE))
    nn.init.normal_(module.bias)
    return module, torch.randn(2, 5, module.nx, generator=generator)


def embedding(draw, generator):
    num, dim, padding = draw(st.integers(2, 13)), draw(SIZE), draw(st.sampled_from([None, 0, 1]))
    kind = draw(st.sampled_from(["plain", "bart", "gemma"])) if padding is not None else "plain"
    if kind == "plain":
        module = nn.Embedding(num, dim, padding_idx=padding)
    elif kind == "bart":
        module = BartScaledWordEmbedding(num, dim, padding, embed_scale=5.5)
    else:
        module = Gemma3TextScaledWordEmbedding(num, dim, padding, embed_scale=3.3)
    return module, torch.randint(0, num, (3, 7), generator=generator)


def conv(draw, generator):
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel_size=draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    )
    batch = draw(st.sampled_from([(), (2,)]))
    return module, torch.randn(*batch, module.in_channels, *[5] * dims, generator=generator)


def quantized(draw, generator):
    codec, width = CODECS[draw(st.sampled_from(["Q4_0", "Q4_1", "Q8_0"]))], draw(st.sampled_from([32, 64]))
    values = torch.randn(draw(SIZE), width, generator=generator).numpy()
    data = torch.from_numpy(gguf.quants.quantize(values, gguf.GGMLQuantizationType[codec.name]))
    bias = nn.Parameter(torch.randn(len(values), generator=generator)) if draw(st.booleans()) else None
    return QuantizedLinear(Blocks(data, width, codec), torch.float32, bias), torch.randn(
        2, 3, width, generator=generator
    )


EXAMPLES = {
    "linear": linear,
    "hf_conv1d": hf_conv1d,
    "embedding": embedding,
    "conv": conv,
    "quantized": quantized,
}


def test_every_base_kind_has_examples_in_these_laws():
    assert set(EXAMPLES) == set(KINDS)


@st.composite
def cases(draw, trained: bool, dtypes=tuple(DTYPES)) -> Case:
    """A layer of any kind, variant, dtype, shape, rank, rule and init; its factors are random where it is trained."""
    seed = draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    base, x = EXAMPLES[draw(st.sampled_from(sorted(EXAMPLES)))](draw, generator)
    dtype = draw(st.sampled_from(list(dtypes)))
    base = base.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    kind = KINDS[kind_name(base)](base)
    r = draw(st.integers(1, min(kind.in_features, kind.out_features)))
    layer = new_layer(
        base,
        name="layer",
        r=r,
        alpha=r + draw(st.sampled_from([1.0, 0.5, 3.0])),
        rule=draw(st.sampled_from(sorted(SCALING))),
        variant=draw(st.sampled_from(sorted(VARIANTS))),
        init=draw(st.sampled_from(sorted(INITS))),
        generator=generator,
        dropout=Dropout(0.0, DropoutKey()),
    )
    base.requires_grad_(False)
    if trained:
        train(layer, generator)
    return Case(layer, x, layer.variant_name)


def train(layer: LoRALayer, generator: torch.Generator) -> None:
    """Factors as if after training: A, B and VeRA's vectors normal, all else scaled by 0.5 to 1.5."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            if name in ("lora_A", "lora_B", "scale_d", "scale_b"):
                parameter.normal_(generator=generator)
            else:
                parameter.mul_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) + 0.5)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def gamma(n: int, u: float) -> float:
    return n * u / (1 - n * u)


def wide(layer: LoRALayer) -> LoRALayer:
    """The same layer in float64."""
    return copy.deepcopy(layer).double()


def as_wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@torch.no_grad()
def bound(case: Case) -> Tensor:
    """How far two ways to y may be apart, element by element (see the top of this file)."""
    layer = wide(case.layer)
    rows = torch.linalg.vector_norm
    W = layer.original_matrix()
    turned = rows(layer.variant.merged_weight(layer, W), dim=1)
    gain = float((turned / rows(W + layer.delta_weight(), dim=1).clamp_min(1e-300)).max())
    make_absolute(layer)
    x = as_wide(case.x).abs()
    sizes = layer.base(x) + layer.low_rank(x)
    acc = unit_roundoff(torch.promote_types(case.dtype, torch.float32))
    terms = layer.in_features + layer.r
    relative = ROUNDINGS * unit_roundoff(case.dtype) + 2 * gamma(terms + ROUNDINGS, acc)
    smallest = torch.finfo(case.dtype).smallest_normal * torch.finfo(case.dtype).eps
    underflow = terms * ROUNDINGS * smallest * (1 + float(layer.lora_B.abs().sum()))
    return (1 + abs(layer.scale)) * (1 + gain) * (relative * sizes + underflow)


def make_absolute(layer: LoRALayer) -> None:
    """The layer of absolute values, in which nothing cancels."""
    for tensor in (*layer.parameters(recurse=False), *layer.base.parameters()):
        tensor.abs_()
    if isinstance(layer.base, QuantizedLinear):
        layer.base.write(layer.base.weight.abs())


def with_weight(base: nn.Module, W: Tensor, x: Tensor) -> Tensor:
    """What the base gives with another weight."""
    if isinstance(base, QuantizedLinear):
        return F.linear(x, W, base.bias)
    return torch.func.functional_call(base, {"weight": W}, (x,))


def assert_within(got: Tensor, expected: Tensor, limit: Tensor) -> None:
    excess = (got.detach().double() - expected.detach().double()).abs() - limit
    assert got.shape == expected.shape
    assert float(excess.max()) <= 0, f"off by {float(excess.max()):.3g} more than rounding explains"


def stored(kind: str, W: Tensor, shape: torch.Size) -> Tensor:
    """A matrix (out, in) in the layout that each kind of module stores; written here again, as an oracle."""
    return W.t() if kind in ("hf_conv1d", "embedding") else W.reshape(shape)


def oracle_weight(layer: LoRALayer, A: Tensor, B: Tensor, extra: dict[str, Tensor]) -> Tensor:
    """W' at scale 1 by the papers' formulas, as it is stored: Hu et al. 3, Liu et al. 5, Kopiczko et al. 2."""
    kind = kind_name(layer.base)
    W0 = layer.kind.weight.detach()
    W = W0.t() if kind in ("hf_conv1d", "embedding") else W0.flatten(1)
    A, B = A.flatten(1), B.flatten(1)
    if layer.variant_name == "vera":
        A, B = extra["scale_d"][:, None] * A, extra["scale_b"][:, None] * B
    V = W + layer.scaling * (B @ A)
    if layer.variant_name == "dora":
        V = extra["magnitude"][:, None] * V / V.detach().square().sum(1, keepdim=True).sqrt()
    return stored(kind, V, W0.shape)


@given(cases(trained=False))
def test_fresh_adapter_gives_the_base_output(case):
    """LoRA: B = 0 makes every term of B h zero, and y + 0 is y. DoRA: m is the norm: g = 1, and g - 1 is 0."""
    expected = case.layer.base(case.x)
    assert torch.equal(case.layer(case.x), expected)


@given(cases(trained=True))
def test_scale_zero_is_bitwise_the_base(case):
    expected, weight = case.layer.base(case.x), case.layer.kind.weight.clone()
    case.layer.set_scale(0.0)
    assert torch.equal(case.layer(case.x), expected)
    case.layer.merge()
    assert torch.equal(case.layer.kind.weight, weight)
    assert torch.equal(case.layer(case.x), expected)


@given(cases(trained=True))
def test_scale_zero_skips_the_branch_even_where_it_is_not_finite(case):
    expected = case.layer.base(case.x)
    case.layer.lora_B.data.fill_(torch.inf)
    case.layer.set_scale(0.0)
    assert torch.equal(case.layer(case.x), expected)
    assert torch.equal(case.layer.merged_weight(), case.layer.kind.weight)


@given(cases(trained=True), st.sampled_from([1.0, 0.3, 2.5, -1.0]))
def test_merged_output_equals_unmerged_output(case, scale):
    case.layer.set_scale(scale)
    expected = case.layer(case.x)
    limit = bound(case)
    case.layer.merge()
    assert_within(case.layer(case.x), expected, limit)


@given(cases(trained=True), st.sampled_from([1.0, 0.3, 2.5, -1.0]))
def test_scale_s_means_w0_plus_s_times_merged_minus_w0(case, scale):
    layer = wide(case.layer)
    expected = copy.deepcopy(layer.base)
    W0 = layer.kind.weight.detach()
    W1 = oracle_weight(layer, layer.lora_A, layer.lora_B, dict(layer.named_parameters(recurse=False))).detach()
    W = W0 + scale * (W1 - W0)
    case.layer.set_scale(scale)
    assert_within(case.layer(case.x), with_weight(expected, W, as_wide(case.x)), bound(case))


@given(cases(trained=True))
def test_unmerge_restores_the_weight_bitwise(case):
    expected = case.layer.kind.weight.clone()
    case.layer.merge()
    case.layer.set_scale(1.7)
    case.layer.merge()
    case.layer.unmerge()
    assert torch.equal(case.layer.kind.weight, expected)
    assert not case.layer.merged


@given(cases(trained=True), st.sampled_from([0.3, 2.5]))
def test_scaling_a_merged_layer_merges_it_again_from_the_original(case, scale):
    expected_layer = copy.deepcopy(case.layer)
    expected_layer.set_scale(scale)
    case.layer.merge()
    case.layer.set_scale(scale)
    assert case.layer.merged
    assert torch.equal(case.layer.kind.weight, expected_layer.merged_weight())


@given(cases(trained=True))
def test_gradients_reach_every_trained_tensor_and_nothing_else(case):
    case.layer(case.x).float().square().sum().backward()
    adapter = set(dict(case.layer.named_parameters(recurse=False))) - set(case.layer.variant.frozen)
    for name, parameter in case.layer.named_parameters():
        assert (parameter.grad is not None) == (name in adapter), name
        assert parameter.grad is None or parameter.grad.dtype == torch.promote_types(case.dtype, torch.float32)


def without_padding(case: Case) -> Tensor:
    """The input with padding ids replaced: torch gives a padding row no gradient, so it says nothing of B and m."""
    padding = getattr(case.layer.base, "padding_idx", None)
    return case.x if padding is None else case.x.masked_fill(case.x == padding, 1 - padding)


@given(cases(trained=True, dtypes=(torch.float64,)))
def test_gradients_equal_those_of_the_dense_oracle(case):
    """In float64, against autograd through W'. A gradient is a sum of at most N products, each at most S in size.

    S: the gradients, and the output, of the network of absolute values, in which nothing cancels; times what the
    variant's row factor and its derivative can add. The limit is gamma(N) S.
    """
    layer, x = case.layer, without_padding(case)
    probe = torch.randn(layer(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for parameter in layer.parameters(recurse=False):
        parameter.requires_grad_(True)  # what is frozen has a gradient too, if it is asked for
    names, parameters = zip(*layer.named_parameters(recurse=False), strict=True)
    got = torch.autograd.grad((layer(x) * probe).sum(), parameters)

    free = [p.detach().clone().requires_grad_() for p in parameters]
    extra = dict(zip(names, free, strict=True))
    weight = oracle_weight(layer, extra["lora_A"], extra["lora_B"], extra)
    y = with_weight(layer.base, weight, x)
    expected = torch.autograd.grad((y * probe).sum(), free)

    limit = gamma(layer.in_features * layer.out_features + probe.numel() + ROUNDINGS, 2**-53) * largest_term(case)
    for name, a, b in zip(names, got, expected, strict=True):
        assert float((a - b).abs().max()) <= limit, name


def largest_term(case: Case) -> float:
    layer, x = wide(case.layer), case.x.abs()
    with torch.no_grad():
        W = layer.original_matrix()
        norms = torch.linalg.vector_norm(W + layer.delta_weight(), dim=1)
        turned = torch.linalg.vector_norm(layer.variant.merged_weight(layer, W), dim=1)
        factor = 1 + float((turned / norms).max()) + float((1 / norms).max())
        make_absolute(layer)
    total = (layer.base(x) + layer.low_rank(x)).sum()
    trained = [p for name, p in layer.named_parameters(recurse=False) if name != "magnitude"]
    gradients = torch.autograd.grad(total, trained)
    probe_size = 6.0  # no normal draw of these few goes beyond
    return factor * probe_size * float(total.detach() + sum(g.sum() for g in gradients))


@given(cases(trained=True))
def test_a_deep_copy_is_equal_and_independent(case):
    expected = case.layer(case.x)
    twin = copy.deepcopy(case.layer)
    assert torch.equal(twin(case.x), expected)
    twin.set_scale(0.5)
    twin.merge()
    assert torch.equal(case.layer(case.x), expected)
    assert twin.kind.module is twin.base


@given(cases(trained=True, dtypes=(torch.float32, torch.bfloat16, torch.float16)))
def test_adapters_are_float32_and_output_has_the_dtype_of_the_base(case):
    assert {p.dtype for p in case.layer.parameters(recurse=False)} == {torch.float32}
    assert case.layer(case.x).dtype == case.dtype


@pytest.mark.parametrize("rule", sorted(SCALING))
def test_delta_weight_is_scaling_times_b_a(rule):
    A, B = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [20.0]])
    expected = {"alpha/r": 4.0, "alpha/sqrt(r)": 4.0}[rule] * torch.tensor([[10.0, 20.0, 30.0], [20.0, 40.0, 60.0]])
    assert torch.equal(delta_weight(A, B, scaling(1, 4.0, rule)), expected)
