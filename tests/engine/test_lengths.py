"""Rows with lengths of their own (DoRA) in the engine: against the norms and gradients that plain autograd makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafit.data.pack import micro_batches
from lorafit.engine.engine import Engine, prepare
from lorafit.engine.groups import is_whole
from lorafit.engine.kernels import native
from lorafit.engine.kernels import plain as torchs
from lorafit.engine.kernels.products import has_low_rank
from lorafit.engine.layers import decoder_layers
from lorafit.engine.lengths import LEAST, Lengthened, lengths, row_squares
from lorafit.engine.update import Span
from lorafit.lora.base import kind_name
from lorafit.lora.dora import row_norm
from lorafit.lora.inject import set_scale
from lorafit.lora.layer import LoRALayer
from lorafit.quant.bits import to_int8, to_nf4
from lorafit.quant.modules import QuantizedLinear
from tests.engine.test_engine import (
    ARCHITECTURES,
    FUSED,
    _gradient_error,
    adapted,
    alone,
    assert_same,
    build,
    rows,
    together,
)

EPS = torch.finfo(torch.float32).eps


def with_dora(model: nn.Module, **settings: Any) -> nn.Module:
    return adapted(model, variant="dora", **settings)


def random_biases(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


# --- the norms ------------------------------------------------------------------------------------------------------


def found_and_expected(turn: Tensor, W: Tensor, s: float = 1.5, r: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """c of the three terms, c of V itself in float64, and the bound of the relative error. turn: (out, in), what is
    added to W, of rank r."""
    U, S, Vh = torch.linalg.svd(turn.double())
    A, B = Vh[:r].float(), (U[:, :r] * S[:r]).float() / s
    out = len(W)
    m = torch.linspace(0.5, 2, out)
    layer = Lengthened(Span(slice(0, out), slice(0, r), s), A, B, m, 1.0)
    found = lengths(row_squares([W]), A @ W.T, [layer], EPS)
    delta = s * B.double() @ A.double()
    norm = torch.linalg.vector_norm(W.double() + delta, dim=1)
    sizes = torch.linalg.vector_norm(W.double(), dim=1) + torch.linalg.vector_norm(delta, dim=1)
    # Half of the square's, whose sums of `in` and r products are each off by eps times the root of their number.
    bound = EPS * (W.shape[1] ** 0.5 + r) * (sizes / norm) ** 2
    return found.gain.double(), m.double() / norm, bound


@pytest.mark.parametrize("shrunk", [0.0, 0.5, 0.9])
def test_the_norm_of_three_terms_is_that_of_the_row_within_what_cancels(shrunk: float) -> None:
    """The update takes a share of each row away, and turns the rest."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(20, 2, generator=generator) @ torch.randn(2, 48, generator=generator)  # so that rank 3 can do both
    other = 0.1 * torch.randn(20, 1, generator=generator) @ torch.randn(1, 48, generator=generator)
    got, expected, bound = found_and_expected(other - shrunk * W, W)
    assert ((got / expected - 1).abs() <= bound).all()
    assert float(bound.max()) < 0.01


def test_a_row_that_an_update_takes_away_is_held_where_it_can_be_told() -> None:
    W = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) @ torch.eye(3, 48)
    got, _, _ = found_and_expected(-W, W)
    m, norms = torch.linspace(0.5, 2, 20).double(), torch.linalg.vector_norm(W.double(), dim=1)
    assert got.isfinite().all() and (got <= 1.01 * m / norms / EPS**0.5).all()


def test_of_a_fresh_one_the_factor_is_one_to_the_bit() -> None:
    W = torch.randn(300, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    W[7] = 0
    m, A = row_norm(W.float()), torch.randn(4, 48)
    layer = Lengthened(Span(slice(0, 300), slice(0, 4), 1.75), A, torch.zeros(300, 4), m, 1.0)
    found = lengths(row_squares([W[:250], W[250:]]), A @ W.float().T, [layer], EPS)
    assert torch.equal(found.gain, torch.ones(300))
    assert found.rest is None and found.m.min() >= LEAST


@pytest.mark.skipif(not native.available(), reason="no C++ compiler on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "width"), [(1, 1), (5, 130), (300, 48)])
def test_columns_are_scaled_as_torch_does_and_their_sums_are_right(dtype: torch.dtype, n: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    g, u = (torch.randn(n, width + 3, generator=generator).to(dtype)[:, :width] for _ in range(2))
    columns = torch.rand(width, generator=generator) + 0.5
    expected, sums = torchs.scale_columns_backward(g, u, columns)
    got, got_sums = native.scale_columns_backward(g, u, columns)
    assert torch.equal(expected, got)
    size = (g.double() * u.double()).abs().sum(0)
    exact = (g.double() * u.double()).sum(0)
    assert ((got_sums.double() - exact).abs() <= EPS * n**0.5 * size + 1e-30).all()
    assert ((sums.double() - exact).abs() <= EPS * n**0.5 * size + 1e-30).all()
    native.scale_columns_(g, columns)
    assert torch.equal(expected, g)


# --- the engine -----------------------------------------------------------------------------------------------------


def is_by_groups(engine: Engine) -> bool:
    """Whether every adapted linear layer is computed by its group, lengths and all."""
    factors = [f for group in engine.groups for f in group.linears.factors]
    layers = [m for m in engine.model.modules() if isinstance(m, LoRALayer)]
    return all(f is not None and f.m is not None for f in factors) and all(map(is_whole, layers))


@pytest.mark.parametrize("name", ["qwen2", "gemma", "gpt2", "gpt_neox", "phi3", "mixtral"])
def test_gradients_are_those_of_rows_alone(name: str) -> None:
    model, data = with_dora(random_biases(build(name))), rows()
    expected = alone(model, data)
    engine = prepare(model, share_prefix=True)
    assert is_by_groups(engine)
    got = together(engine, data)
    assert_same(expected, got)
    assert any(key.endswith(".magnitude") for key in got[1])
    engine.recompute_layers()
    assert_same(expected, together(engine, data))


def test_a_length_that_crosses_zero_and_a_row_of_zeros_learn_too() -> None:
    model, data = build("llama"), rows()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0  # type: ignore[union-attr, index, operator]
    with_dora(model)
    with torch.no_grad():
        up = model.model.layers[1].mlp.up_proj  # type: ignore[union-attr, index]
        up.magnitude[5], up.magnitude[6] = 0.0, -0.5  # type: ignore[union-attr, operator, index]
    expected = alone(model, data)
    assert float(expected[1]["model.layers.1.mlp.up_proj.magnitude"][5].abs()) > 0
    assert_same(expected, together(prepare(model, share_prefix=True), data))


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_scale_is_followed(scale: float) -> None:
    model, data = with_dora(random_biases(build("qwen2"))), rows()
    set_scale(model, scale)
    expected = alone(model, data)
    engine = prepare(model, share_prefix=True)
    (batch,) = micro_batches(data, range(len(data)), 1 << 20, engine.packing)
    with torch.no_grad():
        assert float(engine.loss(batch)) == pytest.approx(expected[0], rel=1e-6)
    assert_same(expected, together(engine, data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_scale_0_the_base_comes_back_bitwise(dtype: torch.dtype) -> None:
    model, data = with_dora(build("llama", dtype)), rows()
    engine = prepare(model, share_prefix=True)
    (batch,) = micro_batches(data, range(len(data)), 1 << 20, engine.packing)
    set_scale(model, 0)
    base = prepare(adapted(build("llama", dtype)), share_prefix=True)
    set_scale(base.model, 0)
    with torch.no_grad():
        assert torch.equal(base.loss(batch), engine.loss(batch))


@pytest.mark.parametrize("settings", [{"targets": ["k_proj", "down_proj"]}, {"layers": "last:1"}])
def test_with_some_layers_adapted(settings: dict[str, Any]) -> None:
    model, data = with_dora(build("llama"), **settings), rows()
    expected = alone(model, data)
    engine = prepare(model, share_prefix=True)
    engine.release_weights()
    assert_same(expected, together(engine, data))


@pytest.mark.parametrize("form", [to_int8, to_nf4])
def test_weights_in_fewer_bits_have_their_decoded_rows_lengths(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, kind, settings, packed = ARCHITECTURES["llama"]
    in_blocks = {**settings, "hidden_size": 64, "intermediate_size": 128}
    monkeypatch.setitem(ARCHITECTURES, "llama", (config, kind, in_blocks, packed))
    model, data = build("llama"), rows()
    for name, module in list(model.named_modules()):
        if kind_name(module) == "linear" and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            stored = form(module.weight.detach())  # type: ignore[operator, union-attr]
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(stored, torch.float32))
    with_dora(model)
    expected = alone(model, data)
    engine = prepare(model, share_prefix=True)
    assert is_by_groups(engine)
    assert_same(expected, together(engine, data))


@pytest.mark.parametrize("int8", [False, True])
def test_in_fewer_bits_gradients_stay_within_their_rounding(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within half as much again as plain bf16 is off, and in int8 as LoRA is, whose layers have the same products."""
    config, kind, _, packed = ARCHITECTURES["llama"]
    monkeypatch.setitem(ARCHITECTURES, "llama", (config, kind, FUSED, packed))
    data = rows()

    def by_engine(variant: str) -> tuple[Engine, dict[str, Tensor], dict[str, Tensor]]:
        reference = alone(adapted(build("llama", torch.bfloat16), variant=variant).float(), data)[1]
        engine = prepare(adapted(build("llama", torch.bfloat16), variant=variant), share_prefix=True)
        if int8:
            engine.use_int8(micro_batches(data, range(len(data)), 100, engine.packing)[0], release=True)
        return engine, reference, together(engine, data)[1]

    engine, reference, got = by_engine("dora")
    assert has_low_rank() is all("forward" in layer.__dict__ for layer in decoder_layers(engine.model)[1])
    if int8:
        usual = _gradient_error(*by_engine("lora")[1:])
        assert usual < 0.1
    else:
        usual = _gradient_error(reference, alone(with_dora(build("llama", torch.bfloat16)), data)[1])
    assert _gradient_error(reference, got) <= 1.5 * usual
    lengths_alone = {key: g for key, g in reference.items() if key.endswith(".magnitude")}
    assert _gradient_error(lengths_alone, got) <= 1.5 * usual
    engine.recompute_layers()
    again = together(engine, data)[1]
    assert all(torch.equal(again[key], g) for key, g in got.items())


@pytest.mark.skipif(not has_low_rank(), reason="attention row by row needs AVX-512 BF16")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_layer_as_one_function_gives_the_same_bits_but_for_lengths_of_what_it_has_turned(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, kind, _, packed = ARCHITECTURES[name]
    monkeypatch.setitem(ARCHITECTURES, name, (config, kind, FUSED, packed))
    monkeypatch.setattr("lorafit.engine.engine.ends_by_token", lambda *about: False)
    found = []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr("lorafit.engine.engine._fuse_layers", lambda engine, probe: None)
        engine = prepare(with_dora(build(name, torch.bfloat16)), share_prefix=True)
        assert apart is not all("forward" in layer.__dict__ for layer in decoder_layers(engine.model)[1])
        found.append(together(engine, rows()))
    (loss, own), (expected_loss, expected) = found
    assert loss == expected_loss
    turned = ("q_proj.magnitude", "k_proj.magnitude") if name == "llama" else ()  # biases keep them apart
    for key, gradient in expected.items():
        if key.endswith(turned):
            eps = torch.finfo(torch.bfloat16).eps
            assert (own[key] - gradient).norm() <= 2 * eps * gradient.norm(), key
        else:
            assert torch.equal(own[key], gradient), key


def test_an_adapter_that_was_cast_with_its_model_is_computed_too() -> None:
    model, data = with_dora(build("llama").float()).to(torch.bfloat16), rows()
    reference = alone(with_dora(build("llama")), data)[1]
    got = together(prepare(model, share_prefix=True), data)[1]
    assert {gradient.dtype for gradient in got.values()} == {torch.bfloat16}
    by_torch = alone(model, data)[1]
    assert _gradient_error(reference, got) <= 1.5 * _gradient_error(reference, by_torch)


def test_without_a_compiler_torchs_own_operations_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = with_dora(build("llama")), rows()
    expected = alone(model, data)
    monkeypatch.setattr(native, "available", lambda: False)
    assert_same(expected, together(prepare(model, share_prefix=True), data))
