from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorafit.config import RATES, EvalConfig, PlanConfig, TrainConfig
from lorafit.engine import precision
from lorafit.errors import CheckpointError, ConfigError, DataError, DoesNotFitError, LorafitError, RunDirError
from lorafit.lora.tokens import token_rows
from lorafit.model import spec as model_spec
from lorafit.opening import open_target
from lorafit.plan import machine, memory, trained
from lorafit.planning import plan
from lorafit.run import Start, train
from lorafit.use import evaluate
from tests import tiny

KEYS = {
    "train_s", "load_s", "steps", "tokens_seen", "tokens_supervised", "tokens_computed", "peak_rss_bytes",
    "predicted_peak_bytes", "trainable_params", "total_params", "train_loss", "eval_loss", "seed", "versions",
    "data_sha256", "model_sha256",
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("inputs")
    model, data = tiny.write_model(directory / "model"), tiny.write_chat(directory / "rows.jsonl")
    settings = {"r": 3, "alpha": 7.0, "batch_size": 4, "precision": "fp32", "threads": 1}
    return {"model": str(model), "data": str(data), **settings}


def run(settings: dict[str, Any], resume: bool = False, force: bool = False) -> tuple[dict[str, Any], str]:
    """The result and everything that was printed."""
    heard = io.StringIO()
    result = train(TrainConfig(**settings), {}, Start(resume, force, time.time()), Console(file=heard, width=1000))
    return result, heard.getvalue()


def test_a_run_writes_its_whole_directory(inputs: dict[str, Any], tmp_path: Path) -> None:
    result, printed = run({**inputs, "output": str(tmp_path / "run"), "eval": "20%"})
    names = {entry.name for entry in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == {"run.toml", "run.json", "metrics.jsonl", "adapter", "checkpoints", "README.md"}
    assert result.keys() >= KEYS
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == result
    assert result["tokens_supervised"] < result["tokens_seen"]
    assert result["tokens_computed"] < result["tokens_seen"]  # the rows begin alike, and that is computed once
    assert result["steps"] == 2
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        entry.name for entry in (tmp_path / "run" / "adapter").iterdir()
    }
    assert "lorafit chat" in printed
    assert "trainable parameters" in printed


def test_a_run_is_repeated_bitwise_from_its_run_toml(inputs: dict[str, Any], tmp_path: Path) -> None:
    from lorafit.config import build, read_toml

    first = {**inputs, "output": str(tmp_path / "first"), "dropout": 0.1, "rank_pattern": {"q_proj": 2}, "epochs": 2}
    run(first)
    config, source = build(
        TrainConfig, read_toml(tmp_path / "first" / "run.toml"), {"output": str(tmp_path / "second")}
    )
    assert (source["dropout"], source["output"]) == ("file", "flag")
    run(config.model_dump())
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("first", "second")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_resuming_a_finished_run_changes_nothing(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = {**inputs, "output": str(tmp_path / "run")}
    first, _ = run(settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    again, printed = run(settings, resume=True)
    assert again == first
    assert "finished run; nothing to do" in printed
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_resume_starts_fresh_where_there_is_nothing(inputs: dict[str, Any], tmp_path: Path) -> None:
    _, printed = run({**inputs, "output": str(tmp_path / "run")}, resume=True)
    assert "no checkpoint to resume: starting fresh" in printed


def _unfinished(settings: dict[str, Any]) -> None:
    """A run as a kill before its end leaves it: checkpoints, no adapter, no run.json."""
    import shutil

    run(settings)
    output = Path(settings["output"])
    (output / "run.json").unlink()
    shutil.rmtree(output / "adapter")


def test_a_resumed_run_keeps_the_rate_that_was_usual_and_takes_it_by_name(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**inputs, "output": str(tmp_path / "run"), "lr": None}
    _unfinished(settings)
    monkeypatch.setitem(RATES, "lora", 0.5)
    assert run(settings, resume=True)[0]["settings"]["lr"] == 2e-3
    _unfinished({**settings, "output": str(tmp_path / "other")})
    assert run({**settings, "output": str(tmp_path / "other"), "lr": 0.5}, resume=True)[0]["settings"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("shown", "changed"), [("r was 3, now 4", {"r": 4}), ("lr was 0.002, now 0.5", {"lr": 0.5}), ("data was", "data")]
)
def test_resuming_otherwise_is_refused_with_the_difference(
    shown: str, changed: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**inputs, "output": str(tmp_path / "run"), "data": str(tiny.write_chat(tmp_path / "rows.jsonl", 9))}
    _unfinished(settings)
    if changed == "data":
        tiny.write_chat(tmp_path / "rows.jsonl", 10)
        changed = {}
    with pytest.raises(CheckpointError, match=shown):
        run({**settings, **changed}, resume=True)


def test_where_to_write_and_how_often_to_save_may_differ(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = {**inputs, "output": str(tmp_path / "run"), "save_every": 1}
    _unfinished(settings)
    (tmp_path / "run").rename(tmp_path / "moved")
    run({**settings, "output": str(tmp_path / "moved"), "save_every": 2}, resume=True)
    assert (tmp_path / "moved" / "run.json").exists()


def test_an_existing_run_is_never_overwritten(inputs: dict[str, Any], tmp_path: Path) -> None:
    run({**inputs, "output": str(tmp_path / "run")})
    with pytest.raises(RunDirError, match=r"already holds a finished run.*--resume"):
        run({**inputs, "output": str(tmp_path / "run")})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(RunDirError, match="already holds other files"):
        run({**inputs, "output": str(tmp_path / "other")})


@pytest.mark.parametrize(
    ("error", "sentence", "settings"),
    [
        (DataError, "missing.jsonl", {"data": "missing.jsonl"}),
        (LorafitError, "missing-model", {"model": "missing-model"}),
        (ConfigError, "'lorra' is unknown. Did you mean 'lora'", {"method": "lorra"}),
        (ConfigError, "--eval '0%' is not a share", {"eval": "0%"}),
        (ConfigError, "--memory '2 gigs' is not a size", {"memory": "2 gigs"}),
        (DoesNotFitError, "above the 1.0 MiB of --memory", {"memory": "1MiB"}),
        (LorafitError, "q_porj.*Did you mean 'q_proj'", {"targets": "q_porj"}),
        (LorafitError, "at most", {"r": 33}),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_directory(
    error: type[LorafitError], sentence: str, settings: dict[str, Any], inputs: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        run({**inputs, "output": str(tmp_path / "run"), **settings})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def with_learned_positions(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.write_gpt2(tmp_path_factory.mktemp("gpt2"), positions=64))


def test_rows_longer_than_learned_positions_are_refused_with_the_length_to_give(
    with_learned_positions: str, tmp_path: Path
) -> None:
    rows = [tiny.chat_row(f"is {n}?", "it is not " * 9) for n in range(8)]
    data = str(tiny.write_rows(tmp_path / "rows.jsonl", rows))
    settings = {"model": with_learned_positions, "data": data, "threads": 1, "max_steps": 1}
    with pytest.raises(DataError, match=r"positions for 64\. Give --seq-len 64: "):
        run({**settings, "output": str(tmp_path / "run")})
    with pytest.raises(DataError, match=r"20 virtual ones among them.* Give --seq-len 44: "):
        run({**settings, "output": str(tmp_path / "run"), "method": "prefix", "seq_len": 64})
    result, _ = run({**settings, "output": str(tmp_path / "run"), "seq_len": 64})
    assert result["rows"]["trained"]["cut_rows"] == len(rows)
    with pytest.raises(DataError, match=r"a row has .* positions for 64\. Give --seq-len 64: "):
        evaluate(EvalConfig(target=str(tmp_path / "run"), data=data, threads=1), Console(file=io.StringIO()))
    with pytest.raises(DataError, match=r"positions for 64\. Give --seq-len 64: "):
        plan(PlanConfig(model=with_learned_positions, data=data), Console(file=io.StringIO()), None)


def test_an_encoders_rows_are_cut_at_its_positions_by_a_plan_as_by_a_training(tmp_path: Path) -> None:
    model = str(tiny.write_bert(tmp_path / "bert"))
    most = model_spec.read(model).most_tokens
    assert most is not None
    rows = [{"text": f"number {n} " * most, "label": "odd" if n % 2 else "even"} for n in range(8)]
    data = str(tiny.write_rows(tmp_path / "rows.jsonl", rows))
    found = plan(PlanConfig(model=model, data=data), Console(file=io.StringIO()), None)
    assert found["data"]["longest"] == most and found["data"]["cut"] == len(rows)


def test_force_starts_what_the_plan_refuses(inputs: dict[str, Any], tmp_path: Path) -> None:
    result, _ = run({**inputs, "output": str(tmp_path / "run"), "memory": "1MiB"}, force=True)
    assert result["predicted_peak_bytes"] > 1 << 20


def test_where_the_fastest_precision_does_not_fit_bf16_is_taken_and_kept_when_resumed(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "flop_per_s", lambda names=None: {"fp32": 9.0, "bf16": 1.0, "int8": 1.0})
    settings = {**inputs, "output": str(tmp_path / "run"), "precision": "auto", "max_steps": 1}
    spec = model_spec.read(inputs["model"])
    adds = trained.of(spec, TrainConfig(**settings))
    few = memory.LEAST_MICRO_TOKENS
    peaks = [memory.estimate(spec, adds, name, few, few, recompute=True).peak_bytes for name in ("bf16", "fp32")]
    limit = f"{sum(peaks) / 2 / memory.MARGIN / 2**20:.4f}MiB"
    result, printed = run({**settings, "memory": limit})
    assert result["precision"] == "bf16" and "bf16, as fp32, which is faster here" in printed
    (tmp_path / "run" / "run.json").unlink()
    again, printed = run({**settings, "memory": "64GiB"}, resume=True)
    assert again["precision"] == "bf16" and "which is faster here" not in printed


def test_a_resumed_run_keeps_its_split_and_is_refused_where_that_does_not_fit(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**inputs, "output": str(tmp_path / "run"), "epochs": 2, "save_every": 1}
    whole, _ = run(settings)
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    _drop_after(tmp_path / "run", whole["steps"] - 1)
    peak = whole["predicted_peak_bytes"]
    with pytest.raises(DoesNotFitError, match=r"begun with 1,024 tokens at a time.*of --memory.*--force"):
        run({**settings, "memory": f"{peak / 2e6:.1f}MB"}, resume=True)
    run({**settings, "memory": f"{peak * 1.1 / 1e6:.1f}MB"}, resume=True)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_the_metrics_hold_one_line_a_step_also_after_a_resume(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = {**inputs, "output": str(tmp_path / "run"), "epochs": 2, "eval": "20%", "save_every": 1}
    run(settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    _drop_after(tmp_path / "run", 3)
    run(settings, resume=True)
    again = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    kinds = [(json.loads(line)["kind"], json.loads(line)["step"]) for line in again]
    assert kinds == [("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("step", 4), ("eval", 4)]
    assert [_timeless(line) for line in again] == [_timeless(line) for line in lines]


def _drop_after(output: Path, step: int) -> None:
    """As a kill after `step` leaves it, half a line of metrics included."""
    import shutil

    (output / "run.json").unlink()
    for path in (output / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"kind": "st')


def _timeless(line: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key != "step_s"}


def test_added_tokens_are_trained_saved_and_back_when_the_run_is_opened(inputs: dict[str, Any], tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", [tiny.chat_row(f"{n}?", f"<call>{n}</call>") for n in range(8)])
    settings = {**inputs, "data": str(data), "output": str(tmp_path / "run"), "add_tokens": ["<call>", "</call>", "7"]}
    result, printed = run({**settings, "max_steps": 3, "epochs": 2})
    assert "2 tokens added, 7 known already: <call> (258), </call> (259), 7 (" in printed
    assert list(result["added_tokens"]) == ["<call>", "</call>", "7"]
    plain, _ = run({**inputs, "data": str(data), "output": str(tmp_path / "plain"), "max_steps": 3, "epochs": 2})
    assert result["trainable_params"] == plain["trainable_params"] + 3 * 32
    assert result["tokens_seen"] < plain["tokens_seen"]

    opened = open_target(str(tmp_path / "run"), None, 1.0, "fp32", False, Console(file=io.StringIO()))
    assert opened.tokenizer("<call>x</call>").input_ids[0] == 258
    rows = token_rows(opened.model)["model.embed_tokens"]
    assert rows.ids.tolist() == list(result["added_tokens"].values())
    assert not torch.equal(rows.rows, rows.base.weight[rows.ids])


def test_a_run_with_added_tokens_goes_on_bitwise_after_a_resume(inputs: dict[str, Any], tmp_path: Path) -> None:
    settings = {**inputs, "add_tokens": ["What is"], "epochs": 2, "save_every": 1}
    whole, _ = run({**settings, "output": str(tmp_path / "run")})
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    _drop_after(tmp_path / "run", whole["steps"] - 1)
    _, printed = run({**settings, "output": str(tmp_path / "run")}, resume=True)
    assert "resuming after step" in printed
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize(
    "more",
    [
        {"method": "adapter", "variant": "compacter", "bottleneck": 8},
        {"method": "prefix", "variant": "reparametrised", "virtual_tokens": 3},
        {"method": "prompt", "virtual_tokens": 3},
        {"method": "full", "layers": "last:1"},
        {"variant": "vera"},
        {"init": "pissa"},
        {"init": "lora-ga", "lora_plus": 4.0},
    ],
    ids=lambda more: " ".join(str(value) for value in more.values()),
)
def test_every_method_goes_on_bitwise_after_a_resume(
    more: dict[str, Any], inputs: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**inputs, **more, "epochs": 2, "save_every": 1, "output": str(tmp_path / "run")}
    whole, _ = run(settings)
    (saved,) = (tmp_path / "run" / "adapter").glob("*.safetensors")
    before = saved.read_bytes()
    _drop_after(tmp_path / "run", whole["steps"] - 1)
    _, printed = run(settings, resume=True)
    assert "resuming after step" in printed
    assert saved.read_bytes() == before


def test_that_openmp_is_told_to_take_fewer_threads_than_there_are_cores_is_said(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(machine, "physical_cores", lambda: 3)
    _, usual = run({**inputs, "threads": None, "output": str(tmp_path / "usual")})
    assert "threads = None (1)" in usual
    assert "threads: 1 of 3 cores, as OMP_NUM_THREADS says; --threads 3 takes all" in usual
    _, given = run({**inputs, "threads": 1, "output": str(tmp_path / "given")})
    assert "OMP_NUM_THREADS" not in given


def test_a_run_tells_later_ones_how_long_they_will_take(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    precision._best_rate.cache_clear()
    settings = {**inputs, "epochs": 4, "shuffle": False}  # 12 steps; every epoch the same ones
    first, printed = run({**settings, "output": str(tmp_path / "first")})
    assert first["predicted_train_s"] is None and "predicted time" not in printed
    # What trains a part of the layers says nothing of the whole, and is not remembered.
    run({**settings, "output": str(tmp_path / "part"), "layers": "last:1"})
    second, printed = run({**settings, "output": str(tmp_path / "second"), "epochs": 8})
    assert second["predicted_train_s"] > 0
    assert "predicted time: " in printed and "tokens/s, predicted " in printed
    # The operations of the second at the rate that the first reached.
    assert second["predicted_train_s"] == pytest.approx(second["flop"] / (first["flop"] / first["train_s"]))
    precision._best_rate.cache_clear()


def test_another_method_is_timed_by_lora_first_which_is_said_and_then_by_itself(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    precision._best_rate.cache_clear()
    settings = {**inputs, "epochs": 4, "shuffle": False}
    lora, _ = run({**settings, "output": str(tmp_path / "lora")})
    adapter = {**settings, "method": "adapter", "variant": "houlsby", "bottleneck": 8}
    first, printed = run({**adapter, "output": str(tmp_path / "first")})
    assert "predicted time: " in printed and "at the speed of LoRA: no run of this kind was timed here" in printed
    assert first["predicted_train_s"] == pytest.approx(first["flop"] / (lora["flop"] / lora["train_s"]))
    second, printed = run({**adapter, "output": str(tmp_path / "second")})
    assert "at the speed of LoRA" not in printed
    assert second["predicted_train_s"] == pytest.approx(first["train_s"])
    # Layers below what is trained are computed in the first of four epochs alone.
    part, _ = run({**adapter, "output": str(tmp_path / "part"), "layers": "last:1"})
    assert part["flop"] < 0.7 * first["flop"]
    precision._best_rate.cache_clear()
