"""Whole searches of the rank with tiny models: real runs in processes of their own."""

from __future__ import annotations

import io
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorafit import cli, files
from lorafit.adapters import shrink
from lorafit.config import EvalConfig, RankConfig, ReportConfig, ShrinkConfig, TrainConfig
from lorafit.errors import (
    CheckpointError,
    ConfigError,
    DoesNotFitError,
    LorafitError,
    NumericsError,
    RunDirError,
)
from lorafit.model import spec as model_spec
from lorafit.rank import line
from lorafit.rank.conclude import commands, still_falling, train_command
from lorafit.rank.show import _about, costs_told, expected_told, page, print_rank, rate_told, verified_told
from lorafit.rank.verify import _next, candidates
from lorafit.showing import report
from lorafit.trials import child
from lorafit.trials.rows import Rows
from lorafit.units import format_seconds
from lorafit.use import evaluate
from tests import tiny
from tests.rank import written

SETTINGS: dict[str, Any] = {
    "max_r": 6, "epochs": 2, "batch_size": 4, "threads": 1, "precision": "fp32", "lr": 2e-3, "verify": True,
}  # fmt: skip


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("inputs")
    rows = [tiny.chat_row(f"Is {n} odd?", "yes" if n % 2 else "no") for n in range(40)]
    return {
        "model": str(tiny.write_model(directory / "model")),
        "data": str(tiny.write_rows(directory / "rows.jsonl", rows[:24])),
        "eval": str(tiny.write_rows(directory / "valid.jsonl", rows[24:])),
    }


def config(inputs: dict[str, str], output: Path, **more: Any) -> RankConfig:
    return RankConfig(**{**SETTINGS, **inputs, "output": str(output), **more})


@pytest.fixture(scope="module")
def searched(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    directory, heard = tmp_path_factory.mktemp("searched") / "s", io.StringIO()
    found = line.rank(config(inputs, directory), False, quiet(), Console(file=heard, width=100))
    return directory, found, heard.getvalue()


def test_the_json_has_what_others_rely_on(searched: tuple[Path, dict[str, Any], str]) -> None:
    directory, found, _ = searched
    assert json.loads((directory / "rank.json").read_text()) == found
    assert [one["r"] for one in found["curve"]] == [1, 2, 4, 6]
    chosen = next(one for one in found["curve"] if one["r"] == found["recommended_r"])
    assert chosen["as_good"] and all(not one["as_good"] for one in found["curve"] if one["r"] < found["recommended_r"])
    verified = found["verified"]["trials"][str(found["recommended_r"])]
    assert found["recommended_lr"] == verified["lr"]
    assert f"--lr {verified['lr']:g} " in found["command"]
    assert found["reason"] and 0 <= chosen["right"] <= 1
    assert {"loss", "standard_error"} < set(chosen)
    assert len(found["gradients"]["by_weight"]) == 14
    assert min(found["gradients"]["rank_pattern"].values()) >= 1


def test_the_furthest_rows_are_named_as_they_were_given(
    searched: tuple[Path, dict[str, Any], str], inputs: dict[str, str]
) -> None:
    _, found, _ = searched
    for row in found["distance"]["furthest"]:
        name, line = row["origin"].rsplit(":", 1)
        assert Path(name).name == Path(inputs["data"]).name
        assert (
            json.loads(Path(inputs["data"]).read_text().splitlines()[int(line) - 1])["messages"][1]["content"]
            == row["text"]
        )


def test_the_curve_is_what_eval_gives_at_each_rank(
    searched: tuple[Path, dict[str, Any], str], inputs: dict[str, str]
) -> None:
    directory, found, _ = searched
    for one in found["curve"]:
        settings = {"target": str(directory / "trials" / "all-ranks"), "data": inputs["eval"], "r": one["r"]}
        own = evaluate(EvalConfig(**settings, threads=1), quiet())
        assert one["loss"] == pytest.approx(own["loss"], rel=1e-5)
        assert one["right"] == own["exact_match"]  # a greedy answer is the reply where each of its tokens is likeliest


def test_the_command_that_is_advised_trains(searched: tuple[Path, dict[str, Any], str], inputs: dict[str, str]) -> None:
    found = searched[1]
    words = found["command"].split()
    assert words[:4] == ["lorafit", "train", inputs["model"], inputs["data"]]
    given = dict(zip(words[6::2], words[7::2], strict=True))
    settings = {name.removeprefix("--").replace("-", "_"): value for name, value in given.items()}
    TrainConfig(model=words[2], data=words[3], output="out", **settings)
    assert settings["r"] == str(found["recommended_r"]) and settings["alpha"] == str(2 * found["recommended_r"])


@pytest.mark.parametrize("kind", ["text", "directory"])
def test_the_command_trains_on_the_rows_of_the_search_where_these_were_split_from_what_was_given(
    kind: str, inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / ("book.txt" if kind == "text" else "data")
    if kind == "text":
        data.write_text("".join(f"Line {n} of a book is no line of another.\n" for n in range(400)))
    else:
        data.mkdir()
        shutil.copy(inputs["data"], data / "train.jsonl")
        shutil.copy(inputs["eval"], data / "valid.jsonl")
    more = {"data": str(data), "eval": None, "verify": False, "epochs": 1, "max_r": 2, "max_steps": 1}
    found = line.rank(config(inputs, tmp_path / "out", **more), False, quiet(), None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", shlex.split(found["command"]))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    of = {"search": tmp_path / "out" / "trials" / "all-ranks", "command": tmp_path / "runs"}
    of["command"] /= f"r{found['recommended_r']}"
    read = {name: json.loads((run / "run.json").read_text()) for name, run in of.items()}
    for what in ("data_sha256", "rows", "eval_data"):
        assert read["search"][what] == read["command"][what]


def test_the_adapter_that_the_search_left_is_taken_by_the_command_that_is_told(
    searched: tuple[Path, dict[str, Any], str], inputs: dict[str, str], tmp_path: Path
) -> None:
    _, found, printed = searched
    words = found["shrink"].split()
    assert words[:2] == ["lorafit", "shrink"] and words[3:5] == ["--r", str(found["recommended_r"])]
    assert found["shrink"] in printed
    shrink(ShrinkConfig(run=words[2], r=int(words[4]), output=str(tmp_path / "small")), quiet())
    own = evaluate(
        EvalConfig(target=str(tmp_path / "small"), data=inputs["eval"], threads=1, precision="fp32"), quiet()
    )
    chosen = next(one for one in found["curve"] if one["r"] == found["recommended_r"])
    assert own["loss"] == pytest.approx(chosen["loss"], rel=1e-5)


def test_verifying_trains_neighbours_and_ranks_by_layer_each_at_the_best_of_some_rates(
    searched: tuple[Path, dict[str, Any], str],
) -> None:
    directory, found, printed = searched
    verified = found["verified"]
    ranks = [one["r"] for one in found["curve"]]
    at = ranks.index(found["recommended_r"])
    assert set(verified["trials"]) == {*(str(r) for r in ranks[max(0, at - 1) : at + 2]), "ranks by layer"}
    for one in verified["trials"].values():
        assert len(one["tried"]) >= 3 and one["loss"] == min(t["loss"] for t in one["tried"])
        result = json.loads((directory / "trials" / one["run"] / "run.json").read_text())
        assert result["eval_loss"] == one["loss"]
    losses = {r: verified["trials"][str(r)]["loss"] for r in ranks if str(r) in verified["trials"]}
    own = losses[found["recommended_r"]]
    # In fp32 what a run evaluates and what is measured row by row are the same but for the order of sums.
    assert verified["regret"] == pytest.approx(own / min(losses.values()) - 1, rel=1e-4, abs=1e-6)
    is_best = verified["best_r"] == found["recommended_r"]
    more = "is the best of it" if is_best else f"loses {verified['regret']:.2%} more"
    assert f"rank {found['recommended_r']} {more}" in " ".join(printed.split())


def test_what_is_printed_says_what_to_take_and_why(searched: tuple[Path, dict[str, Any], str]) -> None:
    _, found, printed = searched
    flat = " ".join(printed.split())
    assert f"Take r = {found['recommended_r']}: {found['reason']}." in flat and found["command"] in printed
    assert "they surprise it by" in flat and "directions in the mean" in flat
    assert printed.count("recommended") == 1


def test_the_page_is_made_again_by_report_and_needs_nothing_else(searched: tuple[Path, dict[str, Any], str]) -> None:
    directory, found, _ = searched
    text = (directory / "report.html").read_text()
    assert found["reason"] in text and text.count("<svg") == 3 and "http" not in text.replace("http-equiv", "")
    (directory / "report.html").unlink()
    again = report(ReportConfig(directory=str(directory)), quiet(), None)
    assert again["kind"] == "rank" and (directory / "report.html").read_text() == text


def test_a_search_goes_on_where_it_was_and_refuses_other_settings(
    searched: tuple[Path, dict[str, Any], str], inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, found, _ = searched
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "rank.json").unlink()
    with pytest.raises(RunDirError, match="already holds a search of the rank"):
        line.rank(config(inputs, copy), False, quiet(), None)
    with pytest.raises(CheckpointError, match="batch_size"):
        line.rank(config(inputs, copy, batch_size=5), True, quiet(), None)
    monkeypatch.setattr(child, "call", None)  # whatever was computed is not computed again
    again = line.rank(config(inputs, copy), True, quiet(), None)
    named = {name: again[name] for name in ("shrink", "by_layer")}  # what names the directory
    assert again == found | named and all(str(copy) in command for command in named.values())


# A search that goes on, and one that begins, of which the look is refused at once.
WITHOUT_TORCH = """
import io, json, sys
from rich.console import Console
from lorafit.config import RankConfig
from lorafit.rank import line
from lorafit.trials import child

def call(*_):
    raise child.Refused("not today")

child.call = call
searched, begun = (RankConfig(**settings) for settings in json.loads(sys.argv[1]))
line.rank(searched, True, Console(file=io.StringIO()), None)
try:
    line.rank(begun, False, Console(file=io.StringIO()), None)
except child.Refused:
    sys.exit("torch" in sys.modules or "transformers" in sys.modules)
"""


def test_only_children_take_the_time_and_memory_of_torch(
    searched: tuple[Path, dict[str, Any], str], inputs: dict[str, str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(searched[0], copy)
    both = [config(inputs, output).model_dump() for output in (copy, tmp_path / "new")]
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, json.dumps(both)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("more", "error", "told"),
    [
        ({"model": "gone"}, LorafitError, "gone"),
        ({"eval": "150%"}, ConfigError, "no share|not a share"),
        ({"lr": 1e4}, NumericsError, "run of all ranks failed: .* was not finite in 3 steps.* lower --lr"),
    ],
)
def test_what_cannot_be_is_said(
    more: dict[str, Any], error: type[Exception], told: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(error, match=told):
        line.rank(config(inputs, tmp_path / "out", **more), False, quiet(), None)


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (child.Refused("no space left", "Free some"), "training rank 4 failed: no space left. Free some."),
        (child.Refused("too large", "Lower --r", DoesNotFitError), "with a lower --max-r or --seq-len"),
        (child.Killed("its process ended with -9"), "Free memory, and run the same command with --resume"),
    ],
)
def test_what_is_in_the_way_of_a_run_is_said_and_tried_again_by_the_next_command(
    refused: child.Refused, told: str, inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[bool]()

    def call(*_: Any) -> dict[str, Any]:
        asked.append(True)
        if len(asked) == 1:
            raise refused
        return {"eval_loss": 0.5}

    monkeypatch.setattr(child, "call", call)
    rows = Rows(tmp_path, {"train": 3, "valid": 1}, [], {})
    trials = line.Trials(config(inputs, tmp_path / "out"), tmp_path / "out", rows, "fp32", quiet())
    with pytest.raises(LorafitError, match=told):
        trials.train("r-4", "rank 4", {"r": 4})
    assert trials.train("r-4", "rank 4", {"r": 4})["result"] == {"eval_loss": 0.5}


def test_a_rate_that_is_too_high_is_tried_once(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[bool]()

    def call(*_: Any) -> dict[str, Any]:
        asked.append(True)
        raise child.Refused("the loss was not finite", "Lower --lr", NumericsError)

    monkeypatch.setattr(child, "call", call)
    rows = Rows(tmp_path, {"train": 3, "valid": 1}, [], {})
    trials = line.Trials(config(inputs, tmp_path / "out"), tmp_path / "out", rows, "fp32", quiet())
    made = [trials.train("r-4", "rank 4", {"r": 4}) for _ in range(2)]
    assert [one["result"] for one in made] == [None, None] and len(asked) == 1


@pytest.mark.parametrize(
    ("losses", "count"), [({1: 0.5, 2: 0.4, 4: 0.3}, 1), ({1: 0.5, 2: float("nan"), 4: 0.3}, 60), ({1: 0.5, 2: 0.5}, 2)]
)
def test_a_single_row_and_a_loss_that_is_none_come_to_a_page_as_well(
    losses: dict[int, float], count: int, inputs: dict[str, str], tmp_path: Path
) -> None:
    found = written.found(model_spec.read(inputs["model"]), losses, "a row", count=count)
    files.write_json(tmp_path / "rank.json", found)  # takes no number that is not finite
    assert page(found).count("<svg") == 3
    heard = io.StringIO()
    print_rank(found, Console(file=heard, width=100))
    assert ("not finite" in heard.getvalue()) == any(math.isnan(loss) for loss in losses.values())
    assert "nan" not in heard.getvalue() and "inf" not in heard.getvalue()
    assert (" ± " in heard.getvalue()) == (count > 1)


def test_rows_with_labels_are_refused_with_what_to_do(inputs: dict[str, str], tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "label": "odd" if n % 2 else "even"} for n in range(30)]
    data = str(tiny.write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ConfigError, match="--rename text=prompt,label=completion"):
        line.rank(config(inputs | {"data": data}, tmp_path / "out"), False, quiet(), None)
    renamed = {"data": data, "eval": "30%", "rename": {"text": "prompt", "label": "completion"}}
    more = {"verify": False, "lr": "auto", "epochs": 10}
    found = line.rank(config(inputs, tmp_path / "out", **more, **renamed), False, quiet(), None)
    race = found["run"]["race"]
    assert race["lr"] == found["run"]["lr"] == found["recommended_lr"] and len(race["rates"]) > 1
    assert found["verified"] is None and f"--lr {race['lr']:g} " in found["command"]
    assert "--rename text=prompt,label=completion" in found["command"]


def test_a_search_at_a_rate_that_is_given_advises_that_rate(inputs: dict[str, str], tmp_path: Path) -> None:
    found = line.rank(config(inputs, tmp_path / "out", verify=False, epochs=1), False, quiet(), None)
    assert (found["run"]["race"], found["recommended_lr"]) == (None, 2e-3)
    assert rate_told(found) == []


def test_which_rates_raced_is_told() -> None:
    race = {"lr": 3e-3, "rates": [1e-3, 3e-3, 9e-3], "losses": [[3.0, 2.5], [3.0, 2.0], []], "ahead": [2.4, 1.9, None]}
    raced = "0.001 loses 2.4000, 0.003 loses 1.9000, 0.009 failed"
    told = f"Rates raced over the first 2 steps, and on the rows to come {raced}: 0.003 went on."
    assert rate_told({"run": {"race": race}}) == [told]


def test_the_best_of_those_that_were_trained_by_themselves_is_not_said_to_lose_more_than_itself() -> None:
    own = {"loss": 0.5, "lr": 1e-3, "tried": []}
    verified = {"regret": 0.0, "best_r": 4, "gap": 0.0, "gap_standard_error": 0.0, "as_good_r": 4, "trials": {"4": own}}
    told = verified_told({"verified": verified, "recommended_r": 4})
    assert told == ["Trained by itself at its best rate, rank 4 is the best of it and its neighbours."]


@pytest.mark.parametrize(("smallest", "is_told"), [(4, False), (2, True), (8, True), (None, False)])
def test_another_rank_that_does_by_itself_is_named(smallest: int | None, is_told: bool) -> None:
    own = {"loss": 0.5, "lr": 1e-3, "tried": []}
    verified = {"regret": 0.01, "best_r": 8, "gap": 0.01, "gap_standard_error": 0.02, "trials": {"4": own}}
    told = verified_told({"verified": verified | {"as_good_r": smallest}, "recommended_r": 4})
    assert (f"rank {smallest} is the smallest that is as good as the best" in " ".join(told)) == is_told
    assert verified_told({"verified": verified, "recommended_r": 4}) == told[:1]


def test_what_it_took_is_told_in_trainings(searched: tuple[Path, dict[str, Any], str]) -> None:
    directory, found, _ = searched
    run = json.loads((directory / "trials" / "all-ranks" / "run.json").read_text())
    assert found["training_s"] == run["load_s"] + run["train_s"] + run["eval_s"]
    assert 0 < run["eval_s"] < found["run"]["wall_s"]
    told = costs_told({"seconds": {"look": 2.0, "train": 7.0}, "training_s": 5.0, "curve": [{"r": 1}, {"r": 6}]})
    assert told == "Took 9.00 s, 1.8 times as long as training r = 6 alone: look 2.00 s, train 7.00 s."
    assert costs_told({"seconds": {"look": 2.0}, "curve": [{"r": 6}]}) == "Took 2.00 s: look 2.00 s."


def test_a_run_that_was_stopped_meanwhile_took_what_it_counted_in_all(inputs: dict[str, str]) -> None:
    spec = model_spec.read(inputs["model"])
    assert written.found(spec, {1: 0.5, 2: 0.4}, "a row")["seconds"]["train"] == 6.0  # from its start to its end
    counted = 0.5 + 3.0 + 0.5 + 1.0 + 0.8
    assert written.found(spec, {1: 0.5, 2: 0.4}, "a row", wall_s=2.0)["seconds"]["train"] == pytest.approx(counted)


def test_what_the_run_was_expected_to_take_stands_beside_what_it_took(
    searched: tuple[Path, dict[str, Any], str],
) -> None:
    expected = searched[1]["run"]["expected_s"]
    assert {name for name, seconds in expected.items() if seconds > 0} == {"load", "train", "lower", "evaluations"}
    assert f" (predicted {format_seconds(sum(expected.values()))})" in costs_told(searched[1])


def test_what_a_run_will_take_is_told_part_by_part_and_as_a_bound_where_it_computes_in_fewer_bits() -> None:
    expected = {"load": 2.0, "train": 60.0, "race": 0.0, "lower": 24.0, "evaluations": 4.0}
    parts = "(loading 2.00 s, the largest rank 1 min 00 s, those below 24.0 s, evaluations 4.00 s)"
    assert expected_told(expected, "fp32") == f"predicted: all ranks in one run take about 1 min 30 s {parts}"
    assert "take at most 1 min 30 s" in expected_told(expected, "int8")


def test_the_search_of_a_rate_goes_on_at_its_edge() -> None:
    assert [_next(dict.fromkeys((1.0, 0.5, 2.0)[:n], 1.0)) for n in range(3)] == [1.0, 0.5, 2.0]
    assert _next({1.0: 2.0, 0.5: 3.0, 2.0: 1.0}) == 4.0
    assert _next({1.0: 2.0, 0.5: 1.0, 2.0: 3.0}) == 0.25
    assert _next({1.0: 1.0, 0.5: 2.0, 2.0: 3.0}) is None
    assert _next({1.0: 3.0, 0.5: 2.0, 2.0: None, 0.25: 1.0}) is None
    assert _next({1.0: None, 0.5: None, 2.0: None}) is None


def test_a_command_names_what_rows_need(inputs: dict[str, str], tmp_path: Path) -> None:
    own = config({"model": "m", "data": "d"}, tmp_path, template="t.jinja", rename={"a": "prompt"}, verify=False)
    rows = {"train": "d", "valid": "20%"}
    advised = train_command(own, rows, "--r 4")
    assert "--template t.jinja" in advised and "--rename a=prompt" in advised and "--eval 20%" in advised
    # As tests have it, and what has its default is left out.
    assert "--batch-size 4 " in advised and "--precision fp32 --threads 1" in advised and "--seed" not in advised
    own = config({"model": "m", "data": "d"}, tmp_path, seed=3, trust_remote_code=True)
    advised = train_command(own, rows, "--r 4")
    assert "--seed 3 " in advised and advised.count("--trust-remote-code") == 1
    assert "--trust-remote-code True" not in advised


def test_names_with_spaces_are_quoted_in_commands(tmp_path: Path) -> None:
    own = config({"model": "my model", "data": "my rows.jsonl", "eval": "held out.jsonl"}, tmp_path / "a search")
    files_given = {"train": "my rows.jsonl", "valid": "held out.jsonl"}
    words = shlex.split(train_command(own, files_given, "--r 4"))
    assert words[2:4] == ["my model", "my rows.jsonl"] and words[words.index("--eval") + 1] == "held out.jsonl"
    found: dict[str, Any] = {"recommended_r": 4, "recommended_lr": 1e-3, "recommended_alpha": 8, "verified": None}
    told = commands(own, found | {"files": files_given} | {"gradients": {"rank_pattern": {"a": 1, "b": 2}}})
    assert shlex.split(told["shrink"])[2] == str(tmp_path / "a search" / "trials" / "all-ranks")
    assert str(tmp_path / "a search" / "by-layer.toml") in shlex.split(told["by_layer"])


@pytest.mark.parametrize(("number", "told"), [(0.01234, "0.0123"), (99.94, "99.9"), (1529.3, "1,529")])
def test_numbers_for_each_token_are_told_in_full(number: float, told: str) -> None:
    assert _about(number) == told


def test_ranks_by_layer_are_trained_by_the_command_and_the_file_that_are_left(
    searched: tuple[Path, dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, found, printed = searched
    pattern, best = found["gradients"]["rank_pattern"], found["verified"]["trials"]["ranks by layer"]["lr"]
    words = found["by_layer"].split()
    assert found["by_layer"] in printed and words[words.index("--lr") + 1] == f"{best:g}"
    assert words[words.index("--config") + 1] == str(directory / "by-layer.toml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [*words, "--max-steps", "1"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    kept = json.loads((tmp_path / "runs" / "by-layer" / "adapter" / "adapter_config.json").read_text())
    ranks, alphas = (
        {name.removeprefix("^").replace("\\.", "."): value for name, value in kept[kind].items()}
        for kind in ("rank_pattern", "alpha_pattern")
    )
    assert {name: ranks.get(name, kept["r"]) for name in pattern} == pattern
    assert all(alphas.get(name, kept["lora_alpha"]) == 2 * r for name, r in pattern.items())


def test_ranks_that_are_alike_in_all_layers_are_no_other_advice() -> None:
    found: dict[str, Any] = {"recommended_r": 1, "recommended_lr": 1e-3, "recommended_alpha": 2, "verified": None}
    found["files"] = {"train": "d", "valid": "v"}
    told = commands(
        RankConfig(model="m", data="d", output="o"), found | {"gradients": {"rank_pattern": {"a": 1, "b": 1}}}
    )
    assert told["by_layer"] is None and told["settings_by_layer"] is None
    assert candidates(found | told | {"curve": [{"r": 1}, {"r": 2}, {"r": 4}]}) == {"1": (1, {}), "2": (2, {})}


def test_a_run_that_was_far_from_its_end_is_warned_of(searched: tuple[Path, dict[str, Any], str]) -> None:
    assert "fell by 20% in the last epoch" in still_falling([1.0, 0.5, 0.4])[0]
    assert [still_falling(losses) for losses in ([1.0, 0.91], [1.0, 1.2], [1.0], [0.0, 0.0], [])] == [[]] * 5
    _, found, printed = searched
    assert len(found["run"]["evaluations"]) == 2
    assert [note for note in found["notes"] if "still fell" in note] == still_falling(found["run"]["evaluations"])
    assert all(note in " ".join(printed.split()) for note in found["notes"])
