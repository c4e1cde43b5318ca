"""Whole comparisons on rows with text and label: real runs of tiny models in processes of their own."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorafit.compare.line import compare
from lorafit.config import CompareConfig, EvalConfig
from lorafit.errors import LorafitError
from lorafit.trials.rows import split_in_three
from lorafit.use import evaluate
from tests import tiny

SETTINGS: dict[str, Any] = {"seeds": 1, "rate_trials": 1, "r": 3, "batch_size": 4, "threads": 1, "precision": "fp32",
            "max_steps": 6}  # fmt: skip


def compared(output: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    heard = io.StringIO()
    quiet = Console(file=io.StringIO())
    found = compare(
        CompareConfig(**{**SETTINGS, "output": str(output), **settings}), False, quiet, Console(file=heard, width=200)
    )
    return found, heard.getvalue()


def measured(target: Path, data: str) -> dict[str, Any]:
    settings = {"target": str(target), "data": data, "precision": "fp32", "threads": 1}
    return evaluate(EvalConfig(**settings), Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("rows")
    names = ("odd", "even", "even")
    return {
        "data": str(tiny.write_labelled(directory / "train.jsonl", 30, names)),
        "eval": str(tiny.write_labelled(directory / "test.jsonl", 12, names)),
        "new": str(tiny.write_labelled(directory / "new.jsonl", 12, ("odd", "even", "prime"))),
    }


def test_an_encoders_methods_are_compared_by_the_labels_they_tell(rows: dict[str, str], tmp_path: Path) -> None:
    model = str(tiny.write_bert(tmp_path / "bert"))
    found, shown = compared(
        tmp_path / "c", model=model, data=rows["data"], eval=rows["eval"], methods=["head", "lora", "prefix"]
    )
    assert (found["metric"], found["unit"]) == ("accuracy", "nats a row")
    by_name = {method["name"]: method for method in found["methods"]}
    for name in ("head", "lora"):
        own = measured(tmp_path / "c" / by_name[name]["runs"][0], rows["eval"])
        quality = by_name[name]["quality"]
        assert quality["accuracy"]["value"] == pytest.approx(own["accuracy"])
        assert quality["loss"]["value"] == pytest.approx(own["loss"], rel=1e-5)
        assert by_name[name]["macro_f1"] == pytest.approx(own["macro_f1"])
        assert by_name[name]["latency_s"]["row"] > 0
        assert by_name[name]["forgetting"] is None
    assert by_name["prefix"]["status"] == "failed"
    floor = found["floors"]["most_frequent"]["quality"]
    assert floor["accuracy"]["value"] == pytest.approx(8 / 12)
    # Of the training rows after the split as many of each label: 2 of 3 are even.
    assert floor["loss"]["value"] == pytest.approx(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 3, abs=0.05)
    for line in ("most frequent", "an encoder writes no text", "one row"):
        assert line in shown
    assert "most frequent" in (tmp_path / "c" / "report.html").read_text()


def test_of_a_decoder_what_it_forgets_and_what_it_says_to_examples_is_measured_too(
    rows: dict[str, str], tmp_path: Path
) -> None:
    model = str(tiny.write_model(tmp_path / "llama"))
    keep = tmp_path / "keep.txt"
    keep.write_text("What was known before, in a few words. " * 5)
    found, shown = compared(
        tmp_path / "c", model=model, data=rows["data"], eval=rows["eval"], keep=str(keep), methods=["head", "full"],
        shots=1,
    )  # fmt: skip
    head, full = found["methods"]
    assert head["forgetting"] is None and "head: forgetting is not measured" in shown
    assert math.isfinite(full["forgetting"]) and full["forgetting"] != 0
    base = measured(tmp_path / "llama", str(keep))["loss"]
    assert full["keep_loss"] - full["forgetting"] == pytest.approx(base, rel=1e-5)
    few_shot = found["floors"]["few_shot"]
    assert few_shot["shots"] == 1
    # Its loss is that of a whole label: of several bytes, each of about log 258 nats to a model that knows nothing.
    assert few_shot["quality"]["loss"]["value"] > math.log(258)


def test_a_label_that_no_training_row_has_is_refused_or_learned(rows: dict[str, str], tmp_path: Path) -> None:
    model = str(tiny.write_bert(tmp_path / "bert"))
    with pytest.raises(LorafitError, match="'prime', which is none of the 2"):
        compared(tmp_path / "c", model=model, data=rows["data"], eval=rows["new"], methods=["head"])
    once = [{"text": f"{n} is one", "label": f"{n}"} for n in range(10)]
    often = [{"text": f"so is 0, the {n}th time", "label": "0"} for n in range(20)]
    data = str(tiny.write_rows(tmp_path / "once.jsonl", once + often))
    found = split_in_three(CompareConfig(model=model, data=data, output="unused", eval="20%"), tmp_path / "rows")
    train = Path(found.path("train")).read_text()
    assert all(f'"label": "{n}"' in train for n in range(10)) and found.counts["test"] > 0


def test_whole_numbers_are_predicted_where_that_is_the_task(tmp_path: Path) -> None:
    def write(name: str, first: int, count: int) -> str:
        own = [{"text": f"number {n}", "label": n % 7} for n in range(first, first + count)]
        return str(tiny.write_rows(tmp_path / name, own))

    model, data, test = (
        str(tiny.write_bert(tmp_path / "bert")),
        write("train.jsonl", 0, 30),
        write("test.jsonl", 30, 12),
    )
    found, _ = compared(tmp_path / "c", model=model, data=data, eval=test, methods=["head", "ia3"], task="regress")
    assert found["unit"] == "squared deviations a row" and set(found["floors"]) == {"mean"}
    for method in found["methods"]:
        run = json.loads((tmp_path / "c" / method["runs"][0] / "run.json").read_text())
        assert run["task"] == "regress" and method["quality"]["loss"]["value"] is not None
