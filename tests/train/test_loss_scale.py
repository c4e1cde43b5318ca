"""The factor on float16's loss: nothing is lost, and nothing else is changed."""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from lorafit import processor
from lorafit.config import EvalConfig, TrainConfig
from lorafit.engine import precision
from lorafit.errors import ConfigError, Interrupted
from lorafit.run import Start, train
from lorafit.rundir import RunDir
from lorafit.train import loop, loss_scale
from lorafit.train.checkpoint import Progress
from lorafit.use import evaluate
from tests import tiny


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([0.5, -2.0]))


def test_gradients_come_back_to_the_last_bit_and_an_overflow_is_tried_again() -> None:
    progress, own, tried = Progress(), parameter(), list[float]()
    loss_scale.begin(progress, torch.float16)
    expected = torch.tensor([3.0, 7.3])

    def accumulate() -> float:
        tried.append(progress.loss_scale)
        own.grad = expected * progress.loss_scale
        if progress.loss_scale > 4096:
            own.grad[1] = math.inf
        return 1.25

    assert loss_scale.scaled(progress, [own], accumulate) == 1.25
    assert tried == [16384, 8192, 4096] and own.grad is not None
    assert torch.equal(own.grad, expected)
    assert (progress.loss_scale, progress.steps_at_scale) == (4096, 1)


def test_the_factor_grows_after_many_good_steps_and_not_without_end() -> None:
    progress, own = Progress(), parameter()
    loss_scale.begin(progress, torch.float16)

    def accumulate() -> float:
        own.grad = torch.ones(2)
        return 0.0

    seen = set()
    for _ in range(4 * loss_scale.STEPS_TO_GROW):
        loss_scale.scaled(progress, [own], accumulate)
        seen.add(progress.loss_scale)
    assert seen == {2.0**14, 2.0**15, 2.0**16}


def test_a_loss_that_is_not_finite_is_not_tried_again_and_other_types_are_left_alone() -> None:
    progress, calls = Progress(), []
    loss_scale.begin(progress, torch.float16)

    def accumulate() -> float:
        calls.append(progress.loss_scale)
        return math.nan

    assert math.isnan(loss_scale.scaled(progress, [parameter()], accumulate)) and calls == [2.0**14]
    other = Progress()
    loss_scale.begin(other, torch.bfloat16)
    assert other.loss_scale == 1


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the processor had products of float16: torch computes them anywhere, slowly."""
    monkeypatch.setattr(processor, "has_fp16", lambda: True)
    precision._best_rate.cache_clear()


def run(directory: Path, name: str, resume: bool = False, **more: Any) -> dict[str, Any]:
    model, data = directory / "model", directory / "rows.jsonl"
    if not model.exists():
        tiny.write_model(model)
        tiny.write_chat(data, 24)
    settings: dict[str, Any] = {
        "model": str(model), "data": str(data), "output": str(directory / name), "r": 3, "alpha": 7.0, "batch_size": 4,
        "epochs": 4, "threads": 1, "lr": 1e-2,
    }  # fmt: skip
    config = TrainConfig(**{**settings, **more})
    return train(config, {}, Start(resume, False, time.time()), Console(file=io.StringIO()))


@pytest.mark.usefixtures("fp16")
def test_a_run_in_fp16_learns_what_one_in_fp32_does(tmp_path: Path) -> None:
    half, whole = run(tmp_path, "half", precision="fp16"), run(tmp_path, "whole", precision="fp32")
    assert half["precision"] == "fp16" and not half["skipped_steps"]
    target = {"target": str(tmp_path / "half"), "data": str(tmp_path / "rows.jsonl"), "threads": 1}
    losses = {name: evaluate(EvalConfig(**target, precision=name), Console(file=io.StringIO()))["loss"]
              for name in ("fp32", "auto")}  # fmt: skip
    # Products of sums of up to 128 numbers are rounded to 11 bits, in two layers; losses are of the order of 1.
    rounding = 2**-11 * 128**0.5 * 2
    assert losses["auto"] == pytest.approx(losses["fp32"], abs=rounding)
    steps = [RunDir(tmp_path / name).read_metrics()[0] for name in ("half", "whole")]
    assert half["steps"] == whole["steps"] and steps[0]["loss"] == pytest.approx(steps[1]["loss"], abs=rounding)
    untrained = evaluate(EvalConfig(**target, precision="fp32", scale=0.0), Console(file=io.StringIO()))["loss"]
    assert losses["fp32"] < untrained - rounding


@pytest.mark.usefixtures("fp16")
def test_a_run_in_fp16_goes_on_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "whole", precision="fp16")
    plain = loop.train_one_step

    def stopping(own: Any, report: Any) -> None:
        plain(own, report)
        if own.progress.step == 7:
            own.save()
            raise Interrupted("stopped", "", 15)

    monkeypatch.setattr(loop, "train_one_step", stopping)
    with pytest.raises(Interrupted):
        run(tmp_path, "halves", precision="fp16")
    monkeypatch.setattr(loop, "train_one_step", plain)
    run(tmp_path, "halves", resume=True, precision="fp16")
    ours, theirs = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "halves"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_fp16_is_refused_where_nothing_multiplies_in_it_and_a_run_in_it_is_still_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "has_fp16", lambda: False)
    with pytest.raises(ConfigError, match="has no products in it"):
        run(tmp_path, "refused", precision="fp16")
    with monkeypatch.context() as here:
        here.setattr(processor, "has_fp16", lambda: True)
        precision._best_rate.cache_clear()
        run(tmp_path, "half", precision="fp16", max_steps=2)
    precision._best_rate.cache_clear()
    found = evaluate(
        EvalConfig(target=str(tmp_path / "half"), data=str(tmp_path / "rows.jsonl"), threads=1),
        Console(file=io.StringIO()),
    )
    assert found["precision"] != "fp16"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx512_bf16 avx512_fp16", True), ("flags : fpu amx_fp16", True),
        ("Features : fp asimd fphp asimdhp", True), ("flags : avx512_bf16", False), ("Features : fp fphp", False),
    ],
)  # fmt: skip
def test_what_a_processor_multiplies_in_is_read_from_its_flags(
    flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: f"model name : some\n{flags}\n")
    monkeypatch.setattr(processor.sys, "platform", "linux")
    processor.has_fp16.cache_clear()
    assert processor.has_fp16() == expected and processor.name() == "some"
    processor.has_fp16.cache_clear()
