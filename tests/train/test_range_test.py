"""--lr auto: what it finds, what it costs, and that the run goes on as if it had not been looked for."""

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

from lorafit.config import RATES, TrainConfig
from lorafit.errors import ConfigError
from lorafit.run import Start, train
from lorafit.train import range_test
from lorafit.train.range_test import ABOVE, RATIO, SHARE, STEPS, TOO_HIGH, RangeTest, too_high
from tests import tiny

RATES_TRIED = [1e-4 * RATIO**step for step in range(STEPS)]


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
    settings |= {"batch_size": 4, "epochs": 2, "precision": "fp32", "threads": 1, "lr": "auto", **given}
    heard = io.StringIO()
    result = train(TrainConfig(**settings), {}, Start(resume, False, time.time()), Console(file=heard, width=1000))
    return result, heard.getvalue()


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"eval": "25%"},
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
    kind: str, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_test, "SHARE", math.inf)  # so that a short run has one too
    own = {name: places.get(str(value), value) for name, value in KINDS[kind].items()}
    found, printed = run(places, tmp_path / "found", **own)
    assert found["range_test"]["lr"] == found["settings"]["lr"]
    assert f"learning rate {found['settings']['lr']:g}, by a range test" in printed
    given, _ = run(places, tmp_path / "given", **own, lr=found["settings"]["lr"])
    assert "range_test" not in given
    files = sorted(
        path.relative_to(tmp_path / "given") for path in (tmp_path / "given" / "adapter").glob("*.safetensors")
    )
    assert files
    for name in files:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()
    assert (found["flop"], found["train_loss"]) == (given["flop"], given["train_loss"])
    assert not list((tmp_path / "found").glob(".scratch/*"))


def test_it_computes_less_than_its_share_and_is_kept_with_the_run(places: dict[str, str], tmp_path: Path) -> None:
    result, _ = run(places, tmp_path / "run", epochs=30)
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["range_test"]
    assert kept == result["range_test"]
    assert 0 < kept["share"] <= SHARE
    assert kept["rates"][0] == pytest.approx(RATES["lora"] / 16)
    assert len(kept["losses"]) <= len(kept["rates"]) == STEPS
    # It is told in two digits, of which the last is off by half at most: a twentieth of 10.
    assert kept["lr"] == pytest.approx(too_high(kept["rates"], kept["losses"], kept["untrained"]) / TOO_HIGH, rel=0.05)
    assert 'lr = "auto"' in (tmp_path / "run" / "run.toml").read_text()


def test_a_resumed_run_keeps_what_was_found(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_test, "SHARE", math.inf)
    first, _ = run(places, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()  # as if it had been killed after its last step
    shutil.rmtree(tmp_path / "run" / "adapter")
    monkeypatch.setattr(range_test, "find", None)
    again, printed = run(places, tmp_path / "run", resume=True)
    assert (again["range_test"], again["settings"]["lr"]) == (first["range_test"], first["settings"]["lr"])
    assert "resuming after step 20" in printed


def test_a_run_that_is_too_short_has_the_usual_rate_and_says_so(places: dict[str, str], tmp_path: Path) -> None:
    result, printed = run(places, tmp_path / "run", epochs=1)
    assert result["settings"]["lr"] == RATES["lora"]
    assert result["range_test"] is None
    assert "learning rate 0.002, the usual one: 10 steps are too few to test others" in printed


def test_a_head_beside_something_else_keeps_its_own_rate(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[float]] = []

    def recorded(optimizer: torch.optim.Optimizer, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        seen.append({round(group["lr"] / RATES["head"], 6) for group in optimizer.param_groups})

    monkeypatch.setattr(range_test, "set_rate", recorded)
    monkeypatch.setattr(range_test, "SHARE", math.inf)
    run(places, tmp_path / "run", model=places["bert"], data=places["labelled"])
    assert len(seen) > 3
    assert all(1.0 in rates and len(rates) == 2 for rates in seen)


@pytest.mark.parametrize("way", [0.0, 0.25, 1.0])
def test_the_rate_that_is_too_high_lies_between_two_that_were_tried(way: float) -> None:
    """On a line that is straight over both logarithms: the loss is ABOVE times that of before at a share of the way."""
    untrained, slope = 3.0, 2.0
    losses = [untrained * 0.3] * 4 + [untrained * ABOVE * math.exp(slope * (at - way)) for at in (0, 1)]
    if way == 0.0:  # the first of the two is not below it
        assert too_high(RATES_TRIED, losses, untrained) == pytest.approx(RATES_TRIED[4])
    else:
        assert too_high(RATES_TRIED, losses, untrained) == pytest.approx(RATES_TRIED[4] * RATIO**way)


@pytest.mark.parametrize(
    ("losses", "step"), [([2.0, 1.0, 1.5], 2), ([2.0, math.inf], 1), ([2.0, math.nan], 1), ([9.0], 0)]
)
def test_what_diverges_or_never_comes_back_ends_at_the_last_rate(losses: list[float], step: int) -> None:
    assert too_high(RATES_TRIED, losses, 3.0) == RATES_TRIED[step]


def test_a_loss_that_is_no_number_is_written_as_null() -> None:
    found = RangeTest(1e-3, RATES_TRIED[:3], [2.0, math.nan, math.inf], 3.0, 1, 0.05, 1.0)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["losses"] == [2.0, None, None]
    assert "0.001, by a range test of 3 steps" in found.told


def test_a_model_that_loses_nothing_has_every_rate_too_high() -> None:
    assert too_high(RATES_TRIED, [0.5], 0.0) == RATES_TRIED[0]


def test_a_loss_may_have_been_nothing_before_it_came_back() -> None:
    assert RATES_TRIED[0] < too_high(RATES_TRIED, [0.0, 9.0], 3.0) <= RATES_TRIED[1]


@pytest.mark.parametrize("given", ["fast", "0", "-1e-3", "nan"])
def test_other_words_and_numbers_are_refused(given: str, places: dict[str, str], tmp_path: Path) -> None:
    from lorafit.config import build

    settings = {"model": places["llama"], "data": places["chat"], "output": str(tmp_path / "run"), "lr": given}
    with pytest.raises(ConfigError, match="--lr"):
        build(TrainConfig, {}, settings)
