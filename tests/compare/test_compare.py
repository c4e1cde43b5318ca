"""Whole comparisons of tiny models: real runs in processes of their own."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorafit.compare import child, line
from lorafit.compare.line import compare
from lorafit.config import CompareConfig, EvalConfig
from lorafit.errors import CheckpointError, DataError, RunDirError
from lorafit.use import evaluate
from tests import tiny

SETTINGS: dict[str, Any] = {
    "methods": ["lora", "prompt"], "seeds": 1, "rate_trials": 2, "r": 3, "batch_size": 4, "threads": 1,
    "precision": "fp32", "shots": 1,
}  # fmt: skip
# What depends on how fast the machine was at the time.
TIMED = ("train_s", "latency_s", "spent_s", "peak_rss_bytes", "pareto", "reason")


def quiet() -> Console:
    return Console(file=io.StringIO())


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(own) for key, own in value.items() if key not in TIMED}
    return [without_times(own) for own in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("inputs")
    rows = [tiny.chat_row(f"Is {n} odd?", "yes" if n % 2 else "no") for n in range(60)]
    keep = directory / "keep.txt"
    keep.write_text("What was known before, in a few words. " * 5)
    return {
        "model": str(tiny.write_model(directory / "model")),
        "data": str(tiny.write_rows(directory / "rows.jsonl", rows[:20])),
        "eval": str(tiny.write_rows(directory / "test.jsonl", rows[20:32])),
        "other test": str(tiny.write_rows(directory / "other.jsonl", rows[40:])),
        "keep": str(keep),
    }


def config(inputs: dict[str, str], output: Path, **more: Any) -> CompareConfig:
    given = {name: inputs[name] for name in ("model", "data", "eval", "keep")}
    return CompareConfig(**{**SETTINGS, **given, "output": str(output), **more})


def begin(config: CompareConfig) -> None:
    compare(config, False, quiet(), None)


@pytest.fixture(scope="module")
def killed_and_resumed(
    inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str]:
    """A comparison that was killed once its first whole run was under way, and then resumed."""
    directory = tmp_path_factory.mktemp("compared") / "c"
    child.CONTEXT.set_forkserver_preload(child.PRELOADED)
    process = child.CONTEXT.Process(target=begin, args=(config(inputs, directory),))
    process.start()
    trials, deadline = directory / "trials", time.monotonic() + 100
    while not list(trials.glob("*/seed-*")) and time.monotonic() < deadline:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    before = {path: path.read_text() for path in trials.glob("*/*.json")}
    assert before and not (directory / "compare.json").exists()
    heard = io.StringIO()
    found = compare(config(inputs, directory), True, quiet(), Console(file=heard, width=200))
    assert {path: path.read_text() for path in before} == before  # what was finished was not run again
    return directory, found, heard.getvalue()


@pytest.fixture(scope="module")
def alone(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("alone") / "c"
    return directory, compare(config(inputs, directory), False, quiet(), None)


def test_a_comparison_that_was_killed_ends_as_one_left_alone(
    killed_and_resumed: tuple[Path, dict[str, Any], str], alone: tuple[Path, dict[str, Any]]
) -> None:
    directory, found, _ = killed_and_resumed
    assert json.loads((directory / "compare.json").read_text()) == found
    assert without_times(found) == without_times(alone[1])


def test_the_json_has_what_others_rely_on(alone: tuple[Path, dict[str, Any]]) -> None:
    found = alone[1]
    keys = ("quality", "trainable_params", "train_s", "peak_rss_bytes", "latency_s", "forgetting", "file_bytes", "flop")
    assert [method["name"] for method in found["methods"]] == ["lora", "prompt"]
    for method in found["methods"]:
        assert all(method[key] is not None for key in keys)
        low, high = method["quality"]["interval"]
        assert low <= method["quality"]["value"] <= high
        assert method["seeds"] == [0] and method["status"] == "finished" and len(method["rates"]) == 2
        assert method["lr"] in [rate["lr"] for rate in method["rates"]]
        assert (
            min(rate["loss"] for rate in method["rates"]) == {r["lr"]: r["loss"] for r in method["rates"]}[method["lr"]]
        )
    assert set(found["floors"]) == {"untuned", "few_shot"}
    assert found["recommended"] and found["reason"].count(". ") == 1
    assert (found["rows"], found["budget_s"]) == ({"train": 16, "search": 2, "valid": 4, "test": 12}, None)


def test_its_figures_are_those_that_train_and_eval_give(
    alone: tuple[Path, dict[str, Any]], inputs: dict[str, str]
) -> None:
    directory, found = alone
    lora = found["methods"][0]
    results = [json.loads((directory / run / "run.json").read_text()) for run in lora["runs"]]
    assert [result["seed"] for result in results] == [0]
    assert lora["trainable_params"] == results[0]["trainable_params"]
    assert lora["peak_rss_bytes"] == max(result["peak_rss_bytes"] for result in results)

    def loss(target: str, data: str, generate: bool = False) -> dict[str, Any]:
        settings = {"target": target, "data": data, "generate": generate, "precision": "fp32", "threads": 1}
        return evaluate(EvalConfig(**settings), quiet())

    own = [loss(str(directory / run), inputs["eval"], generate=True) for run in lora["runs"]]
    assert lora["quality"]["loss"]["value"] == pytest.approx(sum(one["loss"] for one in own), rel=1e-5)
    assert lora["quality"]["accuracy"]["value"] == pytest.approx(sum(one["accuracy"] for one in own))
    base = loss(inputs["model"], inputs["eval"])["loss"]
    assert found["floors"]["untuned"]["quality"]["loss"]["value"] == pytest.approx(base, rel=1e-5)
    kept = [loss(str(directory / run), inputs["keep"])["loss"] for run in lora["runs"]]
    expected = sum(kept) - loss(inputs["model"], inputs["keep"])["loss"]
    assert lora["forgetting"] == pytest.approx(expected, abs=1e-4)


def test_all_methods_learn_the_same_rows_and_no_trial_sees_a_test_row(alone: tuple[Path, dict[str, Any]]) -> None:
    directory, _ = alone
    sides = {
        name: (directory / "rows" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "valid", "test")
    }
    assert not set(sides["test"]) & {*sides["train"], *sides["valid"]} and not set(sides["train"]) & set(sides["valid"])
    configs = [tomllib.loads(path.read_text()) for path in directory.rglob("run.toml")]
    assert len(configs) == 2 * (1 + 1)  # of the search, the best trial alone is kept
    assert {one["data"] for one in configs} == {str(directory / "rows" / "train.jsonl")}
    searched = [one for one in configs if "lr-" in one["output"]]
    assert {one["eval"] for one in searched} == {str(directory / "rows" / "search.jsonl")}
    assert not any("eval" in one for one in configs if "seed-" in one["output"])


def test_the_command_gives_a_finished_comparison_as_json(
    alone: tuple[Path, dict[str, Any]], inputs: dict[str, str]
) -> None:
    directory, found = alone
    arguments = ["compare", inputs["model"], inputs["data"], "-o", str(directory), "--eval", inputs["eval"]]
    arguments += [
        "--keep",
        inputs["keep"],
        "--methods",
        "lora,prompt",
        "--seeds",
        "1",
        "--rate-trials",
        "2",
        "--r",
        "3",
    ]
    arguments += ["--batch-size", "4", "--threads", "1", "--precision", "fp32", "--shots", "1", "--resume", "--json"]
    done = subprocess.run([sys.executable, "-m", "lorafit", *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == found


def test_other_test_rows_lead_to_the_same_rates(
    alone: tuple[Path, dict[str, Any]], inputs: dict[str, str], tmp_path: Path
) -> None:
    other = config(inputs, tmp_path / "c", eval=inputs["other test"], methods=["lora"])
    found = compare(other, False, quiet(), None)
    assert found["methods"][0]["rates"] == alone[1]["methods"][0]["rates"]
    assert found["methods"][0]["quality"] != alone[1]["methods"][0]["quality"]


def test_the_page_needs_nothing_else_and_the_table_says_what_it_says(
    killed_and_resumed: tuple[Path, dict[str, Any], str],
) -> None:
    directory, found, table = killed_and_resumed
    page = (directory / "report.html").read_text()
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script", page)
    assert page.count("<svg") == page.count("</svg>") == 4 and "Pareto" in page
    assert found["reason"].split(".")[0] in table.replace("\n", " ")
    for method in found["methods"]:
        assert method["name"] in table and f"{method['trainable_params']:,}" in table and f"{method['lr']:g}" in page


def test_a_time_that_is_used_up_leaves_a_report_that_says_so(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "parse_seconds", lambda text, flag: 1e-3)  # the least that can be typed is a second
    heard = io.StringIO()
    found = compare(config(inputs, tmp_path / "c", budget="1s"), False, quiet(), Console(file=heard, width=200))
    assert [method["status"] for method in found["methods"]] == ["not tried", "not tried"]
    assert "No method was measured" in heard.getvalue() and (tmp_path / "c" / "report.html").is_file()


def test_a_directory_that_is_in_use_or_was_begun_otherwise_is_refused(
    alone: tuple[Path, dict[str, Any]], inputs: dict[str, str], tmp_path: Path
) -> None:
    directory, _ = alone
    with pytest.raises(RunDirError, match="already holds a comparison"):
        compare(config(inputs, directory), False, quiet(), None)
    with pytest.raises(CheckpointError, match="r was 3, now 4"):
        compare(config(inputs, directory, r=4), True, quiet(), None)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirError, match=r"holds other files \(notes.txt\)"):
        compare(config(inputs, tmp_path), False, quiet(), None)
    with pytest.raises(DataError, match="does not exist"):
        compare(config(inputs, tmp_path / "new", data="none.jsonl"), False, quiet(), None)


def die(console: Console) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def refuse(console: Console) -> dict[str, Any]:
    console.print("on the way")
    raise DataError("this cannot be used", "Mend it")


def test_a_child_says_why_it_ended(tmp_path: Path) -> None:
    with pytest.raises(child.Killed, match="ended with -9"):
        child.call(die, (), tmp_path / "a.log")
    with pytest.raises(child.Refused, match=r"this cannot be used. Mend it."):
        child.call(refuse, (), tmp_path / "b.log")
    assert "on the way" in (tmp_path / "b.log").read_text()
