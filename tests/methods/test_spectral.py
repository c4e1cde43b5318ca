"""Starting from what weights, inputs or gradients mostly are."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lorafit.config import MethodConfig
from lorafit.data.store import Encoded
from lorafit.errors import ConfigError
from lorafit.export import saved
from lorafit.export.merge import tolerance
from lorafit.lora.inject import lora_layers
from lorafit.methods import spectral, table
from lorafit.methods.method import Beginning
from lorafit.model.spec import ModelSpec
from lorafit.train.setup import gradients_of_first_rows, over_first_rows
from tests import tiny

R, ALPHA = 3, 7.0
IDS = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(3))


class Steps:
    """As much of a TrainConfig as the first step's rows take."""

    batch_size, order_seed = 4, 0


def rows() -> list[Encoded]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for length in (40, 33, 61, 12):
        ids = torch.randint(2, 258, (length,), generator=generator).int().numpy()
        supervised = torch.ones(length).numpy() > 0
        supervised[0] = False
        found.append(Encoded(ids, supervised, 0, "here"))
    return found


def config(init: str, **more: object) -> MethodConfig:
    return MethodConfig(init=init, r=R, alpha=ALPHA, targets=["q_proj", "o_proj", "down_proj"], **more)  # type: ignore[arg-type]


def started(init: str, seed: int = 0) -> nn.Module:
    model = tiny.llama(seed)
    table.attach(model, config(init))
    data = rows()
    beginning = Beginning(
        config(init),
        ModelSpec.__new__(ModelSpec),
        over_rows=lambda: over_first_rows(model, data, Steps()),  # type: ignore[arg-type]
        with_gradients=lambda: gradients_of_first_rows(model, data, Steps()),  # type: ignore[arg-type]
    )
    (told,) = table.of(model).start(model, beginning)
    assert told.startswith("6 layers start from")
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def relative(expected: Tensor, got: Tensor) -> float:
    return float((expected - got).norm() / expected.norm())


@torch.no_grad()
def trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in table.of(model).trainable(model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("init", spectral.STARTS)
def test_a_fresh_one_gives_the_base_but_for_rounding(init: str) -> None:
    model = started(init)
    assert relative(logits(tiny.llama()), logits(model)) <= tolerance(model)
    B = torch.cat([layer.lora_B.flatten() for layer in lora_layers(model).values()])
    assert bool(B.any()) == (init in spectral.MOVING)


@pytest.mark.parametrize("init", spectral.STARTS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will drop
def test_what_is_saved_stands_on_the_base_itself_for_us_and_for_peft(init: str, tmp_path: Path) -> None:
    model = trained(started(init))
    expected = logits(model)
    saved.save(model, tmp_path / "adapter", config(init), base="", tokenizer=None)
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    moving = init in spectral.MOVING
    assert (fields["r"], fields["lora_alpha"]) == ((2 * R, 2 * ALPHA) if moving else (R, ALPHA))
    ours = tiny.llama()
    saved.load(ours, tmp_path / "adapter")
    assert relative(expected, logits(ours)) <= tolerance(model)
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")
    assert relative(expected, logits(theirs)) <= tolerance(model)


def test_pissa_holds_the_largest_singular_values() -> None:
    model, before = started("pissa"), tiny.llama()
    layer = lora_layers(model)["model.layers.0.mlp.down_proj"]
    W = before.model.layers[0].mlp.down_proj.weight.detach()
    S = torch.linalg.svdvals(W)
    left, least = (W - layer.delta_weight().detach()).square().sum(), S[R:].square().sum()
    # Each pass of a randomised SVD multiplies what it has of a direction beyond those that it looks for by its singular
    # value, twice, against the r-th; what a Gaussian start has of it: Halko et al. 2011, corollary 10.10.
    p, n = spectral.MORE, min(W.shape)
    begun = 1 + (R / (p - 1)) ** 0.5 + math.e * (R + p) ** 0.5 / p * (n - R) ** 0.5
    leak = begun * float(S[R + p] / S[R - 1]) ** (2 * spectral.PASSES + 1)
    assert float(left - least) <= R * leak**2 * float(S[0] ** 2)
    assert torch.allclose(layer.kind.weight + layer.delta_weight().detach(), W, atol=1e-6)


def test_olora_has_orthonormal_columns() -> None:
    layer = lora_layers(started("olora"))["model.layers.1.self_attn.o_proj"]
    B = layer.lora_B * layer.scaling**0.5
    assert torch.allclose(B.T @ B, torch.eye(R), atol=1e-5)


def test_evas_directions_hold_more_of_the_inputs_than_random_ones() -> None:
    model = started("eva")
    name = "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    handle = lora_layers(model)[name].register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    over_first_rows(model, rows(), Steps())  # type: ignore[arg-type]
    handle.remove()
    X, A = torch.cat(seen), lora_layers(model)[name].lora_A.detach()
    best = torch.linalg.svdvals(X)[:R].square().sum()
    assert float((X @ A.T).square().sum() / best) > 0.98  # orthonormal rows hold at most what the best ones do
    assert torch.allclose(A @ A.T, torch.eye(R), atol=1e-4)


def test_lora_ga_takes_its_first_step_along_the_gradient() -> None:
    """To first order B A moves by -(dL/dB A + B dL/dA) = -(G A^T A + B B^T G): what rank 2 r of G holds."""
    model = started("lora-ga")
    whole = tiny.llama()
    data = rows()
    for p in whole.parameters():
        p.requires_grad_(False)
    target = whole.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    gradients_of_first_rows_of(whole, data)
    G = target.grad
    assert G is not None
    layer = lora_layers(model)["model.layers.0.mlp.down_proj"]
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    moved = G @ A.T @ A + B @ B.T @ G
    U, S, V = torch.linalg.svd(G)
    best = U[:, : 2 * R] @ torch.diag(S[: 2 * R]) @ V[: 2 * R]
    cosine = float((moved * best).sum() / moved.norm() / best.norm())
    assert cosine > 0.99


def test_gradients_layer_by_layer_are_those_of_one_pass_and_each_is_seen_once() -> None:
    model, whole, data = tiny.llama(), tiny.llama(), rows()
    table.attach(model, config("lora-ga"))
    seen: list[tuple[str, torch.Tensor]] = []
    with spectral._gradients(list(lora_layers(model).values()), lambda layer, G: seen.append((layer.name, G))):
        gradients_of_first_rows(model, data, Steps())  # type: ignore[arg-type]
    gradients_of_first_rows_of(whole, data)
    assert sorted(name for name, _ in seen) == sorted(lora_layers(model))
    for name, G in seen:
        assert torch.allclose(G, whole.get_submodule(name).weight.grad, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def gradients_of_first_rows_of(model: nn.Module, data: list[Encoded]) -> None:
    from lorafit.data.pack import micro_batches
    from lorafit.engine.engine import plain

    engine = plain(model)
    (batch,) = micro_batches(data, range(len(data)), 10_000, engine.packing)
    (engine.loss(batch) / batch.supervised_tokens).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"init": "pissa", "variant": "dora"}, "--variant dora"), ({"init": "olora", "dropout": 0.1}, "--dropout")],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spectral.check(MethodConfig(**settings))  # type: ignore[arg-type]
