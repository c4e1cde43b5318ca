"""--lr auto: which rate wins, what the others cost, and that the run is the one that is given that rate."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorafit.config import RATES, TrainConfig
from lorafit.errors import ConfigError, Interrupted, RunDirError
from lorafit.run import Start, train
from lorafit.train import loop, race
from lorafit.train.race import FACTORS, SHARE
from tests import tiny

RATES_OF_RACE = [float(f"{factor * RATES['lora']:.2g}") for factor in FACTORS]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("inputs")
    return {
        "llama": str(tiny.write_model(directory / "llama")),
        "bert": str(tiny.write_bert(directory / "bert")),
        "chat": str(tiny.write_chat(directory / "chat.jsonl", 40)),
        "labelled": str(tiny.write_labelled(directory / "labelled.jsonl", 40)),
    }


def run(places: dict[str, str], output: Path, resume: bool = False, **given: Any) -> tuple[dict[str, Any], str]:
    """What it comes to, in steps of 4 short rows, and what is said meanwhile."""
    settings = {"model": places["llama"], "data": places["chat"], "output": str(output), "r": 3, "alpha": 7.0}
    settings |= {"batch_size": 4, "epochs": 6, "precision": "fp32", "threads": 1, "lr": "auto", **given}
    heard = io.StringIO()
    result = train(TrainConfig(**settings), {}, Start(resume, False, time.time()), Console(file=heard, width=1000))
    return result, heard.getvalue()


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"eval": "25%", "epochs": 8},
    "dropout": {"dropout": 0.2, "precision": "bf16"},
    "pissa": {"init": "pissa"},
    "dora": {"variant": "dora"},
    "adalora": {"rank_schedule": "adalora"},
    "adapter": {"method": "adapter", "bottleneck": 5},
    "prefix": {"method": "prefix", "variant": "reparametrised", "virtual_tokens": 3},
    "full": {"method": "full"},
    "last block": {"method": "full", "layers": "last:1", "lora_plus": 3.0},
    "labels": {"model": "bert", "data": "labelled"},
    "head": {"model": "bert", "data": "labelled", "method": "head"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_after_it_is_bitwise_the_one_that_is_given_that_rate(
    kind: str, places: dict[str, str], tmp_path: Path
) -> None:
    own = {name: places.get(str(value), value) for name, value in KINDS[kind].items()}
    found, printed = run(places, tmp_path / "found", **own)
    assert found["race"]["lr"] == found["settings"]["lr"]
    first, steps = found["race"]["rates"][0], len(found["race"]["losses"][0])
    told = f"learning rate {found['race']['lr']:g}: after {steps} steps, on the rows to come, {first:g} loses "
    assert told in printed
    given, _ = run(places, tmp_path / "given", **own, lr=found["settings"]["lr"])
    assert "race" not in given
    files = sorted(
        path.relative_to(tmp_path / "given") for path in (tmp_path / "given" / "adapter").glob("*.safetensors")
    )
    assert files
    for name in files:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()
    for fact in ("flop", "train_loss", "eval_loss", "steps", "tokens_seen", "tokens_computed"):
        assert found.get(fact) == given.get(fact)
    assert losses(tmp_path / "found") == losses(tmp_path / "given")
    assert not list((tmp_path / "found").glob(".scratch/*"))


def losses(run: Path) -> list[tuple[str, int, float]]:
    """Every line of a run's log."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


@pytest.mark.parametrize("best", [0, 1])
def test_the_rate_that_loses_least_goes_on_and_the_others_are_what_it_costs(
    best: int, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two rates one of which hardly moves anything, whichever runs first."""
    monkeypatch.setattr(race, "FACTORS", [(1.0, 1e-6), (1e-6, 1.0)][best])
    result, _ = run(places, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["race"]
    assert kept == result["race"]
    assert kept["lr"] == RATES["lora"] == kept["rates"][best] == result["settings"]["lr"]
    assert [len(own) for own in kept["losses"]] == [5, 5]
    assert kept["losses"][0][0] == kept["losses"][1][0], "the first step's rows are the same, and nothing has moved yet"
    assert kept["share"] == pytest.approx((5 + 2 / 3) / 60) and kept["share"] < SHARE
    assert 'lr = "auto"' in (tmp_path / "run" / "run.toml").read_text()
    trained = [line[2] for line in losses(tmp_path / "run") if line[0] == "step"]
    assert trained[:5] == kept["losses"][best]
    # What they are judged by is what the winner then trains on; a mean of some tens of float32 losses.
    assert trained[5] == pytest.approx(kept["ahead"][best], rel=1e-6)
    assert kept["ahead"][best] < kept["ahead"][1 - best]


def test_a_rate_whose_loss_is_no_number_is_out(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "FACTORS", (1.0, 1e30))
    result, printed = run(places, tmp_path / "run")
    assert result["race"]["lr"] == RATES["lora"]
    assert len(result["race"]["losses"][1]) < 5 and result["race"]["ahead"][1] is None
    assert "2e+27 failed" in printed
    assert "in the race of rates: step" in printed
    assert result["skipped_steps"] == []


def test_where_no_rate_comes_to_the_end_the_usual_one_trains_from_the_beginning(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(race, "FACTORS", (1e30, 1e31))
    result, printed = run(places, tmp_path / "run")
    assert "learning rate 0.002, the usual one: no rate came to the end of the race" in printed
    assert result["race"] is None
    given, _ = run(places, tmp_path / "given", lr=RATES["lora"])
    assert (result["train_loss"], result["flop"]) == (given["train_loss"], given["flop"])


def test_a_resumed_run_keeps_what_was_found(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = run(places, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()  # as if it had been killed after its last step
    shutil.rmtree(tmp_path / "run" / "adapter")
    monkeypatch.setattr(race, "run", None)
    again, printed = run(places, tmp_path / "run", resume=True)
    assert (again["race"], again["settings"]["lr"]) == (first["race"], first["settings"]["lr"])
    assert "resuming after step 60" in printed


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"epochs": 5}, "50 steps, 10 an epoch, leave 4 for a race, which takes 5"),
        (
            {"eval": "25%", "eval_every": 2, "epochs": 8},
            "64 steps, evaluated after 2, leave 1 for a race",
        ),
        ({"batch_size": 20, "epochs": 29}, "58 steps, 2 an epoch, leave 1 for a race, which takes 5"),
    ],
)
def test_a_run_that_is_too_short_has_the_usual_rate_and_says_so(
    given: dict[str, Any], why: str, places: dict[str, str], tmp_path: Path
) -> None:
    result, printed = run(places, tmp_path / "run", **given)
    assert result["settings"]["lr"] == RATES["lora"]
    assert result["race"] is None
    assert f"learning rate 0.002, the usual one: {why}" in printed


def test_a_race_that_is_interrupted_says_so_and_leaves_nothing(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = race.train_one_step, iter(range(99))

    def interrupted(*given: Any) -> None:
        real(*given)
        if next(steps) == 6:  # the second rate's second
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(race, "train_one_step", interrupted)
    with pytest.raises(Interrupted, match="in the race of learning rates, of which nothing is kept") as stopped:
        run(places, tmp_path / "run")
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert next(steps) == 7 and not (tmp_path / "run").exists()


def test_a_disk_that_is_full_is_said_to_be(places: dict[str, str], tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        with pytest.raises(RunDirError, match=r"before_the_race.*the file would exceed the size limit"):
            run(places, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_rows_to_come_that_have_no_loss_are_passed_over(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = race.micro_batches, list[int]()

    def unsupervised(encoded: Any, rows: Any, *more: Any) -> Any:
        asked.append(len(rows))
        batches = real(encoded, rows, *more)
        silent = [replace(batch, supervised_tokens=0) for batch in batches]
        return silent if len(rows) < 12 else batches

    monkeypatch.setattr(race, "micro_batches", unsupervised)
    result, _ = run(places, tmp_path / "run")
    assert asked == [4, 8, 12] * 2 and None not in result["race"]["ahead"]


def test_a_head_beside_something_else_keeps_its_own_rate(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[float]] = []
    plain = loop.set_rate

    def recorded(optimizer: torch.optim.Optimizer, lr: float) -> None:
        plain(optimizer, lr)
        part = optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]
        seen.append({round(own / RATES["head"], 6) for own in part})

    monkeypatch.setattr(loop, "set_rate", recorded)
    run(places, tmp_path / "run", model=places["bert"], data=places["labelled"], schedule="constant", warmup=0.0)
    assert len(seen) == 60 + 5
    assert all(1.0 in rates and len(rates) == 2 for rates in seen)


@pytest.mark.parametrize("epochs", [6, 9])
def test_what_the_losers_took_is_less_than_its_share_of_the_run(
    epochs: int, places: dict[str, str], tmp_path: Path
) -> None:
    result, _ = run(places, tmp_path / "run", epochs=epochs)
    steps = [len(own) for own in result["race"]["losses"]]
    # Steps of all but one, and for each rate a pass forward over one step's rows, a third of a step.
    assert (sum(steps) - steps[0] + len(steps) / 3) / (10 * epochs) == pytest.approx(result["race"]["share"])
    assert 0.05 < result["race"]["share"] < SHARE
    assert result["race"]["rates"] == RATES_OF_RACE


@pytest.mark.parametrize("given", ["fast", "0", "-1e-3", "nan"])
def test_other_words_and_numbers_are_refused(given: str, places: dict[str, str], tmp_path: Path) -> None:
    from lorafit.config import build

    settings = {"model": places["llama"], "data": places["chat"], "output": str(tmp_path / "run"), "lr": given}
    with pytest.raises(ConfigError, match=r"--lr: .* or .auto., got"):
        build(TrainConfig, {}, settings)
