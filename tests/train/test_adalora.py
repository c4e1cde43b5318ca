"""AdaLoRA: against PEFT's own on the same numbers, and as a run that ends as plain LoRA of the rank asked for."""

from __future__ import annotations

import io
import json
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorafit.config import EvalConfig, TrainConfig
from lorafit.engine.engine import prepare
from lorafit.errors import ConfigError
from lorafit.export import peft as peft_format
from lorafit.export.merge import tolerance
from lorafit.lora import gates, inject
from lorafit.lora.layer import LoRALayer
from lorafit.methods import gated, table
from lorafit.run import Start, train
from lorafit.train import checkpoint
from lorafit.train.adalora import Budget, schedule
from lorafit.use import evaluate
from tests import tiny
from tests.engine.test_engine import alone, assert_same, rows, together
from tests.train.test_loop import Heard, work
from tests.train.test_loop import run as fit_it

IDS = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(3))
SETTINGS: dict[str, Any] = {"rank_schedule": "adalora", "r": 3, "alpha": 7.0, "r_start": 5}


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(model="tiny", data="rows", output="out", **{**SETTINGS, **settings})


def attached(**settings: Any) -> nn.Module:
    model = tiny.llama()
    gated.attach(model, config(**settings))
    return model


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for parameter in table.of(model).trainable(model).values():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def relative(expected: Tensor, got: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# --- against PEFT ---------------------------------------------------------------------------------------------------


def allocator(total: int, hold: int, settle: int) -> tuple[nn.Module, RankAllocator]:
    settings = peft.AdaLoraConfig(
        init_r=5, target_r=3, tinit=hold, tfinal=settle, total_step=total, target_modules=["q_proj", "down_proj"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.llama(), settings).base_model
    return model, model.rankallocator


@pytest.mark.parametrize(("total", "hold", "settle"), [(20, 2, 6), (20, 0, 0), (7, 3, 1), (2, 0, 0)])
def test_the_budget_is_that_of_peft_at_every_step(total: int, hold: int, settle: int) -> None:
    _, theirs = allocator(total, hold, settle)
    ours = Budget(theirs.init_bgt, theirs.target_bgt, hold, total - settle)
    steps = range(1, total + 1)
    assert [ours.after(step) for step in steps] == [theirs.budget_schedule(step)[0] for step in steps]
    assert ours.after(total) == theirs.target_bgt == 3 * 4


def test_importance_and_what_is_taken_away_are_those_of_peft() -> None:
    total, hold, settle = 14, 2, 4
    model, theirs = allocator(total, hold, settle)
    mine = attached(targets=["q_proj", "down_proj"])
    own = schedule(inject.owners(mine), 3, total, hold / total + 1e-9, settle / total + 1e-9, 0.1)
    assert (own.budget.hold, own.budget.settled) == (hold, total - settle)
    named = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    changed = 0
    for step in range(1, total + 1):
        for name, layer in own.layers.items():
            for part, key in (("lora_A", "lora_A"), ("lora_B", "lora_B"), ("gate", "lora_E")):
                ours, other = layer.get_parameter(part), named[f"model.{name}.{key}.default"]
                with torch.no_grad():  # as if an optimizer had written, and a backward pass before it
                    ours.add_(torch.randn(ours.shape, generator=generator))
                    ours.grad = torch.randn(ours.shape, generator=generator)
                    other.copy_(ours.view(other.shape))
                    other.grad = ours.grad.view(other.shape).clone()
        model.update_and_allocate(step)
        own.after_step(step, learned=True)
        for name, layer in own.layers.items():
            assert layer.gate is not None
            assert torch.equal(named[f"model.{name}.lora_E.default"].flatten(), layer.gate)
            if step < own.budget.settled:
                key = f"{name}.%s.default"
                parts = [theirs._element_score(key % part) for part in ("lora_E", "lora_A", "lora_B")]
                expected = parts[0].flatten() + parts[1].mean(1) + parts[2].mean(0)
                torch.testing.assert_close(own.scores()[name], expected, rtol=1e-5, atol=1e-12)
        left = sum(int(torch.count_nonzero(layer.gate)) for layer in own.layers.values())  # type: ignore[arg-type]
        assert left == own.budget.after(step)
        changed += left < own.budget.first
    assert changed >= total - hold - 1


def test_factors_are_kept_at_right_angles_by_the_gradient_of_peft() -> None:
    model = attached(targets=["q_proj", "down_proj"])
    own = schedule(inject.owners(model), 3, 10, 0.1, 0.3, 0.7)
    factors = [p for layer in own.layers.values() for p in (layer.lora_A, layer.lora_B)]
    total = torch.zeros(())
    for number, factor in enumerate(factors):  # as `AdaLoraModel.forward` has it
        covariance = factor.T @ factor if number % 2 else factor @ factor.T
        total = total + torch.norm(covariance - torch.eye(len(covariance)), p="fro")
    expected = torch.autograd.grad(0.7 * total / len(factors), factors)
    for factor in factors:
        factor.grad = torch.zeros_like(factor)
    own.add_gradients()
    for factor, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient, rtol=1e-5, atol=1e-8)


# --- the layers -----------------------------------------------------------------------------------------------------


def test_a_fresh_one_equals_the_base_and_its_factors_are_about_orthonormal() -> None:
    model = attached()
    assert torch.equal(logits(tiny.llama()), logits(model))
    shares = []
    for layer in inject.owners(model).values():
        assert layer.scaling == pytest.approx(7 / 3) and layer.r == 5
        for factor in (layer.lora_A.detach(), layer.lora_B.detach().T):
            # Of r random rows about of length 1, the square of it is r (r + 1) / width in the mean.
            shares.append(float(gates.crookedness(factor)[0]) ** 2 * factor.shape[1] / (5 * 6))
    assert sum(shares) / len(shares) == pytest.approx(1, abs=0.3)


def test_the_engine_gives_the_gradients_of_rows_alone_gates_too() -> None:
    model, data = moved(attached()), rows()
    expected = alone(model, data)
    assert any(key.endswith(".gate") for key in expected[1])
    assert_same(expected, together(prepare(model, share_prefix=True), data))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will drop
@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)"])
def test_what_is_left_is_plain_lora_of_the_same_logits_here_and_in_peft(rule: str, tmp_path: Path) -> None:
    settings = config(scaling_rule=rule, alpha_pattern={"q_proj": 2.0})
    model = attached(scaling_rule=rule, alpha_pattern={"q_proj": 2.0})
    moved(model)
    layers = list(inject.owners(model).values())
    with torch.no_grad():
        for number, layer in enumerate(layers):
            assert layer.gate is not None
            layer.gate[: number % 6] = 0  # the sixth has none left
    expected = logits(model)
    kept = table.of(model).finish(model, settings)
    assert relative(expected, logits(model)) <= tolerance(model)
    left = inject.lora_layers(model)
    assert [layer.r for layer in left.values()] == [5 - n % 6 for n in range(len(layers)) if n % 6 < 5]
    assert all(layer.gate is None for layer in left.values()) and not any(
        isinstance(model.get_submodule(layer.name), LoRALayer) for n, layer in enumerate(layers) if n % 6 == 5
    )
    assert table.of(model).trainable(model).keys() == {f"{n}.lora_{x}" for n in left for x in "AB"}

    peft_format.save(model, tmp_path / "adapter", kept, base="base", tokenizer=None)
    again = tiny.llama()
    peft_format.load(again, tmp_path / "adapter")
    assert torch.equal(logits(model), logits(again))
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter").eval()
    assert relative(expected, logits(theirs)) <= tolerance(model)
    other = tiny.llama()  # the settings that `finish` gives attach the same
    table.attach(other, kept)
    table.of(other).load_state(other, table.of(model).state(model))
    assert torch.equal(logits(model), logits(other))


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("inputs")
    model, data = tiny.write_model(directory / "model"), tiny.write_chat(directory / "rows.jsonl", 12)
    return {"model": str(model), "data": str(data), "batch_size": 4, "epochs": 3, "precision": "fp32", "threads": 1}


def run(settings: dict[str, Any], resume: bool = False) -> tuple[dict[str, Any], str]:
    heard = io.StringIO()
    made = train(TrainConfig(**settings), {}, Start(resume, False, time.time()), Console(file=heard, width=300))
    return made, heard.getvalue()


def test_the_importance_of_every_number_is_part_of_the_prediction(inputs: dict[str, Any], tmp_path: Path) -> None:
    results = [
        run({**inputs, **settings, "max_steps": 2, "output": str(tmp_path / name)})[0]
        for name, settings in (("gated", SETTINGS), ("plain", {"r": 5, "alpha": 7.0}))
    ]
    gated_peak, plain_peak = (result["predicted_peak_bytes"] for result in results)
    own = schedule(inject.owners(attached()), 3, 10, 0.1, 0.3, 0.7)
    followed = [t for key, t in own.state().items() if not key.startswith("kept.") and not key.endswith(".gate")]
    assert gated_peak - plain_peak == sum(t.nbytes for t in followed)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_ends_with_the_budget_and_says_the_rank_of_every_layer(inputs: dict[str, Any], tmp_path: Path) -> None:
    result, printed = run({**inputs, **SETTINGS, "output": str(tmp_path / "run"), "eval": "25%"})
    ranks = json.loads((tmp_path / "run" / "run.json").read_text())["ranks"]
    assert ranks == result["ranks"] and len(ranks) == 7 * 2
    assert sum(ranks.values()) == 3 * len(ranks) and len(set(ranks.values())) > 1
    assert f"ranks, block by block, {sum(ranks.values())} in all" in printed
    up = [rank for name, rank in ranks.items() if name.endswith("up_proj")]
    assert f"  up_proj {up[0]} {up[1]}\n" in printed
    model = AutoModelForCausalLM.from_pretrained(inputs["model"])
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "run" / "adapter")
    shapes = {name.split(".lora_A")[0]: len(p) for name, p in theirs.named_parameters() if ".lora_A." in name}
    assert {n.removeprefix("base_model.model."): r for n, r in shapes.items()} == {n: r for n, r in ranks.items() if r}
    assert result["best_step"] >= 6 and result["eval_loss"] is not None


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Path]:
    """Settings of a run of 9 steps, its directory, and all of its checkpoints."""
    directory = tmp_path_factory.mktemp("whole")
    settings = {**inputs, **SETTINGS, "rank_hold": 0.3, "save_every": 1}
    written = checkpoint.write

    def write(to: Path, state: Any) -> Path:
        path = written(to, state)
        shutil.copytree(path, directory / "all" / path.name, dirs_exist_ok=True)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", write)
        run({**settings, "output": str(directory / "run")})
    return settings, directory / "run", directory / "all"


@pytest.mark.parametrize("step", [2, 5, 8])  # before any is taken away, between, and after the last
def test_a_run_that_was_stopped_goes_on_bitwise(
    step: int, whole: tuple[dict[str, Any], Path, Path], tmp_path: Path
) -> None:
    settings, finished, checkpoints = whole
    stopped = tmp_path / "run"
    name = f"step-{step:08d}"
    shutil.copytree(checkpoints / name, stopped / "checkpoints" / name)
    shutil.copy(finished / "run.toml", stopped / "run.toml")
    result, printed = run({**settings, "output": str(stopped)}, resume=True)
    assert f"resuming after step {step}" in printed and result["steps"] == 9
    adapters = [path / "adapter" / "adapter_model.safetensors" for path in (finished, stopped)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_beside_a_head_of_labels_what_is_saved_is_what_was_trained(inputs: dict[str, Any], tmp_path: Path) -> None:
    data = tiny.write_labelled(tmp_path / "rows.jsonl", 12)
    settings = {**inputs, **SETTINGS, "data": str(data), "eval": str(data), "output": str(tmp_path / "run")}
    result, _ = run(settings)
    assert sum(result["ranks"].values()) == 3 * 14
    found = evaluate(EvalConfig(target=str(tmp_path / "run"), data=str(data)), Console(file=io.StringIO()))
    assert found["loss"] == pytest.approx(result["eval_loss"], rel=1e-5)


def test_an_evaluation_counts_once_the_ranks_are_final() -> None:
    losses = iter([0.1, 0.2, 0.3, 0.9, 0.8, 0.85])
    job = work(evaluate=lambda model: next(losses), engine="none", eval_every=1, max_steps=6, **SETTINGS)
    heard = Heard()
    last = fit_it(job, heard=heard)[-1]
    assert [better for _, _, better in heard.evaluations] == [False, False, False, False, True, False]
    assert (last.progress.best_step, last.progress.best_loss) == (5, 0.8)
    assert sum(gates.rank(layer) for layer in inject.owners(job.model).values()) == 3 * 14


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"variant": "dora"}, "given with --variant dora"),
        ({"init": "pissa"}, "given with --init pissa"),
        ({"method": "ia3"}, "given with --method ia3"),
        ({"rank_pattern": {"q_proj": 2}}, "given with --rank-pattern"),
        ({"r_start": 2}, "--r-start 2 is below --r 3"),
        ({"rank_hold": 0.6, "rank_settle": 0.4}, "leave no steps between them"),
        ({"max_steps": 1}, "a run of 1 step"),
    ],
)
def test_what_it_cannot_go_with_is_said(
    settings: dict[str, Any], said: str, inputs: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        run({**inputs, **SETTINGS, "output": str(tmp_path / "run"), **settings})
