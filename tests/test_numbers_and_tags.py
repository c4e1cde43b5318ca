"""Runs whose head predicts a number for a text, or a tag for each word, from rows to an evaluation."""

from __future__ import annotations

import io
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lorafit.config import EvalConfig, TrainConfig
from lorafit.errors import DataError, LorafitError
from lorafit.infer.numbers import judge_numbers
from lorafit.infer.tags import counted, entities, is_bio
from lorafit.run import Start, train
from lorafit.use import evaluate, print_evaluation
from tests import tiny

USUAL: dict[str, Any] = {"r": 3, "alpha": 7.0, "batch_size": 4, "precision": "fp32", "threads": 1}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("heads")
    numbers = [
        {"text": f"{n} is {'low' if n % 2 else 'high'}", "label": 1990.5 if n % 2 else 2010.0} for n in range(24)
    ]
    scores = [{"text": row["text"], "score": row["label"], "who": "me"} for row in numbers]
    words = [["a", f"{10 + n}", f"{40 + n}", "of", f"B{n}"][n % 3 :] * (1 + n % 2) for n in range(24)]
    tags = {"a": "O", "o": "O", "1": "B-NUM", "2": "B-NUM", "3": "B-NUM", "B": "B-KEY"}
    tagged = [{"tokens": own, "tags": [tags.get(word[0], "I-NUM") for word in own]} for own in words]
    return {
        "bert": str(tiny.write_bert(directory / "bert")),
        "llama": str(tiny.write_model(directory / "llama")),
        "numbers": str(tiny.write_rows(directory / "numbers.jsonl", numbers)),
        "scores": str(tiny.write_rows(directory / "scores.jsonl", scores)),
        "tagged": str(tiny.write_rows(directory / "tagged.jsonl", tagged)),
        "labelled": str(tiny.write_labelled(directory / "labelled.jsonl", 12)),
    }


def run(settings: dict[str, Any], resume: bool = False) -> tuple[dict[str, Any], str]:
    heard = io.StringIO()
    console = Console(file=heard, width=1000)
    return train(TrainConfig(**{**USUAL, **settings}), {}, Start(resume, False, time.time()), console), heard.getvalue()


def measured(target: str, data: str, **more: Any) -> tuple[dict[str, Any], str]:
    found = evaluate(EvalConfig(target=target, data=data, threads=1, **more), Console(file=io.StringIO()))
    json.dumps(found)
    heard = io.StringIO()
    print_evaluation(found, Console(file=heard, width=200))
    return found, heard.getvalue()


@pytest.mark.parametrize(("model", "method"), [("bert", "lora"), ("llama", "lora"), ("bert", "head")])
def test_numbers_are_learned_in_their_own_units(
    model: str, method: str, places: dict[str, str], tmp_path: Path
) -> None:
    settings = {"model": places[model], "data": places["numbers"], "output": str(tmp_path / "run"), "method": method}
    settings |= {"epochs": 60, "lr": 0.05} if method == "head" else {"epochs": 12, "lr": 0.01}
    result, printed = run({**settings, "eval": "25%"})
    assert result["task"] == "regress"
    assert "numbers to be predicted: mean 2000, deviation 9.75" in printed
    assert "and a head of one number" in printed
    assert result["eval_mse"] > 0
    found, shown = measured(str(tmp_path / "run"), places["numbers"])
    assert found["r2"] > 0.9
    assert found["pearson"] > 0.95
    assert found["mae"] < 3
    assert found["mse"] == pytest.approx(found["loss"] * 9.75**2, rel=1e-5)  # 23 bits of a mantissa, squared
    assert found["accuracy"] is None
    assert found["samples"][0]["expected"] == "2010"
    assert f"{found['samples'][0]['got']}, is 2010" in shown


def test_a_score_beside_a_text_is_predicted_where_that_is_asked_for(places: dict[str, str], tmp_path: Path) -> None:
    settings = {"model": places["llama"], "data": places["scores"], "max_steps": 1}
    assert run({**settings, "output": str(tmp_path / "text")})[0]["task"] == "generate"
    result, printed = run({**settings, "output": str(tmp_path / "run"), "task": "regress"})
    assert result["task"] == "regress"
    assert "column 'who' of 24 rows is not read" in printed
    assert measured(str(tmp_path / "run"), places["scores"])[0]["rows"] == 24
    assert measured(str(tmp_path / "run"), places["numbers"])[0]["rows"] == 24


def test_whole_numbers_are_labels_until_it_is_said_that_they_are_numbers(
    places: dict[str, str], tmp_path: Path
) -> None:
    rows = [{"text": f"{n} stars", "label": n % 5} for n in range(10)]
    settings = {"model": places["bert"], "data": str(tiny.write_rows(tmp_path / "r.jsonl", rows)), "max_steps": 1}
    assert run({**settings, "output": str(tmp_path / "labels")})[0]["task"] == "classify"
    result = run({**settings, "output": str(tmp_path / "numbers"), "task": "regress"})[0]
    assert (result["mean"], result["deviation"]) == (2.0, pytest.approx(2**0.5))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "has no number"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": 0.5}], "none of which differs"),
        ([{"text": "a", "label": [0.5]}], "label is a number, not a string"),
    ],
)
def test_rows_without_numbers_to_learn_are_refused(
    rows: list[Any], said: str, places: dict[str, str], tmp_path: Path
) -> None:
    data = str(tiny.write_rows(tmp_path / "r.jsonl", rows))
    settings = {"model": places["bert"], "data": data, "output": str(tmp_path / "run"), "task": "regress"}
    with pytest.raises(DataError, match=said):
        run(settings)


def test_what_is_measured_of_numbers_is_what_others_measure() -> None:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    chance = np.random.default_rng(1)
    expected = chance.integers(0, 6, 50).astype(np.float64)  # with ties
    got = expected + chance.standard_normal(50).round(1)
    found = judge_numbers(got, expected, 0.5, 0.0)
    assert found.mse == pytest.approx(mean_squared_error(expected, got))
    assert found.mae == pytest.approx(mean_absolute_error(expected, got))
    assert found.r2 == pytest.approx(r2_score(expected, got))
    assert found.pearson == pytest.approx(pearsonr(expected, got)[0])
    assert found.spearman == pytest.approx(spearmanr(expected, got)[0])
    alike = judge_numbers(got, np.ones(50), 0.5, 0.0)
    assert alike.r2 is None and alike.pearson is None and "r2" not in alike.summary


@pytest.mark.parametrize(
    ("model", "method"), [("bert", "lora"), ("llama", "lora"), ("bert", "head"), ("llama", "head")]
)
def test_words_are_tagged_at_their_first_token(model: str, method: str, places: dict[str, str], tmp_path: Path) -> None:
    settings = {"model": places[model], "data": places["tagged"], "output": str(tmp_path / "run"), "method": method}
    settings |= {"epochs": 30, "lr": 0.05} if method == "head" else {"epochs": 12, "lr": 0.01}
    result, printed = run({**settings, "eval": "25%"})
    words = sum(len(json.loads(line)["tags"]) for line in Path(places["tagged"]).read_text().splitlines())
    assert result["task"] == "tag"
    assert sum(result["label_counts"].values()) == words
    assert "4 tags: O" in printed
    assert "with a tag" in printed
    found, shown = measured(str(tmp_path / "run"), places["tagged"])
    # A decoder has not read the rest of a word where its tag is read: "a" and "12" differ in their first byte.
    assert min(found["accuracy"], found["macro_f1"], found["entity_f1"]) > (
        0.85 if model == "llama" and method == "head" else 0.95
    )
    assert [one["label"] for one in found["entities"]] == ["KEY", "NUM"]
    assert found["rows"] == words
    assert "entity F1" in shown
    rows = [sample["prompt"] for sample in found["samples"]]
    assert len(rows) == len(set(rows))


def test_a_run_of_tags_or_numbers_goes_on_where_it_was_bitwise(places: dict[str, str], tmp_path: Path) -> None:
    for data, method in (("tagged", "head"), ("tagged", "lora"), ("numbers", "lora")):
        whole, parts = (tmp_path / f"{data} {method} {name}" for name in ("whole", "parts"))
        settings = {"model": places["bert"], "data": places[data], "method": method, "epochs": 2, "save_every": 3}
        run({**settings, "output": str(whole)})
        run({**settings, "output": str(parts)})
        (parts / "run.json").unlink()
        for checkpoint in sorted((parts / "checkpoints").iterdir())[1:]:
            for part in checkpoint.iterdir():
                part.unlink()
            checkpoint.rmdir()
        assert "resuming after step" in run({**settings, "output": str(parts)}, resume=True)[1]
        file = "adapter/method.safetensors"
        assert (whole / file).read_bytes() == (parts / file).read_bytes()


def test_features_of_words_kept_train_the_head_that_those_computed_each_time_train(
    places: dict[str, str], tmp_path: Path
) -> None:
    losses = []
    for cache in ("1GiB", "0MiB"):
        settings = {"model": places["bert"], "data": places["tagged"], "output": str(tmp_path / cache)}
        settings |= {"method": "head", "epochs": 3, "feature_cache": cache, "eval": "25%"}
        losses.append(run(settings)[0]["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_tagged_row_that_is_too_long_loses_words_at_its_end(places: dict[str, str], tmp_path: Path) -> None:
    settings = {"model": places["bert"], "data": places["tagged"], "output": str(tmp_path / "run"), "seq_len": 8}
    result, printed = run({**settings, "max_steps": 1})
    assert "(longest 8)" in printed and "cut" in printed
    assert sum(result["label_counts"].values()) < 84


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pooling": "mean"}, "a tag is read at its own word"),
        ({"method": "prompt", "model": "llama"}, "in front of a row"),
        ({"data": "labelled", "task": "tag"}, "has no tags"),
        ({"task": "classify"}, "has no label"),
        ({"task": "generate", "model": "llama"}, "read for a model that writes text"),
    ],
)
def test_what_does_not_go_together_is_said(
    changed: dict[str, Any], said: str, places: dict[str, str], tmp_path: Path
) -> None:
    settings = {"model": "bert", "data": "tagged", "output": str(tmp_path / "run"), **changed}
    settings |= {"model": places[settings["model"]], "data": places[settings["data"]]}
    with pytest.raises(LorafitError, match=said):
        run(settings)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-P I-P O B-L", {("P", 0, 2), ("L", 3, 4)}),
        ("B-P B-P I-P", {("P", 0, 1), ("P", 1, 3)}),
        ("I-P I-P O I-L", {("P", 0, 2), ("L", 3, 4)}),
        ("B-P I-L I-L", {("P", 0, 1), ("L", 1, 3)}),
        ("O O", set()),
    ],
)
def test_entities_are_runs_of_tags(tags: str, expected: set[Any]) -> None:
    assert entities(tags.split()) == expected


def test_tags_that_are_no_bio_have_no_entities() -> None:
    assert is_bio(["O", "B-X", "I-X-Y"])
    assert not is_bio(["NOUN", "VERB"]) and not is_bio(["O"])


def test_right_entities_are_counted_whole() -> None:
    chance = random.Random(2)
    names = ["O", "B-X", "I-X", "B-Y", "I-Y"]
    rows = [[[chance.choice(names) for _ in range(9)] for _ in range(20)] for _ in range(2)]
    found = counted(*rows)
    for kind, (right, there, given) in found.items():
        pairs = list(zip(*rows, strict=True))
        assert right == sum(e[0] == kind and e in entities(b) for a, b in pairs for e in entities(a))
        assert (there, given) == tuple(sum(e[0] == kind for row in side for e in entities(row)) for side in rows)
