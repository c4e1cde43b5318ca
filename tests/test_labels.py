"""Runs on rows with text and label, from rows to an evaluation."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lorafit.config import (
    RATES,
    ChatConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    TrainConfig,
    build,
    read_toml,
    usual_rate,
)
from lorafit.errors import ConfigError, DataError, LorafitError
from lorafit.planning import plan
from lorafit.run import Start, train
from lorafit.ship import export
from lorafit.use import chat, evaluate, print_evaluation
from tests import tiny

USUAL: dict[str, Any] = {"r": 3, "alpha": 7.0, "batch_size": 4, "precision": "fp32", "threads": 1}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("labels")
    return {
        "bert": str(tiny.write_bert(directory / "bert")),
        "llama": str(tiny.write_model(directory / "llama")),
        "rows": str(tiny.write_labelled(directory / "rows.jsonl", 24)),
        "three": str(tiny.write_labelled(directory / "three.jsonl", 24, ("odd", "even", "prime"))),
        "chat": str(tiny.write_chat(directory / "chat.jsonl", 6)),
    }


def run(settings: dict[str, Any], resume: bool = False) -> tuple[dict[str, Any], str]:
    heard = io.StringIO()
    console = Console(file=heard, width=1000)
    return train(TrainConfig(**{**USUAL, **settings}), {}, Start(resume, False, time.time()), console), heard.getvalue()


def measured(target: str, data: str, **more: Any) -> dict[str, Any]:
    return evaluate(EvalConfig(target=target, data=data, threads=1, **more), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("model", "method"), [("bert", "lora"), ("llama", "lora"), ("bert", "head"), ("llama", "full")]
)
def test_a_set_that_can_be_told_apart_is_told_apart(
    model: str, method: str, places: dict[str, str], tmp_path: Path
) -> None:
    output = str(tmp_path / "run")
    settings = {"model": places[model], "data": places["rows"], "output": output, "method": method, "lr": 0.02}
    settings |= {"epochs": 60} if method == "head" else {"epochs": 8, "lr": 0.005}
    result, printed = run(settings)
    assert result["labels"] == ["even", "odd"]
    assert result["label_counts"] == {"odd": 12, "even": 12}
    assert "2 labels: odd 12, even 12" in printed
    assert "chat" not in printed.split("Next:")[1]
    found = measured(output, places["rows"])
    assert found["accuracy"] == 1.0
    assert found["macro_f1"] == 1.0
    assert (found["rows"], found["wrong"], found["confusions"]) == (24, 0, ())
    assert found["loss"] < 0.5


@pytest.mark.parametrize(("model", "method"), [("bert", "lora"), ("llama", "lora"), ("bert", "head")])
def test_any_number_of_labels_is_told_where_rows_have_lists(
    model: str, method: str, places: dict[str, str], tmp_path: Path
) -> None:
    sets: list[list[str]] = [[], ["red"], ["big"], ["big", "red"]]
    rows = [
        {"text": f"{n}: {'RED' * ('red' in s)} {'BIG' * ('big' in s)}", "labels": s} for n, s in enumerate(sets * 6)
    ]
    data = str(tiny.write_rows(tmp_path / "rows.jsonl", rows))
    output = str(tmp_path / "run")
    settings = {"model": places[model], "data": data, "output": output, "method": method}
    settings |= {"epochs": 100, "lr": 0.1} if method == "head" else {"epochs": 16, "lr": 0.01}
    result, printed = run(settings)
    assert "2 labels: big 12, red 12" in printed
    assert result["several"]
    found = measured(output, data)
    assert found["accuracy"] == found["macro_f1"] == 1.0
    assert [one["rows"] for one in found["labels"]] == [12, 12]
    with pytest.raises(DataError, match="a list of labels"):
        one_each = str(tmp_path / "single")
        run({"model": places[model], "data": places["rows"], "output": one_each, "max_steps": 1})
        measured(one_each, str(tiny.write_rows(tmp_path / "l.jsonl", [{"text": "a", "label": ["odd", "even"]}])))


@pytest.mark.parametrize("more", [{"method": "lora", "dropout": 0.1}, {"method": "head"}])
def test_a_run_is_repeated_by_its_toml_and_goes_on_where_it_was_bitwise(
    more: dict[str, Any], places: dict[str, str], tmp_path: Path
) -> None:
    first = {"model": places["bert"], "data": places["rows"], "output": str(tmp_path / "first"), "epochs": 2,
             "save_every": 3, "eval": "25%", **more}  # fmt: skip
    result, _ = run(first)
    assert result["eval_loss"] is not None
    assert 0 <= result["eval_accuracy"] <= 1
    config, _ = build(TrainConfig, read_toml(tmp_path / "first" / "run.toml"), {"output": str(tmp_path / "second")})
    run(config.model_dump())
    weights = [(tmp_path / name / "adapter" / "method.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    second = tmp_path / "second"
    (second / "run.json").unlink()
    shutil.rmtree(second / "adapter")
    shutil.rmtree(sorted((second / "checkpoints").iterdir())[-1])
    again, printed = run(config.model_dump(), resume=True)
    assert "resuming after step" in printed
    assert again["steps"] == result["steps"]
    assert (second / "adapter" / "method.safetensors").read_bytes() == weights[0]


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_features_kept_train_the_head_that_features_computed_each_time_train(
    model: str, places: dict[str, str], tmp_path: Path
) -> None:
    found = {}
    for cache in ("1GiB", "0MiB"):
        output = tmp_path / cache
        settings = {"model": places[model], "data": places["three"], "output": str(output), "method": "head",
                    "epochs": 3, "feature_cache": cache, "eval": "25%"}  # fmt: skip
        found[cache] = run(settings)
    (kept, said), (each, warned) = found["1GiB"], found["0MiB"]
    assert "computed once" in said
    assert "the model runs in every epoch" in warned
    assert kept["tokens_computed"] < each["tokens_computed"]
    assert kept["tokens_seen"] == each["tokens_seen"]
    heads = [load_file(tmp_path / cache / "adapter" / "method.safetensors") for cache in found]
    for name, value in heads[0].items():
        # Rows are padded to other widths, so features are off by a few roundings (1e-6). Adam divides a gradient
        # by its own size, so a step carries that on unmagnified: fifteen of them stay below 1e-4 of the head.
        assert float((value - heads[1][name]).norm() / value.norm()) < 1e-4
    assert kept["eval_loss"] == pytest.approx(each["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("model", ["bert", "llama"])
@pytest.mark.parametrize("init", ["gaussian", "eva", "pissa", "olora", "lora-ga"])
def test_a_run_that_is_read_again_tells_what_it_told_while_it_was_trained(
    init: str, model: str, places: dict[str, str], tmp_path: Path
) -> None:
    output, rows = str(tmp_path / "run"), places["rows"]
    result, _ = run({"model": places[model], "data": rows, "eval": rows, "output": output, "init": init, "r": 3,
                     "alpha": 5.0, "epochs": 1, "lr": 0.01})  # fmt: skip
    # W0 - s B0 A0 + s B A against W0 + s (B A - B0 A0): seven products in each of two blocks, of sums of at most 48
    # numbers and 2 r more, which float32 rounds differently.
    rounding = 2**-24 * (48 + 2 * 3) ** 0.5 * 7 * 2
    assert measured(output, rows)["loss"] == pytest.approx(result["eval_loss"], rel=rounding)


def test_a_head_trains_the_head_alone(places: dict[str, str], tmp_path: Path) -> None:
    result, _ = run({"model": places["bert"], "data": places["three"], "output": str(tmp_path / "run"),
                     "method": "head", "epochs": 1})  # fmt: skip
    assert result["trainable_params"] == 3 * (32 + 1)
    assert load_file(tmp_path / "run" / "adapter" / "method.safetensors").keys() == {
        "label_head.weight",
        "label_head.bias",
    }


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_usual_rate_is_that_of_the_method_on_this_kind_of_model(
    method: str, places: dict[str, str], tmp_path: Path
) -> None:
    rates = {}
    for model in ("bert", "llama"):
        output = tmp_path / model
        result, printed = run({"model": places[model], "data": places["rows"], "output": str(output), "max_steps": 1,
                               "method": method, "lr": None, "schedule": "constant", "warmup": 0})  # fmt: skip
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        rates[model] = steps[0]["lr"]
        assert rates[model] == result["settings"]["lr"] == usual_rate(method, is_encoder=model == "bert")
        assert f"lr = {rates[model]}" in printed.replace("\n", " ")
    assert (rates["bert"] < rates["llama"]) == (method == "lora")


@pytest.mark.parametrize(("given", "expected"), [({}, RATES["head"]), ({"head_lr": 7e-3}, 7e-3)])
def test_a_head_beside_something_else_learns_at_its_own_rate(
    given: dict[str, Any], expected: float, places: dict[str, str], tmp_path: Path
) -> None:
    run({"model": places["bert"], "data": places["rows"], "output": str(tmp_path / "run"), "max_steps": 1, "lr": 1e-4,
         "schedule": "constant", "warmup": 0, **given})  # fmt: skip
    # AdamW's first step is the rate in every number whose gradient is not tiny, and these all start at 0.
    after = load_file(tmp_path / "run" / "adapter" / "method.safetensors")
    moved = {name: float(value.abs().max()) for name, value in after.items()}
    assert moved.pop(next(name for name in moved if name.endswith("label_head.bias"))) == pytest.approx(expected, 1e-3)
    assert max(value for name, value in moved.items() if "lora_B" in name) == pytest.approx(1e-4, 1e-3)


def test_layers_below_the_lowest_that_trains_are_computed_once_in_an_encoder_too(
    places: dict[str, str], tmp_path: Path
) -> None:
    found = []
    for cache in ("1GiB", "0MiB"):
        output = tmp_path / cache
        _, printed = run({"model": places["bert"], "data": places["rows"], "output": str(output), "layers": "last:1",
                          "epochs": 2, "feature_cache": cache})  # fmt: skip
        assert ("computed once" in printed) == (cache == "1GiB")
        found.append(load_file(output / "adapter" / "method.safetensors"))
    for name, value in found[0].items():  # rows are padded to other widths, see below
        assert float((value - found[1][name]).norm() / value.norm()) < 1e-4


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_run_that_recomputes_layers_to_save_memory_ends_the_same(
    model: str, places: dict[str, str], tmp_path: Path
) -> None:
    # What is predicted for one that keeps all is above the limit by less than what recomputing saves.
    settings = {"model": places[model], "data": places["rows"], "epochs": 1, "micro_tokens": 256, "batch_size": 24}
    whole, _ = run({**settings, "output": str(tmp_path / "whole")})
    limit = whole["predicted_peak_bytes"] / 0.95 - 150_000
    less, printed = run({**settings, "output": str(tmp_path / "less"), "memory": f"{limit / 2**20:.3f}MiB"})
    assert less["recompute"]
    assert "computed again in the backward pass" in printed
    weights = [load_file(tmp_path / name / "adapter" / "method.safetensors") for name in ("whole", "less")]
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "bitfit", "full"])
def test_what_an_encoder_takes_is_planned_as_train_predicts_it(
    method: str, places: dict[str, str], tmp_path: Path
) -> None:
    settings = {"model": places["bert"], "data": places["rows"], "batch_size": 24, "method": method}
    planned = plan(PlanConfig(**settings, r=3, threads=1), Console(file=io.StringIO()), None)
    own = next(run for run in planned["runs"] if run["precision"] == "fp32")
    result, _ = run({**settings, "output": str(tmp_path / "run"), "max_steps": 1, "precision": "fp32"})
    assert (own["params"], own["flop"]) == (result["trainable_params"], result["flop"])
    predicted = result["predicted_parts"]
    rows_differ = abs(own["memory"].pop("data") - predicted.pop("data"))
    assert own["memory"] == predicted
    # The plan rounds the tokens of a row, 4 bytes each, and a row's label stands among its tokens or does not.
    assert rows_differ <= 24 * 4 * 1.5


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_an_encoder_runs_in_fewer_bits_where_that_is_asked_for(
    precision: str, places: dict[str, str], tmp_path: Path
) -> None:
    output = str(tmp_path / "run")
    settings = {"model": places["bert"], "data": places["rows"], "output": output, "epochs": 8, "lr": 0.005}
    result, _ = run({**settings, "precision": precision})
    assert result["precision"] == precision
    found = measured(output, places["rows"])
    assert found["precision"] == "bf16"
    assert found["accuracy"] == 1.0


def test_sets_of_labels_are_counted_as_scikit_learn_counts_them() -> None:
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    from lorafit.infer.labels import judge_sets
    from lorafit.methods.labels import LabelHead, bits

    generator = torch.Generator().manual_seed(3)
    scores, sets = torch.randn(40, 4, generator=generator), torch.randint(0, 16, (40,), generator=generator)
    loss = float(LabelHead(3, 4, 0, "several").nll(scores.double(), sets).mean())
    found = judge_sets(scores, sets, ("a", "b", "c", "d"), loss, 0.0)
    wanted, got = bits(sets, scores), (scores > 0).float()
    assert found.accuracy == pytest.approx(accuracy_score(wanted, got))
    assert found.macro_f1 == pytest.approx(f1_score(wanted, got, average="macro"))
    each = [log_loss(wanted[:, k], scores[:, k].double().sigmoid()) for k in range(4)]
    assert found.loss == pytest.approx(sum(each))
    assert len(found.wrong) == round(40 * (1 - found.accuracy))


def test_what_an_evaluation_counts_is_what_scikit_learn_counts(places: dict[str, str], tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss

    from lorafit.infer.labels import judge_labels
    from lorafit.methods.labels import LabelHead

    generator = torch.Generator().manual_seed(3)
    scores, targets = torch.randn(40, 4, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    names = ("a", "b", "c", "d")
    loss = float(LabelHead(3, 4, 0).nll(scores.double(), targets).mean())
    found = judge_labels(scores, targets, names, loss, 0.0)
    got = scores.argmax(1)
    assert found.accuracy == pytest.approx(accuracy_score(targets, got))
    assert found.macro_f1 == pytest.approx(f1_score(targets, got, average="macro", zero_division=0))
    assert found.loss == pytest.approx(log_loss(targets, scores.double().softmax(1), labels=range(4)))
    matrix = confusion_matrix(targets, got, labels=range(4))
    for pair in found.confusions:
        assert pair.rows == matrix[names.index(pair.expected), names.index(pair.got)]
    assert sum(pair.rows for pair in found.confusions) == len(found.wrong)
    assert [pair.rows for pair in found.confusions] == sorted((p.rows for p in found.confusions), reverse=True)


@pytest.fixture(scope="module")
def trained(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    output = str(tmp_path_factory.mktemp("trained") / "run")
    run({"model": places["llama"], "data": places["rows"], "output": output, "epochs": 1})
    return output


@pytest.mark.parametrize("several", [False, True])
def test_what_is_told_of_every_row_is_written(several: bool, places: dict[str, str], tmp_path: Path) -> None:
    records = [json.loads(line) for line in Path(places["three"]).read_text().splitlines()]
    if several:
        records = [row | {"label": [row["label"], "odd"][: n % 3]} for n, row in enumerate(records)]
    rows = str(tmp_path / "rows.jsonl")
    tiny.write_rows(Path(rows), records)
    run({"model": places["llama"], "data": rows, "output": str(tmp_path / "run"), "epochs": 2, "lr": 0.005})
    report = measured(str(tmp_path / "run"), rows, answers=str(tmp_path / "answers.jsonl"), samples=24)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == records
    assert [line["prompt"] for line in lines] == [row["text"] for row in records]
    wrong = [(line["expected"], line["answer"]) for line in lines if not line["right"]]
    assert wrong == [(sample["expected"], sample["got"]) for sample in report["samples"]]
    assert 0 < len(wrong) == report["wrong"] < 24
    assert all(line["right"] == (line["expected"] == line["answer"]) for line in lines)


def test_a_label_that_training_never_showed_is_refused(trained: str, places: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"three\.jsonl:3 has the label 'prime', which is none of the 2 .* even, odd"):
        measured(trained, places["three"])


def test_held_out_rows_of_another_label_are_refused_or_counted(places: dict[str, str], tmp_path: Path) -> None:
    settings = {"model": places["bert"], "data": places["rows"], "eval": places["three"], "epochs": 1}
    with pytest.raises(DataError, match="'prime'"):
        run({**settings, "output": str(tmp_path / "no")})
    _, printed = run({**settings, "output": str(tmp_path / "run"), "skip_bad": True})
    assert "held out: 16 rows" in printed
    assert "8 rows cannot be used and are left out" in printed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": "chat", "method": "head"}, "--method head trains a head of labels"),
        ({"data": "chat", "task": "classify"}, "has no label"),
        ({"data": "chat", "pooling": "mean", "model": "llama"}, "--pooling is given"),
        ({"data": "chat"}, "no causal language model"),
        ({"template": "chatml"}, "--template is for conversations"),
        ({"add_tokens": ["<a>"]}, "--add-tokens is for text"),
        ({"precision": "int8", "method": "head", "model": "llama"}, "int8 is not for a head alone"),
        ({"base_storage": "nf4"}, "is an encoder"),
        ({"method": "prompt"}, "in front of a row"),
        ({"task": "generate", "model": "llama"}, "read for a model that writes text"),
        ({"seq_len": 2}, "nothing of the text is left"),
        ({"data": "chat", "model": "llama", "head_lr": 0.01}, "there is no head"),
        ({"method": "head", "head_lr": 0.01}, "whose rate is --lr"),
    ],
)
def test_what_does_not_go_together_is_said(
    changed: dict[str, Any], said: str, places: dict[str, str], tmp_path: Path
) -> None:
    settings = {"model": "bert", "data": "rows", "output": str(tmp_path / "run"), **changed}
    settings |= {"model": places[settings["model"]], "data": places[settings["data"]]}
    with pytest.raises(LorafitError, match=said):
        run(settings)


def test_labels_that_cannot_be_used_are_refused(places: dict[str, str], tmp_path: Path) -> None:
    one = tiny.write_rows(tmp_path / "one.jsonl", [{"text": "a", "label": 1}] * 3)
    with pytest.raises(DataError, match="have 1 label"):
        run({"model": places["bert"], "data": str(one), "output": str(tmp_path / "run")})


def test_a_run_of_labels_says_that_it_writes_no_text(trained: str, places: dict[str, str], tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    for use in (
        lambda: chat(ChatConfig(target=trained), console, io.StringIO(""), io.StringIO()),
        lambda: export(ExportConfig(run=trained, output=str(tmp_path / "x.gguf")), console),
    ):
        with pytest.raises(ConfigError, match=r"tells 2 labels apart \(even, odd\) and writes no text"):
            use()
    with pytest.raises(ConfigError, match="--max-new-tokens is given"):
        measured(trained, places["rows"], max_new_tokens=3)


def test_an_evaluation_is_shown_with_what_is_taken_for_what(places: dict[str, str], tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    run({"model": places["bert"], "data": places["three"], "output": output, "max_steps": 1, "method": "head"})
    found = measured(output, places["three"])
    json.dumps(found)
    assert found["wrong"] == sum(pair["rows"] for pair in found["confusions"]) > 0
    assert len(found["samples"]) == 3
    heard = io.StringIO()
    print_evaluation(found, Console(file=heard, width=200))
    assert "taken for" in heard.getvalue()
    assert found["samples"][0]["prompt"] in heard.getvalue()


def test_scale_is_of_the_update_and_a_head_alone_has_none(trained: str, places: dict[str, str], tmp_path: Path) -> None:
    assert measured(trained, places["rows"], scale=0.0)["loss"] != measured(trained, places["rows"])["loss"]
    output = str(tmp_path / "run")
    run({"model": places["bert"], "data": places["rows"], "output": output, "max_steps": 1, "method": "head"})
    with pytest.raises(ConfigError, match="nothing to scale"):
        measured(output, places["rows"], scale=0.5)


def test_the_card_says_that_it_is_a_classifier(trained: str) -> None:
    card = (Path(trained) / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "# 2 labels by lora on" in card
    assert "PEFT" not in card
