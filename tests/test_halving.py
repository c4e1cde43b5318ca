"""A run that leaves an adapter of each rank, from `train` to `shrink`, `eval --r` and PEFT."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from rich.console import Console

import lorafit.run
from lorafit import adapters, opening
from lorafit.config import EvalConfig, ReportConfig, ShrinkConfig, TrainConfig
from lorafit.errors import ConfigError, Interrupted, NumericsError
from lorafit.export import arithmetic, saved
from lorafit.run import Start, train
from lorafit.rundir import RunDir
from lorafit.showing import report
from lorafit.train import halving, loop
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
    return {**settings, **places, "rank_schedule": "halving", "save_every": 1}


Halved = tuple[Path, dict[str, Any], str]


@pytest.fixture(scope="module")
def halved(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Halved:
    """A run, its result and what it printed."""
    path = tmp_path_factory.mktemp("runs") / "halved"
    return path, *run({**inputs, "output": str(path)})


def test_every_rank_is_measured_and_shown(halved: Halved) -> None:
    path, result, printed = halved
    assert [one["r"] for one in result["by_rank"]] == [1, 2, 4, 6]
    assert result["by_rank"][-1]["loss"] == result["eval_loss"]
    assert json.loads((path / "run.json").read_text())["by_rank"] == result["by_rank"]
    assert "held-out loss by rank:" in printed
    assert f"| rank 2 | {result['by_rank'][1]['loss']:.4f} |" in (path / "README.md").read_text()
    for one in result["by_rank"]:
        assert f"  r {one['r']}  {one['loss']:.4f}" in printed


def test_the_run_itself_is_the_one_without_its_lower_ranks(
    inputs: dict[str, Any], halved: Halved, tmp_path: Path
) -> None:
    run({**inputs, "output": str(tmp_path / "usual"), "rank_schedule": "none"})
    files = [path / "adapter" / "adapter_model.safetensors" for path in (halved[0], tmp_path / "usual")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_was_halved_and_trained_on_is_kept_where_it_is_better_than_what_was_halved(
    inputs: dict[str, Any], halved: Halved, tmp_path: Path
) -> None:
    path, result, printed = halved
    ranks, held_out = {one["r"]: one for one in result["by_rank"]}, Path(inputs["eval"])
    assert [ranks[r]["helped"] for r in (6, 4, 2)] == [None, True, True]
    for r in (4, 2):
        steps = f"{ranks[r]['steps']} steps at {ranks[r]['lr']:g}"
        assert f"halved to rank {r}: held-out loss {ranks[r]['loss']:.4f} after {steps}" in printed
    cut = {4: path / "adapter", 2: path / "ranks" / "r4"}
    for r, source in cut.items():
        shrunk({"run": str(source), "r": r, "output": str(tmp_path / f"cut{r}")})
        assert ranks[r]["loss"] < loss(tmp_path / f"cut{r}", held_out)


@given(st.integers(0, 5000))
def test_a_glance_is_at_a_quarter_of_the_pieces_or_at_enough_and_only_the_rest_is_measured_after_it(count: int) -> None:
    asked = list[int]()

    def measure(pieces: Sequence[int]) -> halving.HeldOut:
        asked.extend(pieces)
        return halving.HeldOut(np.array(pieces, dtype=float), np.array(pieces) + 1, np.array(pieces) + 2)

    held = halving.Held(measure, count)
    glance = held.glance()
    assert (glance is None) == (count == 0) and len(asked) >= min(count, halving.GLANCED_AT)
    assert count < 4 * halving.GLANCED_AT or len(asked) == math.ceil(count / 4)
    whole = held.whole(glance)
    assert sorted(asked) == list(range(count))
    if whole:
        assert whole.nats.tolist() == list(range(count))
        assert (whole.tokens - 1).tolist() == (whole.likeliest - 2).tolist() == list(range(count))
        plain = held.whole()
        assert plain and plain.nats.tolist() == whole.nats.tolist()


def test_the_best_evaluation_of_the_run_is_what_its_update_loses_and_is_not_measured_again() -> None:
    losses = iter((3.0, 2.0, 2.0, 4.0, 5.0, 6.0))

    def measure(pieces: Sequence[int]) -> halving.HeldOut:
        nats, tokens = np.array([next(losses), 0.0]), np.array([1, 0])
        return halving.HeldOut(nats, tokens, tokens)

    held = halving.Held(measure, 2)
    assert [held.loss() for _ in range(4)] == [3.0, 2.0, 2.0, 4.0]
    kept = held.trained(2.0)
    assert kept and kept.loss == 2.0
    another = held.trained(1.5)  # found before the run was stopped, and resumed
    assert another and another.loss == 5.0
    unknown = held.trained(None)
    assert unknown and unknown.loss == 6.0


@pytest.mark.parametrize("count", [0, 9, 130])
def test_all_ranks_together_measure_held_out_pieces_as_often_as_is_said_before(
    count: int, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = list[int](), lorafit.run._measure

    def measure(ready: Any, numbers: Sequence[int]) -> halving.HeldOut:
        asked.extend(numbers)
        return real(ready, numbers)

    monkeypatch.setattr(lorafit.run, "_measure", measure)
    held_out = {"eval": str(tiny.write_chat(tmp_path / "held.jsonl", count)) if count else None}
    run({**inputs, **held_out, "output": str(tmp_path / "run")})
    assert len(asked) == count * (inputs["epochs"] + halving.evaluations(inputs["r"], count))


@pytest.mark.parametrize("left", ["ranks", "no ranks"])
def test_a_stopped_run_goes_on_bitwise(left: str, inputs: dict[str, Any], halved: Halved, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(halved[0], again)
    (again / "run.json").unlink()
    shutil.rmtree(again / "adapter")
    if left == "no ranks":
        shutil.rmtree(again / "ranks")
        shutil.rmtree(max((again / "checkpoints").iterdir()))
    result, printed = run({**inputs, "output": str(again)}, resume=True)
    assert f"resuming after step {11 if left == 'no ranks' else 12}" in printed
    for part in ("adapter", "ranks/r1", "ranks/r2", "ranks/r4"):
        files = [path / part / "adapter_model.safetensors" for path in (halved[0], again)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert result["by_rank"] == halved[1]["by_rank"]
    assert RunDir(again).read_held_out() == RunDir(halved[0]).read_held_out()


def test_a_run_that_is_interrupted_while_it_is_halved_says_so_and_goes_on_bitwise(
    inputs: dict[str, Any], halved: Halved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = halving.truncate

    def interrupted(model: Any, r: int, rule: str) -> None:
        if r == 2:
            os.kill(os.getpid(), signal.SIGINT)
        real(model, r, rule)

    monkeypatch.setattr(halving, "truncate", interrupted)
    with pytest.raises(Interrupted, match="while the ranks below were trained; the run itself is saved") as stopped:
        run({**inputs, "output": str(tmp_path / "run")})
    assert stopped.value.exit_code == 130
    monkeypatch.undo()
    result, _ = run({**inputs, "output": str(tmp_path / "run")}, resume=True)
    assert result["by_rank"] == halved[1]["by_rank"]
    assert RunDir(tmp_path / "run").read_held_out() == RunDir(halved[0]).read_held_out()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will drop
@pytest.mark.parametrize("r", [1, 3, 4])
def test_what_shrink_writes_is_what_the_run_trained_or_the_nearest_to_it_and_peft_reads_it(
    r: int, inputs: dict[str, Any], halved: Halved, tmp_path: Path
) -> None:
    path, held_out, small = halved[0], Path(inputs["eval"]), tmp_path / "small"
    found, printed = shrunk({"run": str(path), "r": r, "output": str(small), "data": str(held_out)})
    assert found["loss_before"] == pytest.approx(halved[1]["eval_loss"], rel=1e-5)
    assert found["loss_after"] == pytest.approx(loss(small, held_out), rel=1e-6)
    measured = {one["r"]: one["loss"] for one in halved[1]["by_rank"]}
    if r in measured:
        assert found["loss_after"] == pytest.approx(measured[r], rel=1e-5)
        assert loss(path, held_out, r=r) == pytest.approx(measured[r], rel=1e-5)
        assert f"{measured[r]:.4f} at rank {r}, {measured[6]:.4f} at rank 6" in printed
        assert f"rank {r}, as it is in" in printed
    else:
        assert "rank 4 truncated to 3 by SVD" in printed
        assert "rank 3 is none of those that the run trained (1, 2, 4, 6)" in printed
    model = tiny.llama()
    saved.load(model, small)
    with torch.no_grad():
        expected = model(IDS).logits
    theirs = PeftModel.from_pretrained(tiny.llama(), str(small)).eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert theirs.peft_config["default"].r == r


def test_a_rank_that_there_is_no_adapter_of_is_refused(inputs: dict[str, Any], halved: Halved, tmp_path: Path) -> None:
    shrunk({"run": str(halved[0]), "r": 2, "output": str(tmp_path / "small")})
    for target, r, told in (
        (tmp_path / "small", 1, r"small leaves no other ranks\. Make .*: lorafit shrink .*small --r 1 -o DIR"),
        (halved[0], 3, r"has adapters of rank 1, 2, 4, 6\. Give one of these, or make it: lorafit shrink"),
        (halved[0], 64, r"has adapters of rank 1, 2, 4, 6\. Give one of these\.$"),
        (inputs["model"], 2, r"is a model without an adapter"),
    ):
        with pytest.raises(ConfigError, match=rf"--r {r} is given, and .*{told}"):
            loss(target, Path(inputs["eval"]), r=r)


def test_layers_of_a_lower_rank_stay_as_they_are_until_it_is_their_turn_and_tied_ones_follow(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    more = {"rank_pattern": {"q_proj": 2}, "targets": "all-linear,embed_tokens", "epochs": 1}
    result, _ = run({**inputs, **more, "output": str(tmp_path / "run")})
    assert [one["r"] for one in result["by_rank"]] == [1, 2, 4, 6]
    for one in result["by_rank"]:
        assert loss(tmp_path / "run", Path(inputs["eval"]), r=one["r"]) == pytest.approx(one["loss"], rel=1e-5)


def test_lower_ranks_read_rows_as_the_run_did(inputs: dict[str, Any], tmp_path: Path) -> None:
    """By its template, and after the system message of its rows."""
    system = {"role": "system", "content": "Be short."}
    rows = [{"messages": [system, *tiny.chat_row(f"What is {n}?", f"{n * 7}")["messages"]]} for n in range(12)]
    data, out = tiny.write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    more = {"data": str(data), "eval": str(data), "epochs": 1, "template": "alpaca"}
    result, _ = run({**inputs, **more, "output": str(out)})
    for one in result["by_rank"][:-1]:
        assert loss(out, data, r=one["r"]) == pytest.approx(one["loss"], rel=1e-5)
        assert loss(out / "ranks" / f"r{one['r']}", data) == pytest.approx(one["loss"], rel=1e-5)
    assert [opening.find(str(out / place), None).system for place in ("", "ranks/r2")] == ["Be short."] * 2
    _, printed = shrunk({"run": str(out), "r": 2, "output": str(tmp_path / "small")})
    assert f"lorafit chat {tmp_path / 'small'} --system 'Be short.'" in printed


def test_what_rounding_the_base_changes_is_in_the_losses_of_a_smaller_adapter(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    out, small, held_out = tmp_path / "run", tmp_path / "small", Path(inputs["eval"])
    result, _ = run({**inputs, "base_storage": "int8", "epochs": 1, "output": str(out)})
    found, printed = shrunk({"run": str(out), "r": 2, "output": str(small), "data": str(held_out)})
    assert found["loss_before"] == pytest.approx(result["eval_loss"], rel=1e-5)
    assert found["loss_after"] == pytest.approx(result["by_rank"][1]["loss"], rel=1e-5)
    assert f"lorafit eval {small} TEST.jsonl --base-storage int8" in printed


def test_ranks_begin_at_the_largest_that_a_layer_has(inputs: dict[str, Any], tmp_path: Path) -> None:
    more = {"r": 16, "alpha": 24.0, "targets": "q_proj,v_proj", "rank_pattern": {"q_proj": 6, "v_proj": 5}}
    result, _ = run({**inputs, **more, "epochs": 1, "output": str(tmp_path / "run")})
    assert [one["r"] for one in result["by_rank"]] == [1, 2, 4, 6]


def test_a_run_that_was_never_evaluated_is_measured_with_its_lower_ranks(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    more = {"eval_every": 100, "schedule": "constant", "epochs": 1}
    result, printed = run({**inputs, **more, "output": str(tmp_path / "run")})
    assert result["eval_loss"] is None
    assert result["by_rank"][-1]["loss"] == pytest.approx(loss(tmp_path / "run", Path(inputs["eval"])), rel=1e-5)
    assert "held-out loss by rank:" in printed


@pytest.mark.parametrize("stop_at", ["after an early stop", "in the last step"])
def test_a_signal_before_lower_ranks_leaves_a_run_to_go_on_from(
    stop_at: str, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, module = (halving.truncate, halving) if stop_at == "after an early stop" else (loop.train_one_step, loop)
    more = {"eval_every": 1, "patience": 1, "lr": 0.5, "save_every": 100} if module is halving else {"epochs": 1}

    def interrupted(*given: Any) -> None:
        real(*given)
        if module is halving or given[0].progress.step == given[0].work.total_steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, real.__name__, interrupted)
    with pytest.raises(Interrupted, match="while the ranks below were trained; the run itself is saved"):
        run({**inputs, **more, "output": str(tmp_path / "run")})
    monkeypatch.undo()
    result, printed = run({**inputs, **more, "output": str(tmp_path / "run")}, resume=True)
    assert f"resuming after step {result['steps']}" in printed
    assert result["stopped_early"] == (module is halving) and len(result["by_rank"]) == 4


def test_what_a_killed_halving_left_half_written_is_removed(
    inputs: dict[str, Any], halved: Halved, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    shutil.copytree(halved[0], again)
    (again / "run.json").unlink()
    (again / "ranks" / "r4").rename(again / "ranks" / ".r4.x1y2z3")
    run({**inputs, "output": str(again)}, resume=True)
    assert sorted(path.name for path in (again / "ranks").iterdir()) == ["held_out.json", "r1", "r2", "r4"]


@pytest.mark.parametrize("more", [{"scaling_rule": "alpha/sqrt(r)"}, {"lr": "auto", "epochs": 12}])
def test_other_scalings_and_a_rate_that_is_found_serve_as_well_and_are_reported(
    more: dict[str, Any], inputs: dict[str, Any], tmp_path: Path
) -> None:
    result, _ = run({**inputs, **more, "output": str(tmp_path / "run")})
    assert bool(result.get("race")) == (more.get("lr") == "auto")
    assert [one["r"] for one in result["by_rank"]] == [1, 2, 4, 6]
    for one in result["by_rank"]:
        assert loss(tmp_path / "run", Path(inputs["eval"]), r=one["r"]) == pytest.approx(one["loss"], rel=1e-5)
    settings = json.loads((tmp_path / "run" / "ranks" / "r4" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["rank_pattern"] == settings["alpha_pattern"] == {}
    heard = io.StringIO()
    report(ReportConfig(directory=str(tmp_path / "run"), samples=0), Console(file=io.StringIO()), Console(file=heard))
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f"{one['loss']:.4f}" in told for one in result["by_rank"] for told in (heard.getvalue(), page))
    if race := result.get("race"):
        assert f"{race['lr']:g} went on" in heard.getvalue() and f"{race['lr']:g} went on" in page
        assert f"auto (measured: {race['lr']:g})" in page


def test_the_chain_goes_on_with_what_was_trained_where_what_was_halved_is_saved(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, worse = lorafit.run.row_scores, iter(range(1, 99))

    def scores(*given: Any) -> Any:
        nats, tokens, likeliest = real(*given)
        return next(worse) * np.ones_like(nats), tokens, likeliest

    monkeypatch.setattr(lorafit.run, "row_scores", scores)
    result, printed = run({**inputs, "epochs": 1, "output": str(tmp_path / "run")})
    four = next(one for one in result["by_rank"] if one["r"] == 4)
    assert not four["helped"] and f"as 1 step at {four['lr']:g} did not help" in printed

    for source, r, is_nearest in (("adapter", 4, True), ("ranks/r4", 2, False)):
        shrunk({"run": str(tmp_path / "run" / source), "r": r, "output": str(tmp_path / f"near{r}")})
        nearest, kept = arithmetic.read(tmp_path / f"near{r}"), arithmetic.read(tmp_path / "run" / "ranks" / f"r{r}")
        for name, part in kept.parts.items():
            own, other = (one.scaling * one.B @ one.A for one in (part.factors, nearest.parts[name].factors))
            assert torch.allclose(own, other, atol=1e-6) == is_nearest


def test_what_each_rank_loses_on_each_row_is_left(inputs: dict[str, Any], halved: Halved) -> None:
    path, result, _ = halved
    rows = RunDir(path).read_held_out()
    assert list(rows) == [1, 2, 4, 6]
    for one in result["by_rank"]:
        own = rows[one["r"]]
        assert len(own["nats"]) == len(Path(inputs["eval"]).read_text().splitlines())
        # Each a sum of some tens of float32 losses.
        assert sum(own["nats"]) / sum(own["tokens"]) == pytest.approx(one["loss"], rel=1e-6)
        assert all(0 <= likeliest <= tokens for likeliest, tokens in zip(own["likeliest"], own["tokens"], strict=True))


def test_a_loss_that_is_not_finite_is_none_and_never_the_best(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, number = lorafit.run.row_scores, iter(range(99))
    # After the epoch a number; of rank 4 as it was cut, but not after its steps; of 2 neither; of 1 not as it was cut.
    not_finite = {2, 3, 4, 5}

    def scores(*given: Any) -> Any:
        nats, tokens, likeliest = real(*given)
        if next(number) in not_finite:
            nats[0] = math.nan
        return nats, tokens, likeliest

    monkeypatch.setattr(lorafit.run, "row_scores", scores)
    result, printed = run({**inputs, "epochs": 1, "output": str(tmp_path / "run")})
    one, two, four = result["by_rank"][:3]
    assert not four["helped"] and math.isfinite(four["loss"])
    assert (two["helped"], two["loss"]) == (False, None) and one["helped"] and math.isfinite(one["loss"])
    assert "halved to rank 2: held-out loss not finite, as " in printed
    kept = RunDir(tmp_path / "run").read_held_out()
    assert kept[2]["nats"][0] is None and None not in kept[6]["nats"] + kept[4]["nats"]


def test_an_evaluation_of_the_run_itself_that_is_not_finite_ends_it_as_without_lower_ranks(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lorafit.run.row_scores

    def scores(*given: Any) -> Any:
        nats, *others = real(*given)
        return nats * math.inf, *others

    monkeypatch.setattr(lorafit.run, "row_scores", scores)
    with pytest.raises(NumericsError, match="the loss is inf, not a finite number"):
        run({**inputs, "epochs": 1, "output": str(tmp_path / "run")})
    assert not (tmp_path / "run" / "run.json").exists()


def test_without_held_out_rows_the_ranks_are_there_all_the_same(inputs: dict[str, Any], tmp_path: Path) -> None:
    result, printed = run({**inputs, "eval": None, "epochs": 1, "output": str(tmp_path / "run")})
    assert [one["loss"] for one in result["by_rank"]] == [None] * 4
    assert "no rows to measure them on" in printed and "did not help" not in printed
    assert [one["helped"] for one in result["by_rank"]] == [None] * 4
    _, printed = shrunk({"run": str(tmp_path / "run"), "r": 2, "output": str(tmp_path / "cut")})
    assert "rank 2, as it is in" in printed and "no held-out rows" in printed


def test_halving_is_refused_where_nothing_could_be_halved(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rank-schedule halving is given with --variant dora"):
        run({**inputs, "variant": "dora", "output": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_a_rank_that_cannot_be_trained_stays_as_it_was_cut(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, at = halving.fit, list[float]()

    def failing(work: Any, *others: Any) -> Any:
        at.append(work.config.lr)
        found = real(work, *others)
        if len(at) == 2:
            raise NumericsError("the loss was not finite")
        return found

    monkeypatch.setattr(halving, "fit", failing)
    result, printed = run({**inputs, "epochs": 1, "output": str(tmp_path / "run")})
    assert "rank 2 stays as it was cut: the loss was not finite" in printed
    assert len(at) == 3 and all(math.isfinite(one["loss"]) for one in result["by_rank"])
    shrunk({"run": str(tmp_path / "run" / "ranks" / "r4"), "r": 2, "output": str(tmp_path / "cut")})
    cut = loss(tmp_path / "cut", Path(inputs["eval"]))
    assert result["by_rank"][1]["loss"] == pytest.approx(cut, rel=1e-5)
