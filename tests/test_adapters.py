"""`combine`, `shrink` and `scale`, as commands over real runs."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorafit import adapters
from lorafit.config import CombineConfig, EvalConfig, ExportConfig, ScaleConfig, ShrinkConfig, TrainConfig
from lorafit.errors import ConfigError, RunDirError
from lorafit.run import Start, train
from lorafit.ship import export
from lorafit.use import evaluate
from tests import tiny


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one model, and the rows they learned."""
    path = tmp_path_factory.mktemp("runs")
    model = tiny.write_model(path / "model")
    for name, count in (("a", 12), ("b", 8)):
        data = tiny.write_chat(path / f"{name}.jsonl", count)
        settings = {"model": str(model), "data": str(data), "output": str(path / name), "r": 3, "alpha": 7.0}
        settings |= {"threads": 1, "precision": "fp32", "epochs": 3, "batch_size": 4, "lr": 2e-2}
        train(TrainConfig(**settings), {}, Start(False, False, time.time()), quiet())
    return path


def loss(target: Path, data: Path, **more: Any) -> float:
    settings = {"target": str(target), "data": str(data), "generate": False, "precision": "fp32", **more}
    return float(evaluate(EvalConfig(**settings), quiet())["loss"])


def test_runs_are_added_up_and_the_sum_is_used_as_an_adapter(runs: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    found = adapters.combine(CombineConfig(adapters=[str(runs / "a"), str(runs / "b")], output=str(both)), quiet())
    assert found["weights"] == [0.5, 0.5] and found["ranks"] == [6]
    assert loss(both, runs / "a.jsonl") != loss(runs / "a", runs / "a.jsonl")
    one = adapters.combine(
        CombineConfig(adapters=[str(runs / "a")], weights=[1.0], output=str(tmp_path / "one")), quiet()
    )
    assert one["ranks"] == [3]
    assert loss(tmp_path / "one", runs / "a.jsonl") == pytest.approx(loss(runs / "a", runs / "a.jsonl"), rel=1e-5)
    half = tmp_path / "half"
    adapters.combine(CombineConfig(adapters=[str(runs / "a")], weights=[0.5], output=str(half)), quiet())
    assert loss(half, runs / "a.jsonl") == pytest.approx(loss(runs / "a", runs / "a.jsonl", scale=0.5), rel=1e-5)


def test_a_lower_rank_costs_loss_and_the_full_one_nothing(runs: Path, tmp_path: Path) -> None:
    config = {"run": str(runs / "a"), "data": str(runs / "a.jsonl")}
    found = adapters.shrink(ShrinkConfig(**config, r=1, output=str(tmp_path / "small")), quiet())
    assert found["lost"] > 0 and found["loss_after"] != found["loss_before"]
    found = adapters.shrink(ShrinkConfig(**config, r=3, output=str(tmp_path / "same")), quiet())
    assert found["loss_after"] == pytest.approx(found["loss_before"], rel=1e-5)


def test_every_scale_has_the_loss_that_eval_gives_and_the_best_is_marked(runs: Path, tmp_path: Path) -> None:
    text = tmp_path / "kept.txt"
    text.write_text("What was known before. " * 20)
    settings = {"run": str(runs / "a"), "task": str(runs / "a.jsonl"), "output": str(tmp_path / "scales")}
    heard = io.StringIO()
    found = adapters.scale(
        ScaleConfig(**settings, keep=str(text), scales=[0, 0.5, 1.0, 1.5], precision="fp32"),
        quiet(),
        Console(file=heard),
    )
    for point in found["points"]:
        assert point["task"] == pytest.approx(loss(runs / "a", runs / "a.jsonl", scale=point["scale"]), rel=1e-5)
        assert point["keep"] == pytest.approx(loss(runs / "a", text, scale=point["scale"]), rel=1e-5)
    sums = {point["scale"]: point["task"] + point["keep"] for point in found["points"]}
    assert found["best"] == min(sums, key=lambda at: sums[at])
    assert json.loads((tmp_path / "scales" / "scale.json").read_text()) == found
    drawn = (tmp_path / "scales" / "scale.svg").read_text()
    assert f"best trade: {found['best']:g}" in drawn and drawn.count("<polyline") == 2
    assert f"--scale {found['best']:g}" in heard.getvalue()
    alone = adapters.scale(ScaleConfig(**settings, scales=[0, 1.0], forgetting=3.0), quiet(), None)
    assert set(alone["points"][0]) == {"scale", "task"} and alone["best"] == 1.0
    with pytest.raises(ConfigError, match="is a model without an adapter"):
        adapters.scale(ScaleConfig(**settings | {"run": str(runs / "model")}), quiet(), None)


def test_what_stands_at_the_output_is_never_replaced(runs: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in (runs / "a").iterdir())
    settings = {"output": str(runs / "a")}
    with pytest.raises(RunDirError, match="already holds files"):
        adapters.combine(CombineConfig(adapters=[str(runs / "b")], **settings), quiet())
    with pytest.raises(RunDirError, match="already holds files"):
        adapters.shrink(ShrinkConfig(run=str(runs / "b"), r=1, **settings), quiet())
    assert sorted(path.name for path in (runs / "a").iterdir()) == before
    (tmp_path / "model.gguf").write_text("a model")
    with pytest.raises(ConfigError, match="exists already"):
        export(ExportConfig(run=str(runs / "a"), output=str(tmp_path / "model.gguf")), quiet())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError):
        place = {"task": str(runs / "a.jsonl"), "output": str(tmp_path / "file"), "scales": [0]}
        adapters.scale(ScaleConfig(run=str(runs / "a"), **place), quiet(), None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "ia3"}, "was trained by --method ia3, and only updates by LoRA"),
        ({"method": "lora", "data": "labelled"}, r"tells 2 labels apart \(even, odd\), and a head of its own"),
    ],
)
def test_what_is_no_update_by_lora_alone_is_not_added_up_or_cut(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model, output = str(tiny.write_model(tmp_path / "model")), str(tmp_path / "run")
    data = {"labelled": tiny.write_labelled(tmp_path / "l.jsonl", 8), "chat": tiny.write_chat(tmp_path / "c.jsonl", 8)}
    given = {**settings, "data": str(data[settings.get("data", "chat")]), "model": model, "output": output}
    config = TrainConfig(**given, max_steps=1, threads=1, precision="fp32")
    train(config, {}, Start(False, False, time.time()), quiet())
    with pytest.raises(ConfigError, match=said):
        adapters.combine(CombineConfig(adapters=[output, output], output=str(tmp_path / "sum")), quiet())
    with pytest.raises(ConfigError, match=said):
        adapters.shrink(ShrinkConfig(run=output, r=1, output=str(tmp_path / "small")), quiet())
