"""Merged runs with a head of labels, read by transformers alone as their cards say."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from lorafit.config import EvalConfig, MergeConfig, TrainConfig
from lorafit.data.load import locate
from lorafit.errors import LorafitError
from lorafit.export.merge import tolerance
from lorafit.infer.label_rows import encode_labelled
from lorafit.infer.labels import scores_of
from lorafit.methods.labels import Pooled, engine_of
from lorafit.opening import open_target
from lorafit.run import Start, train
from lorafit.ship import merge
from tests import tiny

USUAL: dict[str, Any] = {
    "r": 3,
    "alpha": 7.0,
    "batch_size": 4,
    "precision": "fp32",
    "threads": 1,
    "max_steps": 4,
    "lr": 0.02,
}
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("classifiers")
    sets = [{"text": f"{n} is{'!' * n}", "labels": [["a"], [], ["a", "b"]][n % 3]} for n in range(12)]
    tagged = [{"tokens": ["a", f"{n}", "b" * (n + 1)], "tags": ["x", f"{n % 2}", "x"]} for n in range(12)]
    numbers = [{"text": f"{n} is{'!' * n}", "label": n + 0.5} for n in range(12)]
    return {
        "bert": str(tiny.write_bert(directory / "bert")),
        "llama": str(tiny.write_model(directory / "llama")),
        "labels": str(tiny.write_labelled(directory / "labels.jsonl", 12)),
        "sets": str(tiny.write_rows(directory / "sets.jsonl", sets)),
        "tags": str(tiny.write_rows(directory / "tags.jsonl", tagged)),
        "numbers": str(tiny.write_rows(directory / "numbers.jsonl", numbers)),
    }


def run(settings: dict[str, Any]) -> None:
    train(TrainConfig(**{**USUAL, **settings}), {}, Start(False, False, time.time()), QUIET)


def own_scores(target: str, data: str) -> tuple[torch.Tensor, float]:
    """As lorafit eval sees them, and what rounding may add."""
    opened = open_target(target, None, 1.0, "fp32", False, QUIET, labelled=True)
    assert opened.labels is not None
    config = EvalConfig(target=target, data=data)
    rows = locate(data).train().rows()
    encoded = encode_labelled(rows, opened.tokenizer, opened.labels, config, isinstance(opened.model, Pooled))
    engine = engine_of(opened.model, share_prefix=True)
    found = scores_of(engine, encoded.set.encoded, 1000, lambda count: None)[0]
    engine.close()
    return found, tolerance(opened.model)


def texts_of(data: str) -> list[str]:
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    return [row.get("text") or " ".join(row["tokens"]) for row in rows]


def as_the_card_says(directory: Path, data: str) -> tuple[dict[str, Any], str]:
    """What the code in the card leaves, and prints, for all texts of the rows at once."""
    (code,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.S)
    code = code.replace('["A text."]', repr(texts_of(data)))
    left: dict[str, Any] = {}
    heard = io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(heard):
        exec(code, left)
    return left, heard.getvalue()


CASES: dict[str, dict[str, Any]] = {
    "LlamaForSequenceClassification": {"model": "llama", "data": "labels"},
    "LlamaForSequenceClassification of sets": {"model": "llama", "data": "sets", "method": "ia3"},
    "LlamaForTokenClassification": {"model": "llama", "data": "tags"},
    "BertForTokenClassification": {"model": "bert", "data": "tags", "method": "full"},
    "apart: mean": {"model": "bert", "data": "labels"},
    "apart: number": {"model": "bert", "data": "numbers"},
    "apart: number at last": {"model": "llama", "data": "numbers"},
    "apart: layer": {"model": "llama", "data": "labels", "method": "head", "layer": 1},
    "apart: cls": {"model": "bert", "data": "sets", "pooling": "cls"},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_merged_tells_the_same_without_lorafit(case: str, places: dict[str, str], tmp_path: Path) -> None:
    settings = CASES[case]
    data = places[settings["data"]]
    run({**settings, "model": places[settings["model"]], "data": data, "output": str(tmp_path / "run")})
    expected, rounding = own_scores(str(tmp_path / "run"), data)
    found = merge(MergeConfig(run=str(tmp_path / "run"), output=str(tmp_path / "merged")), QUIET)
    assert found["form"] == (None if case.startswith("apart") else case.split()[0])
    left, printed = as_the_card_says(tmp_path / "merged", data)
    got = left["scores"]
    if settings["data"] == "tags":  # a byte a token: a word's first token is its first character
        words = [json.loads(line)["tokens"] for line in Path(data).read_text().splitlines()]
        shift = int(settings["model"] == "bert")  # [CLS]
        starts = [[shift + len(" ".join([*own[:n], ""])) for n in range(len(own))] for own in words]
        got = torch.cat([got[row, own] for row, own in enumerate(starts)])
    assert float((expected - got).norm() / expected.norm()) <= rounding
    if settings["data"] == "labels":
        names = ["even", "odd"]
        assert printed.strip() == str([names[k] for k in expected.argmax(1).tolist()])
    if settings["data"] == "numbers":
        mean, deviation = left["told"]["mean"], left["told"]["deviation"]
        shown = torch.tensor(json.loads(printed))
        assert torch.allclose(shown, mean + deviation * expected[:, 0], rtol=1e-4)


def test_a_merged_classifier_names_its_labels_and_does_not_pad_with_what_ends_a_row(
    places: dict[str, str], tmp_path: Path
) -> None:
    run({"model": places["llama"], "data": places["labels"], "output": str(tmp_path / "run")})
    merge(MergeConfig(run=str(tmp_path / "run"), output=str(tmp_path / "merged"), dtype="bf16"), QUIET)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.id2label == {0: "even", 1: "odd"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id == config.pad_token_id
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": "x.jsonl"}, "--data is given"),
        ({"stream": True}, "--stream is given"),
        ({"into": "same"}, "--into is"),
    ],
)
def test_settings_of_text_are_refused(
    changed: dict[str, Any], said: str, places: dict[str, str], tmp_path: Path
) -> None:
    run({"model": places["bert"], "data": places["labels"], "output": str(tmp_path / "run"), "method": "head"})
    with pytest.raises(LorafitError, match=said):
        merge(MergeConfig(run=str(tmp_path / "run"), output=str(tmp_path / "m"), **changed), QUIET)


def test_a_method_that_cannot_be_merged_says_so_and_writes_nothing(places: dict[str, str], tmp_path: Path) -> None:
    for method in ("adapter", "prompt"):
        output = str(tmp_path / method)
        run({"model": places["llama"], "data": places["labels"], "output": output, "method": method})
        with pytest.raises(LorafitError, match=r"no weight of the base|virtual tokens"):
            merge(MergeConfig(run=output, output=str(tmp_path / "merged")), QUIET)
        assert not (tmp_path / "merged").exists()
