"""`lorafit report`: figures of updates against the matrices themselves, and pages of real runs."""

from __future__ import annotations

import io
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorafit.config import EvalConfig, ReportConfig, TrainConfig
from lorafit.errors import AdapterError, RunDirError
from lorafit.report.directions import effective_rank, stable_rank
from lorafit.report.places import place
from lorafit.report.show import by_kind, data_facts
from lorafit.report.updates import TENSORS, spectrum, trained
from lorafit.run import Start, train
from lorafit.showing import report
from lorafit.use import evaluate
from tests import tiny


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    tiny.write_model(directory / "model")
    tiny.write_chat(directory / "rows.jsonl", 12)
    tiny.write_labelled(directory / "labelled.jsonl", 12)
    return directory


def run_of(inputs: Path, output: Path, data: str = "rows.jsonl", **more: Any) -> Path:
    settings: dict[str, Any] = {"r": 3, "alpha": 7.0, "batch_size": 4, "max_steps": 3, "precision": "fp32", "lr": 0.01}
    config = TrainConfig(
        model=str(inputs / "model"), data=str(inputs / data), output=str(output), threads=1, **settings | more
    )
    train(config, {"r": "flag", "lr": "file", "alpha": "default"}, Start(False, False, time.time()), quiet())
    return output


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {"eval": "25%", "eval_every": 1, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 11.0}}
    return run_of(inputs, tmp_path_factory.mktemp("run") / "run", **more)


def reported(directory: Path, samples: int = 0, **more: Any) -> dict[str, Any]:
    return report(ReportConfig(directory=str(directory), samples=samples, threads=1, **more), quiet(), None)


# --- the figures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "r", "inner"), [(40, 3, 25), (5, 4, 200), (1, 1, 7), (3, 5, 4)])
def test_the_spectrum_is_that_of_the_matrix_that_is_never_formed(out: int, r: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(out)
    A, B = torch.randn(r, inner, generator=generator), torch.randn(out, r, generator=generator)
    whole = torch.linalg.svdvals(2.5 * B.double() @ A.double())
    found = spectrum(A, B, 2.5)
    # float64: an error of a few eps of the largest value, times the root of the sizes that are summed over
    bound = 16 * torch.finfo(torch.float64).eps * math.sqrt(out * inner) * float(whole[0])
    few = min(len(whole), len(found))
    assert (found[:few] - whole[:few]).abs().max() < bound
    assert found[few:].sum() < bound  # a rank above what the matrix can have


def test_equal_values_use_as_many_directions_as_there_are() -> None:
    assert effective_rank(torch.full((6,), 0.3)) == pytest.approx(6)
    assert stable_rank(torch.full((6,), 0.3)) == pytest.approx(6)
    one = torch.tensor([2.0, 0.0, 0.0])
    assert (effective_rank(one), stable_rank(one)) == (pytest.approx(1), pytest.approx(1))
    # shares 3/4 and 1/4: an entropy of 0.5623 nats
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(0.56233514461))
    assert (effective_rank(torch.zeros(3)), stable_rank(torch.zeros(3))) == (None, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("features.0", (0, "features")),
        ("0", (0, "layer")),
        ("lm_head", (None, "lm_head")),
        ("blocks.2.convs.1.weight", (2, "convs.1.weight")),
    ],
)
def test_a_modules_place_is_read_from_its_name(name: str, expected: tuple[int | None, str]) -> None:
    assert place(name) == expected


def test_norms_have_each_layers_own_rank_and_alpha(run: Path) -> None:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    found = {one["name"]: one for one in trained(run / "adapter")["modules"]}
    assert len(found) == 14
    for name, one in found.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        r, alpha = 2 if "q_proj" in name else 3, 11.0 if "up_proj" in name else 7.0
        assert one["r"] == r == len(A)
        assert one["norm"] == pytest.approx(float((alpha / r * B @ A).norm()), rel=1e-9)
        assert 1 <= one["stable_rank"] <= one["effective_rank"] + 1e-9 <= r + 2e-9


@pytest.mark.parametrize("method", ["adapter", "prefix", "prompt", "ia3", "bitfit", "full"])
def test_a_method_without_an_update_shows_norms_of_what_it_trains(method: str, inputs: Path, tmp_path: Path) -> None:
    path = run_of(inputs, tmp_path / "run", method=method)
    tensors = load_file(path / "adapter" / "method.safetensors")
    found = trained(path / "adapter")
    assert (found["method"], found["is_update"], found["what"]) == (method, False, TENSORS[method])
    assert {one["name"] for one in found["modules"]} == set(tensors)
    for one in found["modules"]:
        start = 1.0 if method == "ia3" else 0.0
        assert one["norm"] == pytest.approx(float((tensors[one["name"]] - start).norm()), rel=1e-5)
        assert one["r"] is one["effective_rank"] is None
    page = Path(reported(path)["page"]).read_text()
    assert TENSORS[method].split(".")[0] in page and "dW of" not in page


def test_labels_have_updates_and_a_head_beside_them(inputs: Path, tmp_path: Path) -> None:
    more = {"alpha_pattern": {"up_proj": 11.0}, "init": "kaiming"}
    path = run_of(inputs, tmp_path / "run", data="labelled.jsonl", **more)
    tensors, found = load_file(path / "adapter" / "method.safetensors"), reported(path, samples=2)
    own = next(one for one in found["trained"]["modules"] if one["name"] == "model.layers.1.mlp.up_proj")
    A, B = (tensors[f"model.layers.1.mlp.up_proj.lora_{side}"].double() for side in "AB")
    assert own["norm"] == pytest.approx(float((11 / 3 * B @ A).norm()), rel=1e-9)
    assert found["trained"]["others"] == ["label_head.weight"]
    assert len(found["samples"]["rows"]) == 2
    assert all(row[who] in tiny.LABELS for row in found["samples"]["rows"] for who in ("expected", "base", "tuned"))


def test_doras_magnitudes_are_said_to_be_left_out(inputs: Path, tmp_path: Path) -> None:
    found = trained(run_of(inputs, tmp_path / "run", variant="dora") / "adapter")
    assert found["is_update"] and "DoRA" in found["what"] and len(found["modules"]) == 14 and not found["others"]


# --- a run's page -----------------------------------------------------------------------------------------------------


def test_the_page_has_curves_settings_with_their_source_and_what_was_predicted(run: Path) -> None:
    found = reported(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    curves = found["curves"]
    assert curves["train_loss"] == [[line["step"], line["loss"]] for line in steps]
    assert curves["eval_loss"] == [[line["step"], line["loss"]] for line in lines if line["kind"] == "eval"] != []
    assert curves["tokens_per_s"][0][1] == pytest.approx(steps[0]["tokens"] / steps[0]["step_s"])
    sources = {one["name"]: one["source"] for one in found["settings"]}
    assert (sources["r"], sources["lr"], sources["alpha"]) == ("flag", "file", "default")
    parts = found["predicted"]["parts"]
    assert (
        sum(parts.values()) == found["predicted"]["peak_bytes"]["predicted"] == found["result"]["predicted_peak_bytes"]
    )
    facts = dict(data_facts(found))
    assert (facts["trained on, rows"], facts["held out, rows"]) == ("9", "3")
    rows = by_kind(found, spread=False).rows
    assert [row[1] for row in rows] == ["2"] * 7
    page = Path(found["page"]).read_text()
    assert page.count("<svg") == 5 and str(run) in page


def test_answers_before_and_after_are_those_of_scale_0_and_1(inputs: Path, tmp_path: Path) -> None:
    path = run_of(inputs, tmp_path / "run", max_steps=40, eval=str(inputs / "rows.jsonl"))
    shown = reported(path, samples=12)["samples"]
    assert str(inputs / "rows.jsonl") in shown["told"] and "held out" in shown["told"]
    longest = max(len(row["expected"]) for row in shown["rows"])  # a token a byte
    for scale, who in ((0.0, "base"), (1.0, "tuned")):
        settings = {
            "target": str(path),
            "data": str(inputs / "rows.jsonl"),
            "scale": scale,
            "samples": 12,
            "threads": 1,
        }
        settings["max_new_tokens"] = longest + 16
        samples = evaluate(EvalConfig(**settings), quiet())["samples"]
        names = ("prompt", "expected")
        assert [(row[names[0]], row[names[1]], row[who]) for row in shown["rows"]] == [
            (sample["prompt"], sample["expected"], sample["got"]) for sample in samples
        ]
    assert any(row["base"] != row["tuned"] for row in shown["rows"])


def test_a_model_that_is_gone_leaves_a_page_without_answers_that_says_so(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    result = json.loads((copy / "run.json").read_text()) | {"model": "/gone"}
    (copy / "run.json").write_text(json.dumps(result))
    found = reported(copy, samples=1)
    assert found["samples"] is None
    assert any("/gone" in note for note in found["notes"]) and "/gone" in (copy / "report.html").read_text()


def test_a_run_of_an_earlier_version_has_a_page_all_the_same(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    result = json.loads((copy / "run.json").read_text())
    for name in ("sources", "rows", "predicted_parts"):
        del result[name]
    (copy / "run.json").write_text(json.dumps(result))
    (copy / "metrics.jsonl").unlink()
    (copy / "report.html").unlink(missing_ok=True)
    found = reported(copy, output=str(tmp_path / "other.html"))
    assert any("metrics.jsonl" in note for note in found["notes"])
    assert "not noted" in (tmp_path / "other.html").read_text() and not (copy / "report.html").exists()


# --- what is no finished run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "holds no run"),
        (["run.toml", "metrics.jsonl"], "holds no finished run"),
        (["setup.json"], "unfinished comparison"),
        (["metrics.jsonl"], "has not finished"),
    ],
)
def test_what_is_no_finished_run_is_refused_in_a_sentence(files: list[str], said: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(RunDirError, match=said):
        reported(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["compare.json", "scale.json"])
def test_a_file_that_lacks_something_is_said_to(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(RunDirError, match="holds has no '"):
        reported(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(RunDirError, match="cannot be read"):
        reported(tmp_path)


def test_a_file_and_a_place_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, said in (("file", "is a file"), ("none", "does not exist")):
        with pytest.raises(RunDirError, match=said):
            reported(tmp_path / name)


def test_damaged_weights_are_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(AdapterError, match="cannot be read"):
        reported(copy)
