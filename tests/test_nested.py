"""A run whose ranks are trained nested, from `train` to `shrink`, `eval --r` and PEFT."""

from __future__ import annotations

import io
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console

from lorafit import adapters
from lorafit.config import EvalConfig, LoRAConfig, ShrinkConfig, TrainConfig
from lorafit.data.store import Encoded
from lorafit.engine.engine import prepare
from lorafit.errors import ConfigError
from lorafit.export import saved
from lorafit.infer.by_rank import losses
from lorafit.lora.inject import cut_to, lora_layers
from lorafit.methods.table import METHODS
from lorafit.run import Start, train
from lorafit.use import evaluate
from tests import tiny

IDS = torch.arange(2, 26).view(2, 12)


def run(settings: dict[str, Any], resume: bool = False) -> tuple[dict[str, Any], str]:
    heard = io.StringIO()
    result = train(TrainConfig(**settings), {}, Start(resume, False, time.time()), Console(file=heard, width=1000))
    return result, heard.getvalue()


def shrunk(settings: dict[str, Any]) -> tuple[dict[str, Any], str]:
    heard = io.StringIO()
    return adapters.shrink(ShrinkConfig(**settings), Console(file=heard, width=1000)), heard.getvalue()


def loss(target: Path, data: Path, **more: Any) -> float:
    settings = {"target": str(target), "data": str(data), "generate": False, "precision": "fp32", **more}
    return float(evaluate(EvalConfig(**settings), Console(file=io.StringIO()))["loss"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("inputs")
    model, data = tiny.write_model(path / "model"), tiny.write_chat(path / "rows.jsonl", 22)
    held_out = tiny.write_chat(path / "held.jsonl", 9)
    settings = {"r": 6, "alpha": 9.0, "batch_size": 4, "precision": "fp32", "threads": 1, "lr": 2e-2, "epochs": 2}
    places = {"model": str(model), "data": str(data), "eval": str(held_out)}
    return {**settings, **places, "rank_schedule": "nested", "save_every": 1}


@pytest.fixture(scope="module")
def nested(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A nested run, its result and what it printed."""
    path = tmp_path_factory.mktemp("runs") / "nested"
    return path, *run({**inputs, "output": str(path)})


def test_every_rank_is_measured_and_shown(nested: tuple[Path, dict[str, Any], str]) -> None:
    path, result, printed = nested
    assert [entry["r"] for entry in result["nested"]] == [1, 2, 4, 6]
    assert {entry["rows"] for entry in result["nested"]} == {9}
    assert result["nested"][-1]["loss"] == pytest.approx(result["eval_loss"], rel=1e-6)
    assert json.loads((path / "run.json").read_text())["rank_schedule"] == "nested"
    assert "held-out loss by rank (9 rows):" in printed
    assert f"| the first 2 | {result['nested'][1]['loss']:.4f} |" in (path / "README.md").read_text()
    for entry in result["nested"]:
        assert f"  r {entry['r']}  {entry['loss']:.4f}" in printed


def test_the_first_components_serve_better_alone_than_those_of_a_run_that_is_not_nested(
    inputs: dict[str, Any], nested: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    run({**inputs, "output": str(tmp_path / "usual"), "rank_schedule": "none"})
    told = json.loads((tmp_path / "usual" / "run.json").read_text())
    told["nested"] = nested[1]["nested"]  # or it would not be cut
    (tmp_path / "usual" / "run.json").write_text(json.dumps(told))
    for entry in nested[1]["nested"][:2]:
        assert entry["loss"] < loss(tmp_path / "usual", Path(inputs["eval"]), r=entry["r"])


def test_a_stopped_nested_run_goes_on_bitwise(
    inputs: dict[str, Any], nested: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(nested[0], again)
    (again / "run.json").unlink()
    shutil.rmtree(again / "adapter")
    newest = max((again / "checkpoints").iterdir())
    shutil.rmtree(newest)
    result, printed = run({**inputs, "output": str(again)}, resume=True)
    assert "resuming after step 11" in printed
    files = [path / "adapter" / "adapter_model.safetensors" for path in (nested[0], again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert result["nested"] == nested[1]["nested"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will drop
@pytest.mark.parametrize("r", [1, 3, 4])
def test_what_is_cut_out_is_the_function_that_eval_measures_and_peft_reads(
    r: int, inputs: dict[str, Any], nested: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    path, held_out = nested[0], Path(inputs["eval"])
    found, printed = shrunk({"run": str(path), "r": r, "output": str(tmp_path / "cut"), "data": str(held_out)})
    assert found["how"] == "cut" and f"rank 6 cut to its first {r} components" in printed
    assert found["loss_after"] == pytest.approx(loss(path, held_out, r=r), rel=1e-5)
    measured_at = {entry["r"]: entry["loss"] for entry in nested[1]["nested"]}
    if r in measured_at:
        assert found["loss_after"] == pytest.approx(measured_at[r], rel=1e-5)
        assert f"{measured_at[r]:.4f} at rank {r}, {measured_at[6]:.4f} at rank 6" in printed
    else:
        assert "rank 3 was not among those that were trained (1, 2, 4, 6)" in printed
    model = tiny.llama()
    saved.load(model, path / "adapter")
    with torch.no_grad(), cut_to(model, r):
        expected = model(IDS).logits
    theirs = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "cut")).eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert theirs.peft_config["default"].r == r


def test_the_other_way_can_be_asked_for_and_cutting_what_is_not_nested_is_refused(
    inputs: dict[str, Any], nested: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    settings = {"run": str(nested[0]), "r": 2, "output": str(tmp_path / "svd")}
    found, printed = shrunk({**settings, "how": "svd"})
    assert found["how"] == "svd" and "rank 6 truncated to 2 by SVD" in printed
    with pytest.raises(ConfigError, match="no run whose ranks were trained nested"):
        shrunk({**settings, "run": str(tmp_path / "svd"), "output": str(tmp_path / "no"), "how": "cut"})
    assert (
        shrunk({**settings, "run": str(tmp_path / "svd"), "r": 1, "output": str(tmp_path / "one")})[0]["how"] == "svd"
    )
    with pytest.raises(ConfigError, match="is no run whose ranks were trained nested"):
        loss(tmp_path / "svd", Path(inputs["eval"]), r=1)
    with pytest.raises(ConfigError, match=r"--r 7 is given, and .* is of rank 6"):
        loss(nested[0], Path(inputs["eval"]), r=7)


def test_without_held_out_rows_the_ranks_are_told_all_the_same(inputs: dict[str, Any], tmp_path: Path) -> None:
    result, printed = run({**inputs, "eval": None, "epochs": 1, "output": str(tmp_path / "run")})
    assert [entry["loss"] for entry in result["nested"]] == [None] * 4
    assert "no rows to measure ranks 1, 2, 4, 6 on" in printed
    found, printed = shrunk({"run": str(tmp_path / "run"), "r": 2, "output": str(tmp_path / "cut")})
    assert found["how"] == "cut" and "no held-out rows" in printed


def test_a_nested_run_is_refused_where_nothing_could_be_cut(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rank-schedule nested is given with --variant dora"):
        run({**inputs, "variant": "dora", "output": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_a_rank_whose_loss_is_not_finite_costs_neither_the_run_nor_the_others() -> None:
    model = tiny.llama()
    METHODS["lora"].attach(model, LoRAConfig(r=3, alpha=5.0))
    for layer in lora_layers(model).values():
        layer.lora_B.data[:, 1] = math.inf
    ids = np.arange(2, 22, dtype=np.int32)
    rows = [Encoded(ids, np.arange(20) > 3, 0, "f:1")]
    found = losses(prepare(model, share_prefix=True), rows, [1, 2], 64)
    assert found[0]["loss"] == pytest.approx(math.log(258), rel=0.5) and found[1]["loss"] is None
