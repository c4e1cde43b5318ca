"""Whole comparisons of tiny models: real runs in processes of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

import lorafit
from lorafit.compare import line, on_ray
from lorafit.compare.line import compare
from lorafit.config import CompareConfig, EvalConfig
from lorafit.errors import CheckpointError, ConfigError, DataError, RunDirError
from lorafit.trials import child
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


def fill_up(console: Console) -> dict[str, Any]:
    raise RunDirError("no space left", "Free some")


def test_a_child_says_why_it_ended_and_whether_it_may_go_better(tmp_path: Path) -> None:
    with pytest.raises(child.Killed, match="ended with -9") as killed:
        child.call(f"{__name__}:die", (), tmp_path / "a.log")
    with pytest.raises(child.Refused, match=r"this cannot be used. Mend it.") as refused:
        child.call(f"{__name__}:refuse", (), tmp_path / "b.log")
    assert "on the way" in (tmp_path / "b.log").read_text()
    with pytest.raises(child.Refused, match="no space left") as full:
        child.call(f"{__name__}:fill_up", (), tmp_path / "c.log")
    ended = killed.value, refused.value, full.value
    assert [one.may_go_better for one in ended] == [True, False, True]
    assert refused.value.kind is DataError


# --- on a cluster -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """A Ray of two CPUs that only this machine reaches: its address, and its process. Its sockets need a short path."""
    with socket.socket() as free, tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        flags = (
            "--head",
            "--node-ip-address=127.0.0.1",
            "--block",
            "--num-cpus=2",
            f"--port={port}",
            "--include-dashboard=false",
            "--disable-usage-stats",
        )
        command = [str(Path(sys.executable).parent / "ray"), "start", *flags, f"--temp-dir={directory}"]
        said = tmp_path_factory.mktemp("ray") / "said"
        with said.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=on_cluster())
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in said.read_text():
            assert process.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
        own = psutil.Process(process.pid)
        address = re.search(r"--address='([^']+)'", said.read_text())
        assert address
        yield address[1], own
        process.terminate()
        process.wait(30)


TOKEN = secrets.token_hex(32)


def on_cluster() -> dict[str, str]:
    """The environment of Ray and of who talks to it: the code that is tested, and a token of this test's own."""
    source = os.pathsep.join([str(Path(lorafit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": source, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def started(config: CompareConfig, *more: str) -> subprocess.Popen[str]:
    """`lorafit compare` with these settings, as a user starts it; its object goes to a pipe."""
    given = config.model_dump(exclude={"model", "data", "methods", "rename"}, exclude_unset=True)
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [
        sys.executable,
        "-m",
        "lorafit",
        "compare",
        config.model,
        config.data,
        "--methods",
        ",".join(config.methods),
    ]
    log = Path(f"{config.output}.log")
    with log.open("a") as said:
        command += [*flags, *more, "--json"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=on_cluster())


def soon(what: Callable[[], list[Any]], process: subprocess.Popen[str], log: Path) -> list[Any]:
    """What there is, once there is something. log: of the process, which must not end before."""
    deadline = time.monotonic() + 500
    while not (found := what()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    return found


def workers(ray: psutil.Process) -> list[psutil.Process]:
    """Those that run a trial: with a child of their own."""
    found = []
    for one in ray.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if one.name().startswith("ray::") and one.children():
                found.append(one)
    return found


def test_on_a_cluster_what_is_missing_is_run_even_if_a_worker_dies_and_the_rest_stands(
    inputs: dict[str, str], cluster: tuple[str, psutil.Process], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    address, ray = cluster
    directory, log = Path(shutil.copytree(alone[0], tmp_path / "c")), tmp_path / "c.log"
    missing = [
        "base/few_shot.json",
        *(f"{name}/seed-0{end}" for name in ("lora", "prompt") for end in (".json", ".measured.json")),
    ]
    for name in missing:
        (directory / "trials" / name).unlink()
    for run in directory.glob("trials/*/seed-0"):
        shutil.rmtree(run)
    before = {path: path.read_text() for path in directory.glob("trials/*/*.json")}
    process = started(config(inputs, directory, ray=address), "--resume")
    killed = soon(lambda: [one.kill() or one.pid for one in workers(ray)], process, log)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and killed, log.read_text()
    found = json.loads(out)
    assert {path: path.read_text() for path in before} == before
    assert all(method["times_shared"] for method in found["methods"])
    assert any(note.startswith("*") for note in found["notes"])
    own = {"notes": found["notes"], "model": inputs["model"], "data": inputs["data"]}
    assert shared(without_times(found)) == shared(without_times(alone[1]) | own)


def shared(found: dict[str, Any]) -> dict[str, Any]:
    """Without the marks of times."""
    return json.loads(re.sub(r'"times_shared": (true|false)', '"times_shared": null', json.dumps(found)))


@pytest.mark.parametrize(
    ("address", "said"), [("127.0.0.1:1", "Connection refused"), ("nonsense", "no cluster to connect to")]
)
def test_a_cluster_that_is_not_there_is_said_before_anything_is_written(
    address: str, said: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        compare(config(inputs, tmp_path / "c", ray=address), False, quiet(), None)
    assert not (tmp_path / "c").exists()


def test_a_node_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "check").write_text("told")
    check, here = str(tmp_path / "check"), {"lorafit": "1"}
    assert on_ray._reached(check, "told", [check], lambda: here, here) is None
    assert "does not see" in str(on_ray._reached(check, "of another comparison", [], lambda: here, here))
    assert "does not see" in str(on_ray._reached(str(tmp_path / "gone"), "told", [], lambda: here, here))
    assert "cannot reach /gone/rows" in str(on_ray._reached(check, "told", ["/gone/rows"], lambda: here, here))
    assert "another model" in str(on_ray._reached(check, "told", [], lambda: {"lorafit": "2"}, here))
    missing = on_ray._reached(check, "told", [], lambda: on_ray.what_is_there("/gone/model"), here)
    assert "cannot read the model" in str(missing)
