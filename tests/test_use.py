from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorafit import ship, use
from lorafit.config import ChatConfig, EvalConfig, MergeConfig, TrainConfig
from lorafit.errors import AdapterError, ConfigError, DataError, MergeError, ModelError, RunDirError
from lorafit.opening import Opened, open_target
from lorafit.run import Start, train
from tests import tiny
from tests.infer.learned import LEARNED, llama

SYSTEM = "Answer as you learned."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, rows.jsonl with one system message in all rows, and run/, which knows the rows by heart."""
    directory = tmp_path_factory.mktemp("made")
    llama().save_pretrained(directory / "model")
    tiny.tokenizer().save_pretrained(directory / "model")
    rows = [tiny.chat_row(*pair) for pair in LEARNED]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": SYSTEM})
    tiny.write_rows(directory / "rows.jsonl", rows)
    config = TrainConfig(
        model=str(directory / "model"), data=str(directory / "rows.jsonl"), output=str(directory / "run"), r=8,
        alpha=24.0, batch_size=5, max_steps=150, lr=1e-2, precision="fp32", threads=1,
    )  # fmt: skip
    train(config, {}, Start(False, False, time.time()), quiet())
    return directory


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same, to be broken; the run still knows its model by where it was."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=1000)


def evaluated(target: Path | str, data: Path, **settings: Any) -> dict[str, Any]:
    return use.evaluate(EvalConfig(target=str(target), data=str(data), threads=1, **settings), quiet())


def opened(target: Path | str, adapter: str | None = None, scale: float = 1.0, precision: str = "fp32") -> Opened:
    return open_target(str(target), adapter, scale, precision, False, quiet())


def chatted(target: Path, lines: str, **settings: Any) -> str:
    stdout = io.StringIO()
    use.chat(ChatConfig(target=str(target), threads=1, **settings), quiet(), io.StringIO(lines), stdout)
    return stdout.getvalue()


def measured(report: dict[str, Any]) -> dict[str, Any]:
    """What was measured of the model, without names and times."""
    return {name: report[name] for name in ("loss", "exact_match", "cut_answers", "samples", "tokens_supervised")}


# --- eval -----------------------------------------------------------------------------------------------------------


def test_a_run_is_right_and_at_scale_0_it_is_its_base(made: Path) -> None:
    tuned = evaluated(made / "run", made / "rows.jsonl")
    base = evaluated(made / "run", made / "rows.jsonl", scale=0)
    assert (tuned["exact_match"], tuned["accuracy"], tuned["valid_json"], tuned["rows"]) == (1.0, 1.0, 1.0, 5)
    assert base["exact_match"] == 0.0
    assert measured(base) == measured(evaluated(made / "model", made / "rows.jsonl", precision="fp32"))


def test_the_report_is_json_and_says_what_was_measured(made: Path) -> None:
    report = evaluated(made / "run", made / "rows.jsonl", scale=0.5, rows=2, samples=1)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["scale"], report["rows"], report["precision"]) == (0.5, 2, "fp32")
    assert (report["target"], report["base"]) == (str(made / "run"), str(made / "model"))
    assert report["data"] == str(made / "rows.jsonl")
    assert [sample["expected"] for sample in report["samples"]] == [LEARNED[0][1]]
    assert report["seconds"] > 0


def test_every_setting_of_eval_matters(made: Path) -> None:
    def changed(**settings: Any) -> dict[str, Any]:
        return evaluated(made / "run", made / "rows.jsonl", **settings)

    assert changed(generate=False)["exact_match"] is None
    assert changed(max_new_tokens=3)["cut_answers"] == 5
    assert changed(seq_len=100)["cut_rows"] > 0
    assert changed(precision="bf16")["precision"] == "bf16"
    assert changed(samples=0)["samples"] == []
    two = EvalConfig(target=str(made / "run"), data=str(made / "rows.jsonl"), threads=2, generate=False)
    use.evaluate(two, quiet())
    assert torch.get_num_threads() == 2


def test_all_answers_are_written_beside_their_rows(made: Path, tmp_path: Path) -> None:
    lines = (made / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"references": [f"{n}", "b"]} for n, line in enumerate(lines)]
    tiny.write_rows(tmp_path / "several.jsonl", rows)
    report = evaluated(made / "run", tmp_path / "several.jsonl", samples=1, answers=str(tmp_path / "new" / "a.jsonl"))
    written = [json.loads(line) for line in (tmp_path / "new" / "a.jsonl").read_text().splitlines()]
    assert [one["row"] for one in written] == rows
    assert [(one["prompt"], one["answer"]) for one in written] == LEARNED
    assert all(one["right"] and one["expected"] == one["answer"] for one in written)
    assert written[2]["origin"] == "several.jsonl:3"
    assert len(report["samples"]) == 1


def test_a_file_of_answers_that_cannot_be_is_refused_before_anything_is_loaded(made: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "A long story."}\n')
    with pytest.raises(ConfigError, match="running text is not answered"):
        evaluated("nowhere", tmp_path / "text.jsonl", answers=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match="nothing would be answered"):
        evaluated("nowhere", made / "rows.jsonl", answers=str(tmp_path / "a"), generate=False)
    with pytest.raises(ConfigError, match="is a directory"):
        evaluated("nowhere", made / "rows.jsonl", answers=str(tmp_path))
    with pytest.raises(RunDirError, match="it exists and is not a directory"):
        evaluated("nowhere", made / "rows.jsonl", answers=str(tmp_path / "text.jsonl" / "a"))


def test_the_table_shows_shares_samples_and_what_was_cut(made: Path) -> None:
    report = evaluated(made / "run", made / "rows.jsonl", samples=2, max_new_tokens=25)
    console = quiet()
    use.print_evaluation(report, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO
    assert "exact_match  80.0%" in printed
    assert "1 answers were cut at --max-new-tokens" in printed
    assert "The first 2 of 5 rows:" in printed
    assert f"got  {LEARNED[0][1]}" in printed
    assert "at scale 1 (fp32)" in printed


def test_a_loss_that_overflows_perplexity_is_still_json(made: Path) -> None:
    report = evaluated(made / "run", made / "rows.jsonl", generate=False)
    console = quiet()
    use.print_evaluation({**report, "loss": 1000.0, "perplexity": None}, console)
    assert "above 1e308" in console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO


# --- what is opened -------------------------------------------------------------------------------------------------


def test_a_run_is_opened_with_its_adapter_tokenizer_and_system_message(made: Path) -> None:
    got = opened(made / "run")
    assert (got.has_adapter, got.system, got.base, got.precision) == (True, SYSTEM, str(made / "model"), "fp32")
    assert not got.model.training
    assert not any(module.training for module in got.model.modules())


def test_auto_takes_the_precision_that_a_run_was_trained_in(copy: Path) -> None:
    result = json.loads((copy / "run" / "run.json").read_text())
    (copy / "run" / "run.json").write_text(json.dumps({**result, "precision": "bf16"}))
    got = opened(copy / "run", precision="auto")
    assert got.precision == "bf16"
    assert got.model.dtype == torch.bfloat16
    assert opened(copy / "run", precision="fp32").model.dtype == torch.float32


def test_a_model_and_an_adapter_directory_are_the_run(made: Path) -> None:
    expected = measured(evaluated(made / "run", made / "rows.jsonl"))
    rows, adapter = made / "rows.jsonl", str(made / "run" / "adapter")
    assert measured(evaluated(made / "model", rows, adapter=adapter, precision="fp32")) == expected
    assert measured(evaluated(adapter, rows, precision="fp32")) == expected  # by the base that it names


def test_the_adapters_tokenizer_wins_over_the_models(copy: Path) -> None:
    (copy / "run" / "adapter" / "chat_template.jinja").write_text(tiny.CHATML + "{# its own #}")
    assert "its own" in str(opened(copy / "run").tokenizer.chat_template)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_a_model_without_an_adapter_has_no_scale(made: Path, scale: float) -> None:
    with pytest.raises(ConfigError, match="is a model without one"):
        opened(made / "model", scale=scale)
    assert evaluated(made / "model", made / "rows.jsonl", generate=False)["scale"] is None


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(made: Path, scale: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        opened(made / "run", scale=scale)


def test_an_unfinished_run_is_a_sentence(copy: Path) -> None:
    (copy / "run" / "run.json").unlink()
    with pytest.raises(RunDirError, match="--resume"):
        opened(copy / "run")


def test_two_adapters_are_refused(made: Path) -> None:
    for target in (made / "run", made / "run" / "adapter"):
        with pytest.raises(ConfigError, match="is a second one"):
            opened(target, adapter=str(made / "run" / "adapter"))


def test_another_model_under_the_same_name_is_refused(copy: Path) -> None:
    result = json.loads((copy / "run" / "run.json").read_text())
    (copy / "run" / "run.json").write_text(json.dumps({**result, "model": str(copy / "model")}))
    assert opened(copy / "run").has_adapter  # the same bytes in another place
    tiny.llama(seed=1).save_pretrained(copy / "model")
    with pytest.raises(AdapterError, match="SHA-256 differs"):
        opened(copy / "run")
    assert opened(copy / "model", adapter=str(copy / "run" / "adapter")).has_adapter  # as the sentence says


def test_a_base_model_that_has_gone_is_named(copy: Path) -> None:
    result = json.loads((copy / "run" / "run.json").read_text())
    (copy / "run" / "run.json").write_text(json.dumps({**result, "model": str(copy / "gone")}))
    with pytest.raises(ModelError) as error:
        opened(copy / "run")
    assert f"the base model of {copy / 'run'} cannot be read: there is no model at {copy / 'gone'}" in str(error.value)
    assert f"MODEL --adapter {copy / 'run' / 'adapter'}" in str(error.value)


def test_an_adapter_that_names_no_base_is_a_sentence(copy: Path) -> None:
    config = copy / "run" / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="MODEL --adapter"):
        opened(copy / "run" / "adapter")


def test_a_target_that_is_nothing_is_the_models_own_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model at"):
        opened(tmp_path / "nothing")
    with pytest.raises(ModelError, match="Did you mean 'smollm2-135m'"):
        opened("smollm2-135")


def test_a_tokenizer_that_cannot_be_the_models_is_refused(copy: Path) -> None:
    adapter = copy / "run" / "adapter"
    larger = tiny.tokenizer()
    larger.add_tokens(["<|new|>"])
    larger.save_pretrained(adapter)
    with pytest.raises(AdapterError, match="has 259 tokens, the model knows 258"):
        opened(copy / "run")
    (adapter / "tokenizer.json").write_text("{}")
    with pytest.raises(AdapterError, match="cannot be read"):
        opened(copy / "run")
    (adapter / "tokenizer.json").unlink()
    assert len(opened(copy / "run").tokenizer) == 258


# --- chat -----------------------------------------------------------------------------------------------------------


def test_chat_answers_as_the_run_learned_under_its_system_message(made: Path) -> None:
    for question, reply in LEARNED:
        assert chatted(made / "run", f"{question}\n") == f"{reply}\n"


def test_every_setting_of_chat_matters(made: Path) -> None:
    question, reply = LEARNED[0]
    assert chatted(made / "run", question, max_new_tokens=3) == f"{reply[:3]}\n"
    short = {"max_new_tokens": 30}
    assert chatted(made / "run", question, scale=0, **short) == chatted(made / "run", f"/scale 0\n{question}", **short)
    assert chatted(made / "run", question, scale=0, system="", **short) != chatted(made / "run", question, **short)
    drawn = {"temperature": 2.0, **short}
    assert chatted(made / "run", question, seed=1, **drawn) == chatted(made / "run", question, seed=1, **drawn)
    assert chatted(made / "run", question, seed=1, **drawn) != chatted(made / "run", question, seed=2, **drawn)
    use.chat(ChatConfig(target=str(made / "run"), threads=2), quiet(), io.StringIO(), io.StringIO())
    assert torch.get_num_threads() == 2


# --- merge ----------------------------------------------------------------------------------------------------------


def merged(run: Path, output: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    console = quiet()
    result = ship.merge(MergeConfig(run=str(run), output=str(output), **settings), console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO


def test_a_merged_run_is_a_plain_model_that_answers_as_the_run(made: Path, tmp_path: Path) -> None:
    result, printed = merged(made / "run", tmp_path / "plain")
    assert 0 <= result["difference"] <= result["tolerance"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert f"lorafit chat {tmp_path / 'plain'}" in printed
    of_run = evaluated(made / "run", made / "rows.jsonl")
    of_merged = evaluated(tmp_path / "plain", made / "rows.jsonl", precision="fp32")
    assert of_merged["exact_match"] == 1.0
    assert of_merged["samples"] == of_run["samples"]
    assert of_merged["loss"] == pytest.approx(of_run["loss"], rel=100 * result["tolerance"])


def test_merge_takes_the_scale_and_the_dtype(made: Path, tmp_path: Path) -> None:
    merged(made / "run", tmp_path / "half", scale=0.5)
    halfway = evaluated(made / "run", made / "rows.jsonl", scale=0.5, generate=False)["loss"]
    got = evaluated(tmp_path / "half", made / "rows.jsonl", precision="fp32", generate=False)["loss"]
    assert got == pytest.approx(halfway, rel=1e-4)
    result, printed = merged(made / "run", tmp_path / "bf16", dtype="bf16")
    assert result["cast_difference"] > 0
    assert "in the cast to bf16" in printed
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_merge_refuses_a_full_directory_and_a_model_without_an_adapter(made: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="already holds files"):
        merged(made / "run", made / "model")
    with pytest.raises(AdapterError, match="a model without an adapter"):
        merged(made / "model", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_merge_measures_the_loss_before_after_and_after_the_cast(made: Path, tmp_path: Path) -> None:
    rows = made / "rows.jsonl"
    result, printed = merged(made / "run", tmp_path / "bf16", dtype="bf16", data=str(rows), rows=4)
    losses = result["losses"]
    of_run = evaluated(made / "run", rows, rows=4, generate=False, precision="fp32")["loss"]
    of_cast = evaluated(tmp_path / "bf16", rows, rows=4, generate=False, precision="fp32")["loss"]
    assert losses["trained"] == pytest.approx(of_run, rel=1e-6)
    assert losses["merged"] == pytest.approx(of_run, rel=100 * result["tolerance"])
    assert losses["written"] == pytest.approx(of_cast, rel=1e-6)
    assert losses["written"] != losses["merged"]
    share = losses["written"] - losses["merged"]
    assert f"{losses['trained']:.4f} as trained, {losses['merged']:.4f} merged" in printed
    assert f"{losses['written']:.4f} bf16 ({share:+.1e})" in printed
    plain, _ = merged(made / "run", tmp_path / "fp32", data=str(rows))
    assert plain["losses"].keys() == {"trained", "merged"}
    cut, _ = merged(made / "run", tmp_path / "cut", data=str(rows), seq_len=100)
    assert cut["losses"] != plain["losses"]


def test_merge_refuses_what_is_further_off_than_rounding_explains_unless_told(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.export.merge.tolerance", lambda model: 1e-12)
    with pytest.raises(MergeError, match=r"rounding explains 1\.0e-12\. Nothing was written\. .* with --force"):
        merged(made / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result, printed = merged(made / "run", tmp_path / "out", force=True)
    assert result["difference"] > result["tolerance"] and not result["explained"]
    assert "more than rounding explains, and was written since --force says so" in printed
    assert opened(tmp_path / "out").base == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"into": "full"}, "--into full is given, and the base of"),
        ({"into": "same"}, "is no GGUF file"),
        ({"rows": 3}, "--rows is given without --data"),
    ],
)
def test_merge_refuses_settings_that_are_at_odds(
    settings: dict[str, Any], sentence: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        merged(made / "run", tmp_path / "out", **settings)


def test_merge_looks_for_the_data_before_anything_is_loaded(made: Path, tmp_path: Path) -> None:
    console = quiet()
    config = MergeConfig(run=str(made / "run"), output=str(tmp_path / "out"), data="no-such.jsonl")
    with pytest.raises(DataError, match=r"no-such\.jsonl does not exist"):
        ship.merge(config, console)
    assert "opened" not in console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO
