"""Starting from what rounding the base took away."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorafit.config import LoRAConfig, TrainConfig
from lorafit.errors import ConfigError
from lorafit.lora.inject import attached_layers, set_scale
from lorafit.methods import lora, rounding
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.run import Start, train
from tests import tiny

R, ALPHA = 6, 7.0


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 8), st.integers(0, 99))
def test_no_product_of_that_rank_is_nearer(rows: int, width: int, r: int, seed: int) -> None:
    r = min(r, rows, width)
    error = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    columns = torch.rand(width, generator=torch.Generator().manual_seed(seed + 1)) + 0.1
    before = torch.random.get_rng_state()
    for weights in (None, columns):
        A, B = rounding.nearest(error, r, weights)
        assert A.shape == (r, width) and B.shape == (rows, r)
        weighted = error if weights is None else error * weights
        least = torch.linalg.svdvals(weighted)[r:].norm()
        left = ((error - B @ A) * (1.0 if weights is None else weights)).norm()
        assert least * (1 - 1e-5) <= left + 1e-5 * error.norm()
        assert left <= 1.01 * least + 1e-5 * weighted.norm()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A model whose widths nf4's blocks divide, and whose hidden states have a few columns far larger than others."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::16] = 8.0
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def outputs(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 258, (8, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_the_adapted_model_starts_nearer_to_the_one_that_was_rounded(storage: str, path: Path) -> None:
    spec = model_spec.read(str(path))
    exact = model_load.load(spec, torch.float32).model
    weights = {name: p.detach() for name, p in exact.named_parameters()}
    away, squares = {}, {}
    for init in rounding.INITS:
        model = model_load.load(spec, torch.float32, storage=storage).model.eval()
        lora.attach(model, LoRAConfig(r=R, alpha=ALPHA, init=init))
        said = rounding.start(model, spec, init, lambda model=model: outputs(model))
        left = total = least = 0.0
        for layer in attached_layers(model):
            B, A = layer.lora_B.detach(), layer.lora_A.detach()
            change = weights[f"{layer.name}.weight"] - layer.base.stored.decode(torch.float32)
            total += float(change.square().sum())
            least += float(torch.linalg.svdvals(change)[R:].square().sum())
            left += float((change - layer.scaling * B @ A).square().sum())
        squares[init] = left
        assert least <= left < total
        if init == "loftq":
            assert left <= 1.01**2 * least
            assert f"{(left / total) ** 0.5:.0%} of its change of the weights is left" in said
        away[init] = float((outputs(model) - outputs(exact)).norm())
        set_scale(model, 0.0)
        away["rounded"] = float((outputs(model) - outputs(exact)).norm())
    assert squares["loftq"] < squares["qera"]
    assert away["qera"] < away["loftq"] and away["qera"] < away["rounded"]


def trained(**settings: Any) -> str:
    heard = io.StringIO()
    train(TrainConfig(**settings), {}, Start(False, False, time.time()), Console(file=heard, width=2000))
    return heard.getvalue()


def test_a_run_starts_so_and_says_what_is_left(path: Path, tmp_path: Path) -> None:
    data = tiny.write_chat(tmp_path / "rows.jsonl", 12)
    settings = {"model": str(path), "data": str(data), "r": R, "alpha": ALPHA, "threads": 1, "batch_size": 4}
    for init in rounding.INITS:
        said = trained(**settings, output=str(tmp_path / init), base_storage="nf4", init=init)
        assert "14 layers start from what rounding took away" in said
    for more, complaint in (
        ({}, "nothing is rounded here"),
        ({"base_storage": "nf4", "variant": "dora"}, "is given with --variant dora"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            trained(**settings, output=str(tmp_path / "refused"), init="loftq", **more)
    with pytest.raises(ConfigError, match="loftq"):
        trained(**settings, output=str(tmp_path / "refused"), init="loft")


def test_an_unknown_start_is_told_what_there_is(path: Path) -> None:
    model = model_load.load(model_spec.read(str(path)), torch.float32).model
    attach: Callable[..., Any] = lora.attach
    with pytest.raises(ConfigError, match="there are gaussian, kaiming, loftq, qera"):
        attach(model, LoRAConfig(r=R, alpha=ALPHA, init="none of them"))
