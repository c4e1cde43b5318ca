"""Heads on the features of every layer."""

from __future__ import annotations

import io
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from lorafit.config import EvalConfig, TrainConfig
from lorafit.errors import LorafitError
from lorafit.methods.labels import Labels, Pooled, put_head
from lorafit.run import Start, train
from lorafit.use import evaluate
from tests import tiny

USUAL: dict[str, Any] = {"batch_size": 4, "precision": "fp32", "threads": 1, "method": "head", "lr": 0.05, "epochs": 5}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("probed")
    tagged = [{"tokens": ["a", f"{n}", "b"], "tags": ["x", f"{n % 2}", "x"]} for n in range(20)]
    return {
        "bert": str(tiny.write_bert(directory / "bert")),
        "llama": str(tiny.write_model(directory / "llama")),
        "rows": str(tiny.write_labelled(directory / "rows.jsonl", 40)),
        "tagged": str(tiny.write_rows(directory / "tagged.jsonl", tagged)),
    }


def run(settings: dict[str, Any], resume: bool = False) -> tuple[dict[str, Any], str]:
    heard = io.StringIO()
    console = Console(file=heard, width=1000)
    return train(TrainConfig(**{**USUAL, **settings}), {}, Start(resume, False, time.time()), console), heard.getvalue()


@pytest.mark.parametrize(
    ("model", "pooling"), [("bert", "mean"), ("bert", "cls"), ("llama", "mean"), ("llama", "last")]
)
def test_a_head_on_a_layer_is_given_its_hidden_states(model: str, pooling: str) -> None:
    make: dict[str, Any] = {"bert": tiny.bert, "llama": tiny.llama}
    ids = torch.arange(20, 34).view(2, 7)
    body: nn.Module = getattr(make[model](), "model", None) or make[model]()
    states = body(input_ids=ids, output_hidden_states=True).hidden_states
    for layer, hidden in enumerate(states):
        headed = put_head(make[model](), Labels(("a", "b"), pooling, layer=layer), seed=1)
        assert isinstance(headed, Pooled)
        features = {"mean": hidden.mean(1), "cls": hidden[:, 0], "last": hidden[:, -1]}[pooling]
        expected, got = headed.head(features).detach(), headed(ids).logits[:, -1].detach()
        assert float((expected - got).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(("model", "data"), [("bert", "rows"), ("llama", "rows"), ("bert", "tagged")])
def test_each_layer_is_tried_as_a_run_on_it_goes(model: str, data: str, places: dict[str, str], tmp_path: Path) -> None:
    settings = {"model": places[model], "data": places[data], "eval": places[data]}
    result, printed = run({**settings, "output": str(tmp_path / "probe"), "probe": True})
    tried = result["probe"]
    assert [one["layer"] for one in tried] == [0, 1, 2]
    best = max(tried, key=lambda one: (one["accuracy"], -one["loss"]))
    assert result["layer"] == best["layer"]
    assert f"  {best['layer']} {best['accuracy']:6.3f}" in printed and printed.count("the best, which is taken") == 1
    for one in tried:
        output = str(tmp_path / f"layer {one['layer']}")
        own, _ = run(
            {**settings, "output": output, "layer": one["layer"], "eval_every": 100_000}
        )  # the last head stays
        assert own["layer"] == one["layer"]
        found = evaluate(EvalConfig(target=output, data=places[data], threads=1), Console(file=io.StringIO()))
        # The same features but for a few roundings (rows are padded to other widths), and Adam's steps carry those on
        # unmagnified: see the test of features that are kept.
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert found["accuracy"] == pytest.approx(one["accuracy"])


def test_a_probed_run_goes_on_with_the_layer_that_it_had_chosen(places: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = {"model": places["bert"], "data": places["rows"], "eval": "25%", "output": str(output), "probe": True}
    first, _ = run({**settings, "save_every": 3})
    head = (output / "adapter" / "method.safetensors").read_bytes()
    (output / "run.json").unlink()
    shutil.rmtree(output / "adapter")
    shutil.rmtree(sorted((output / "checkpoints").iterdir())[-1])
    again, printed = run({**settings, "save_every": 3}, resume=True)
    assert "resuming after step" in printed and "of a head on each layer" not in printed
    assert again["probe"] == first["probe"]
    assert (output / "adapter" / "method.safetensors").read_bytes() == head


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"probe": True}, "there are none"),
        ({"probe": True, "eval": "25%", "feature_cache": "0MiB"}, "above the 0MiB"),
        ({"layer": 3}, "--layer 3 is given, and the last layer is 2"),
        ({"layer": 1, "method": "lora"}, "--layer is for a head alone"),
        ({"layer": 1, "probe": True}, "Leave one out"),
    ],
)
def test_what_does_not_go_together_is_said(
    changed: dict[str, Any], said: str, places: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(LorafitError, match=said):
        run({"model": places["bert"], "data": places["rows"], "output": str(tmp_path / "run"), **changed})
