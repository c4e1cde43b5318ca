"""Sums of adapters, and adapters of a lower rank, against PEFT's `add_weighted_adapter` and against the updates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafit.config import LoRAConfig
from lorafit.errors import AdapterError, ConfigError, RankError
from lorafit.export import arithmetic, peft
from lorafit.lora.combine import HOWS, Factors, Recipe, truncated
from lorafit.lora.inject import lora_layers
from lorafit.methods import lora
from tests import tiny

WEIGHTS = (0.7, -0.4)
PEFT_NAMES = {"magnitude-prune": "magnitude_prune", "dare": "dare_linear"}


def saved(path: Path, seed: int, **settings: Any) -> Path:
    """An adapter that does something, over the tiny model."""
    model = tiny.llama()
    config = LoRAConfig(**{"r": 3, "alpha": 7.0, **settings})
    lora.attach(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.METHOD.trainable(model).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    peft.save(model, path, config, base="the base", tokenizer=None)
    return path


def updates(path: Path) -> dict[str, Tensor]:
    """scaling * B A of each layer."""
    model = tiny.llama()
    peft.load(model, path)
    return {name: layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach() for name, layer in layers(model)}


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    return list(lora_layers(model).items())


def joined(tmp_path: Path, how: str, density: float = 1.0, rank: int | None = None, **second: Any) -> list[Path]:
    a, b = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2, **second)
    arithmetic.combine([a, b], WEIGHTS, how, density, rank, seed=0, out=tmp_path / "out")
    return [a, b, tmp_path / "out"]


@pytest.mark.parametrize("second", [{}, {"r": 5, "scaling_rule": "alpha/sqrt(r)", "rank_pattern": {"q_proj": 2}}])
@pytest.mark.parametrize("how", ["cat", "svd"])
def test_the_sum_is_exact_where_its_rank_allows(how: str, second: dict[str, Any], tmp_path: Path) -> None:
    a, b, out = (updates(path) for path in joined(tmp_path, how, rank=8 if how == "svd" else None, **second))
    for name, update in out.items():
        torch.testing.assert_close(update, WEIGHTS[0] * a[name] + WEIGHTS[1] * b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "density"),
    [
        *((how, 1.0) for how in ("cat", "svd", "linear", "ties", "magnitude-prune")),
        ("ties", 0.5),
        ("magnitude-prune", 0.5),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The density 1.0")  # PEFT calls what will be dropped
def test_it_is_what_peft_makes_of_them(how: str, density: float, tmp_path: Path) -> None:
    a, b, out = joined(tmp_path, how, density)
    theirs = PeftModel.from_pretrained(tiny.llama(), a, adapter_name="a")
    theirs.load_adapter(b, adapter_name="b")
    more = {"density": density} if how in ("ties", "magnitude-prune") else {}
    theirs.add_weighted_adapter(["a", "b"], list(WEIGHTS), "c", combination_type=PEFT_NAMES.get(how, how), **more)
    theirs.set_adapter("c")
    ours = tiny.llama()
    peft.load(ours, out)
    ids = torch.arange(60).view(2, 30)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    reread = PeftModel.from_pretrained(tiny.llama(), out)
    torch.testing.assert_close(reread(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_dare_drops_follows_its_seed_and_is_right_in_the_mean(tmp_path: Path) -> None:
    a = Factors(torch.randn(4, 200), torch.randn(300, 4), 2.0)
    drawn = [HOWS["dare"]([a], Recipe([1.0], 0.25, None, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].A, drawn[1].A) and not torch.equal(drawn[0].A, drawn[2].A)
    kept = drawn[0].B != 0
    assert 0.2 < float(kept.float().mean()) < 0.3
    torch.testing.assert_close(drawn[0].B[kept], 4 * 2.0**0.5 * a.B[kept])


def test_a_layer_that_one_adapter_alone_changes_gets_its_part(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", 1, targets=["q_proj"]), saved(tmp_path / "b", 2, targets=["q_proj", "down_proj"])
    found = arithmetic.combine([a, b], WEIGHTS, "cat", 1.0, None, 0, tmp_path / "out")
    assert (found["modules"], found["in_all"], found["ranks"]) == (4, 2, [3, 6])
    one, two, out = updates(a), updates(b), updates(tmp_path / "out")
    for name, update in out.items():
        torch.testing.assert_close(update, WEIGHTS[0] * one.get(name, 0) + WEIGHTS[1] * two[name])


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_a_lower_rank_is_the_nearest_one(r: int, lower: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    update = Factors(torch.randn(r, 9, generator=generator), torch.randn(7, r, generator=generator), 0.5)
    lower = min(lower, r)
    found, lost = truncated(update, lower)
    singular = torch.linalg.svdvals((update.B @ update.A).double())
    left = float((update.B @ update.A - found.B @ found.A).norm() / (update.B @ update.A).norm())
    assert lost == pytest.approx(float(singular[lower:].norm() / singular.norm()), abs=1e-6)
    assert left == pytest.approx(lost, abs=1e-5)
    assert (found.A.shape, found.B.shape, found.scaling) == ((lower, 9), (7, lower), 0.5)


def test_shrinking_loses_what_it_says(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", 1, r=6, rank_pattern={"q_proj": 2})
    found = arithmetic.shrink(path, 3, path, tmp_path / "out")
    before, after = updates(path), updates(tmp_path / "out")
    lost = sum(float((before[name] - after[name]).square().sum()) for name in before) ** 0.5
    whole = sum(float(update.square().sum()) for update in before.values()) ** 0.5
    assert found["lost"] == pytest.approx(lost / whole, rel=1e-4) and 0 < found["lost"] < 1
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3
    assert arithmetic.shrink(path, 6, path, tmp_path / "same")["lost"] == pytest.approx(0, abs=1e-6)


TIED = {"targets": "all-linear,embed_tokens"}


@pytest.mark.parametrize("r", [2, 3])
def test_a_lower_rank_of_a_weight_that_is_embedding_and_head_stays_one_update(r: int, tmp_path: Path) -> None:
    source = saved(tmp_path / "a", 1, **TIED)
    told = arithmetic.shrink(source, r, beside=source, out=tmp_path / "cut")
    before, after = updates(source), updates(tmp_path / "cut")  # loading refuses two that differ
    assert before.keys() == after.keys() >= {"model.embed_tokens", "lm_head"}
    once = before.keys() - {"lm_head"}
    lost = sum(float((before[name] - after[name]).square().sum()) for name in once)
    whole = sum(float(before[name].square().sum()) for name in once)
    # Where nothing is lost, float32 rounds the factors' scaling.
    assert told["lost"] == pytest.approx(math.sqrt(lost / whole), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("how", "weights"), [("cat", WEIGHTS), ("svd", WEIGHTS), ("magnitude-prune", (-0.7, -0.4))])
def test_a_sum_of_such_updates_is_one_again(how: str, weights: tuple[float, float], tmp_path: Path) -> None:
    both = [saved(tmp_path / str(seed), seed, **TIED) for seed in (1, 2)]
    r = 6 if how == "svd" else None
    arithmetic.combine(both, weights, how, 1.0, r, seed=0, out=tmp_path / "out")
    parts, found = [updates(path) for path in both], updates(tmp_path / "out")  # loading refuses two that differ
    if how != "magnitude-prune":
        for name, one in found.items():
            expected = sum(weight * own[name] for weight, own in zip(weights, parts, strict=True))
            # Six products of factors that are each rounded once, and their sums: entries are below 4.
            torch.testing.assert_close(one, expected, atol=4 * 6 * 2**-23, rtol=0)


def test_what_is_one_update_in_some_of_the_adapters_alone_is_refused(tmp_path: Path) -> None:
    tied, apart = saved(tmp_path / "tied", 1, **TIED), saved(tmp_path / "apart", 2, **TIED)
    weights = apart / "adapter_model.safetensors"
    tensors = load_file(weights)
    (head,) = [name for name in tensors if name.endswith("lm_head.lora_A.weight")]
    save_file(tensors | {head: 2 * tensors[head]}, weights)
    with pytest.raises(AdapterError, match=r"lm_head has the update of model\.embed_tokens in some of the"):
        arithmetic.combine([tied, apart], WEIGHTS, "cat", 1.0, None, seed=0, out=tmp_path / "out")


def test_what_cannot_be_added_up_is_refused(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2, r=5)
    dora = saved(tmp_path / "dora", 3, variant="dora")

    def combined(*paths: Path, weights: tuple[float, ...] = (1.0, 1.0), how: str = "cat", **more: Any) -> None:
        settings = {"density": 1.0, "r": None, "seed": 0, "out": tmp_path / "out", **more}
        arithmetic.combine(paths, weights, how, **settings)

    with pytest.raises(RankError, match="the ranks are 3, 5"):
        combined(a, b, how="linear")
    with pytest.raises(ConfigError, match="2 adapters are given and 1 weights"):
        combined(a, b, weights=(1.0,))
    with pytest.raises(ConfigError, match="--density is given with --how cat"):
        combined(a, b, density=0.5)
    with pytest.raises(ConfigError, match="--r is given with --how cat"):
        combined(a, b, r=2)
    with pytest.raises(AdapterError, match="is of variant dora"):
        combined(a, dora)
    fields = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": "another"}))
    with pytest.raises(AdapterError, match="of different base models: the base, another"):
        combined(a, b)
    assert not (tmp_path / "out").exists()
