"""`lorafit plan`: from a model file, from a config alone, without torch."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorafit import rates
from lorafit.config import PlanConfig, TrainConfig
from lorafit.data.batching import counted, step_rows
from lorafit.data.example import Chat
from lorafit.data.mask import encode_all
from lorafit.errors import ConfigError, ModelError, TargetError
from lorafit.model import spec as model_spec
from lorafit.plan import counts
from lorafit.planning import plan
from lorafit.units import MIB, format_bytes
from tests import tiny

LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
RATES = rates.Rates({"fp32": 4e11, "bf16": 8e11, "int8": 16e11}, {"bf16/64": 4e11, "bf16/4096": 5.6e11})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))


def planned(model: str, **settings: Any) -> tuple[dict[str, Any], str]:
    heard = io.StringIO()
    found = plan(PlanConfig(model=model, **settings), Console(file=io.StringIO()), Console(file=heard, width=160))
    return found, heard.getvalue()


@pytest.mark.parametrize("with_data", [False, True])
def test_a_plan_needs_neither_torch_nor_transformers_nor_datasets(with_data: bool, tmp_path: Path) -> None:
    data = [str(tiny.write_chat(tmp_path / "rows.jsonl"))] if with_data else []
    code = (
        f"import sys; sys.argv = ['lorafit', 'plan', 'smollm2-135m', *{data}, '--json']\n"
        "from lorafit.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert json.loads(report)["parameters"] == 134_515_008


def test_a_70b_model_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    rates.keep(2, RATES)
    found, printed = planned(str(tmp_path), threads=2, memory="24GiB", rows=1000)
    assert found["parameters"] == 70_553_706_496
    assert found["weight_bytes"] == 0 and "stored as nothing but a config" in printed
    assert not any(run["fits"] for run in found["runs"])
    assert found["advice"] is None and "None of these fits" in printed
    assert {run["precision"] for run in found["runs"] if run["train_s"] > 3600 * 24} == {"int8", "bf16", "fp32"}


def test_time_energy_and_cost_follow_from_the_rates(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    rates.keep(2, RATES)
    settings = {"threads": 2, "rows": 100, "epochs": 3, "watts": 90.0, "price": 0.3, "batch_size": 8, "seq_len": 64}
    found, printed = planned(str(tmp_path / "model"), **settings)
    runs = {run["precision"]: run for run in found["runs"] if run["base_storage"] == "auto"}
    assert found["steps"] == 13 * 3
    assert runs["bf16"]["step_s"] == pytest.approx(runs["bf16"]["flop"] / (8e11 * 0.5))
    assert runs["fp32"]["step_s"] == pytest.approx(runs["fp32"]["flop"] / (4e11 * 0.4))
    assert runs["bf16"]["train_s"] == pytest.approx(39 * runs["bf16"]["step_s"])
    assert runs["bf16"]["cost"] == pytest.approx(90 * runs["bf16"]["train_s"] / 3.6e6 * 0.3)
    assert "40% assumed" in printed and "50%" in printed
    assert "cost" in printed and f"{runs['fp32']['cost']:.3f}" in printed
    assert found["advice"].endswith("--precision int8 --batch-size 8 --epochs 3")


def test_a_machine_that_was_not_measured_is_said_to_be_so(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    found, printed = planned(str(tmp_path / "model"))
    assert "not measured yet: add --calibrate" in printed
    assert all(run["step_s"] is None for run in found["runs"]) and found["advice"]


def test_rows_that_are_looked_at_are_planned_as_training_computes_them(tmp_path: Path) -> None:
    model = str(tiny.write_model(tmp_path / "model"))
    system = {"role": "system", "content": "Answer in one word, and say nothing that was not asked for."}
    rows = [tiny.chat_row(f"What is {n}?", "Yes" * (1 + n % 3)) for n in range(40)]
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": [system, *row["messages"]]} for row in rows])
    rates.keep(2, RATES)
    found, printed = planned(model, data=str(data), threads=2, batch_size=8, epochs=2)

    encoded = encode_all(
        [Chat(tuple([system, *row["messages"]]), "f:1") for row in rows], tiny.tokenizer(), seq_len=2048
    )
    assert found["data"]["rows"] == found["settings"]["rows"] == 40 and found["steps"] == 10
    assert found["data"]["tokens_per_row"] == encoded.tokens / 40
    assert found["data"]["loss_share"] == encoded.supervised_tokens / encoded.tokens
    assert found["data"]["longest"] == encoded.longest
    of_epoch = [one for step in range(5) for one in counted(encoded.encoded, step_rows(40, 8, 0, 0, step), 1024)]
    # Steps of several epochs are looked at; each of them is nearly as large as another.
    computed = sum(one.tokens for one in of_epoch) / 5
    assert found["data"]["computed_tokens_per_step"] == pytest.approx(computed, rel=0.1)
    assert found["data"]["read_tokens_per_step"] > 1.5 * found["data"]["computed_tokens_per_step"]
    assert "computed, what rows share once" in printed and "in these rows" in printed
    assert found["advice"] == f"lorafit train {model} {data} -o runs/first --precision int8 --batch-size 8 --epochs 2"


def test_rows_that_cannot_be_used_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    model = str(tiny.write_model(tmp_path / "model"))
    good = [tiny.chat_row("a", "b") for _ in range(5)]
    data = tiny.write_rows(tmp_path / "rows.jsonl", [*good, {"messages": []}, *good])
    found, printed = planned(model, data=str(data))
    assert (found["data"]["rows"], found["data"]["unusable"]) == (11, 1)
    assert "1 of these cannot be used; the first: rows.jsonl:6" in printed


def test_a_tokenizer_that_only_transformers_reads_is_said_to_be_so(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="is not read without loading the model"):
        planned(str(model), data=str(tiny.write_chat(tmp_path / "rows.jsonl")))


def test_a_gpu_is_planned_by_its_datasheet_and_said_to_be_so(tmp_path: Path) -> None:
    model = str(tiny.write_model(tmp_path / "model"))
    found, printed = planned(model, gpu="L4", rows=100, watts=90.0, price=0.3)
    runs = {run["precision"]: run for run in found["gpu"]["runs"]}
    assert runs["bf16"]["step_s"] == pytest.approx(runs["bf16"]["flop"] / (121e12 * 0.4))
    assert runs["bf16"]["cost"] is None and set(runs) == {"bf16", "fp32"}
    assert "On one NVIDIA L4 by its datasheet" in printed and "Nothing of this was measured" in printed
    with pytest.raises(ConfigError, match=r"Did you mean .*l40s"):
        planned(model, gpu="l40")


def test_less_memory_means_smaller_passes_then_recomputation_then_no_advice() -> None:
    peaks = planned("smollm2-135m", memory="64GiB")[0]["runs"][1]
    assert (peaks["micro_tokens"], peaks["recompute"], peaks["fits"]) == (1024, False, True)
    tight = planned("smollm2-135m", memory=f"{peaks['peak_bytes'] * 0.92 / 1e6:.0f}MB", seq_len=128)[0]["runs"][1]
    assert tight["fits"] and (tight["micro_tokens"] < 1024 or tight["recompute"])
    assert planned("smollm2-135m", memory="500MiB")[0]["advice"] is None


def test_a_base_in_fewer_bits_is_planned_beside_the_others_and_needs_less(tmp_path: Path) -> None:
    found, printed = planned("smollm2-135m", memory="64GiB")
    peaks = {(run["precision"], run["base_storage"]): run["memory"] for run in found["runs"]}
    assert set(peaks) == {("int8", "auto"), ("bf16", "auto"), ("fp32", "auto"), ("bf16", "keep")}
    assert "bf16, keep" in printed
    # The file, and in bf16 one layer of 30 and 8,192 rows of the head, in the place of all weights.
    decoded = 2 * (106_168_320 // 30 + 8192 * 576)
    assert peaks["bf16", "keep"]["weights"] == found["weight_bytes"] + decoded
    assert peaks["bf16", "auto"]["weights"] == 2 * found["parameters"]
    tiny.write_model(tmp_path / "model")
    ways = {run["base_storage"] for run in planned(str(tmp_path / "model"))[0]["runs"]}
    assert ways == {"auto", "nf4", "int8"}


def test_the_advice_names_a_storage_where_nothing_else_fits() -> None:
    # What is least in each way: nothing fits into a byte.
    runs = planned("smollm2-135m", seq_len=128, memory="1MB")[0]["runs"]
    kept = next(run["peak_bytes"] for run in runs if run["base_storage"] == "keep")
    others = min(run["peak_bytes"] for run in runs if run["base_storage"] == "auto")
    limit = (kept + others) / 2 / 0.95
    advice = planned("smollm2-135m", seq_len=128, memory=f"{limit / 1e6:.0f}MB")[0]["advice"]
    assert advice.startswith("lorafit train smollm2-135m DATA -o runs/first --precision bf16 --base-storage keep")


def test_every_method_stands_in_each_way_that_it_can_be_trained_in(tmp_path: Path) -> None:
    model = str(tiny.write_model(tmp_path / "model"))
    found, printed = planned(model, r=3, memory="64GiB")
    ways = {row["name"]: [(run["precision"], run["base_storage"]) for run in row["runs"]] for row in found["methods"]}
    every = [("int8", "auto"), ("bf16", "auto"), ("fp32", "auto"), ("bf16", "nf4"), ("bf16", "int8")]
    assert ways["lora"] == ways["adapter:houlsby"] == ways["prompt"] == every
    assert ways["full"] == [("fp32", "auto")]
    assert "head" not in ways  # there are no labels
    runs = {row["name"]: row["runs"] for row in found["methods"]}
    assert runs["lora"] == found["runs"]
    config = TrainConfig(model="m", data="d", output="o", method="adapter", variant="houlsby")
    assert runs["adapter:houlsby"][0]["params"] == counts.method_params(model_spec.read(model), config)
    assert all(f"{run['peak_bytes'] / MIB:,.0f}" in printed for own in runs.values() for run in own)
    assert "x: does not fit" in printed


def test_what_does_not_fit_fits_in_smaller_passes_or_with_layers_recomputed_is_marked() -> None:
    free = planned("smollm2-135m", memory="64GiB")[0]
    peak = next(row["runs"][1]["peak_bytes"] for row in free["methods"] if row["name"] == "lora")
    found, printed = planned("smollm2-135m", memory=f"{0.97 * peak / 1e6:.0f}MB", seq_len=128)
    runs = [run for row in found["methods"] for run in row["runs"]]
    smaller = next(run for run in runs if run["fits"] and run["micro_tokens"] < 1024 and not run["recompute"])
    large = next(run for run in runs if not run["fits"])
    assert f"{smaller['peak_bytes'] / MIB:,.0f} s" in printed
    assert f"{large['peak_bytes'] / MIB:,.0f} x" in printed


def test_the_method_that_is_asked_for_is_planned_in_detail_and_in_the_command() -> None:
    found, printed = planned("smollm2-135m", method="full", layers="last:2", memory="64GiB")
    assert [run["precision"] for run in found["runs"]] == ["fp32"]
    assert found["runs"][0]["params"] == 7_080_192
    whole = next(row for row in found["methods"] if row["name"] == "full")
    assert whole["runs"][0]["peak_bytes"] > 2 * found["runs"][0]["peak_bytes"]
    assert "--precision fp32 --method full --layers last:2" in found["advice"]
    assert "Training by full, --layers last:2" in printed
    own = planned("smollm2-135m", method="adapter", variant="compacter")[0]["methods"]
    assert own[0]["name"] == "adapter:compacter" and own[1]["name"] == "lora"


def test_times_are_of_the_method_where_it_was_timed_else_of_lora_and_said_to_be(tmp_path: Path) -> None:
    model = str(tiny.write_model(tmp_path / "model"))
    rates.keep(2, rates.Rates({"fp32": 4e11}, {"bf16/64": 4e11, "bf16, adapter/64": 2e11}))
    found, printed = planned(model, threads=2, r=3)
    rows = {
        row["name"]: {run["precision"]: run for run in row["runs"] if run["base_storage"] == "auto"}
        for row in found["methods"]
    }
    assert rows["lora"]["bf16"]["speed_from"] == "measured"
    assert rows["adapter:pfeiffer"]["bf16"]["step_s"] == pytest.approx(rows["adapter:pfeiffer"]["bf16"]["flop"] / 2e11)
    assert rows["ia3"]["bf16"]["step_s"] == pytest.approx(rows["ia3"]["bf16"]["flop"] / 4e11)
    assert (rows["ia3"]["bf16"]["speed_from"], rows["ia3"]["fp32"]["speed_from"]) == ("lora", "assumed")
    assert rows["ia3"]["int8"]["step_s"] is None
    assert "~: at the speed of LoRA: no run of this kind was timed here yet" in printed
    assert "not known" in printed


def test_full_fine_tuning_of_some_layers_has_a_speed_of_its_own(tmp_path: Path) -> None:
    model = str(tiny.write_model(tmp_path / "model"))
    both = {"fp32/64": 4e11, "fp32, full/64": 1e11}
    rates.keep(2, rates.Rates({"fp32": 4e11}, both))
    asked: dict[str, Any] = {"threads": 2, "method": "full", "layers": "last:1"}
    before = planned(model, **asked)[0]["runs"][0]
    assert before["step_s"] == pytest.approx(before["flop"] / 4e11) and before["speed_from"] == "lora"
    rates.keep(2, rates.Rates({"fp32": 4e11}, both | {"fp32, full:layers/64": 2e11}))
    after = planned(model, **asked)[0]["runs"][0]
    assert after["step_s"] == pytest.approx(after["flop"] / 2e11) and after["speed_from"] == "measured"


def test_a_grid_of_rows_and_tokens_holds_what_was_asked_for() -> None:
    found, printed = planned("smollm2-135m", batch_size=3, seq_len=700, memory="64GiB")
    shapes = found["shapes"]
    row, column = shapes["batch_sizes"].index(3), shapes["seq_lens"].index(700)
    way = next(run for run in found["runs"] if run["precision"] == shapes["precision"])
    assert shapes["runs"][row][column]["peak_bytes"] == way["peak_bytes"]
    assert "by rows of a step and tokens of every row" in printed


def test_rows_with_labels_are_planned_with_a_head_and_a_head_alone_runs_the_model_once(tmp_path: Path) -> None:
    model = str(tiny.write_model(tmp_path / "model"))
    data = tiny.write_rows(
        tmp_path / "rows.jsonl", [{"text": f"number {n}", "label": "even" if n % 2 == 0 else "odd"} for n in range(32)]
    )
    rates.keep(2, RATES)
    found, printed = planned(model, data=str(data), threads=2, r=3, method="head", batch_size=8)
    assert found["methods"][-1]["name"] == "head" and "Training by head" in printed
    assert (found["settings"]["epochs"], found["steps"]) == (10, 40)
    run = next(run for run in found["runs"] if run["precision"] == "fp32")
    assert run["params"] == 2 * (32 + 1)
    # Nine of ten epochs are steps of the head alone.
    assert run["step_s"] * 4 < run["train_s"] < run["step_s"] * 5
    others = {row["name"]: row["runs"][0]["params"] for row in found["methods"]}
    assert others["ia3"] == counts.ia3_params(model_spec.read(model)) + 2 * 32  # by the last token, without a bias


def test_layers_that_are_not_there_and_a_head_without_labels_are_refused() -> None:
    with pytest.raises(TargetError, match="the model has 30 blocks"):
        planned("smollm2-135m", method="full", layers="last:31")
    with pytest.raises(ConfigError, match="there are no labels"):
        planned("smollm2-135m", method="head")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"watts": 90.0}, "--watts is given without --rows"),
        ({"price": 0.3, "rows": 9}, "--price is given without"),
        ({"format": "alpaca"}, "--format is given without DATA"),
        ({"loss_on": "last"}, "--loss-on is given without DATA"),
        ({"data": "rows.jsonl", "loss_share": 0.5}, "--loss-share is given beside DATA"),
    ],
)
def test_what_would_be_left_out_of_the_answer_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        planned("smollm2-135m", **settings)


def test_the_advice_gives_a_length_that_training_would_cut(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    assert "--seq-len 4096" in planned(str(tmp_path / "model"), seq_len=4096, batch_size=1)[0]["advice"]
    assert "--seq-len" not in planned(str(tmp_path / "model"), seq_len=1024, batch_size=1)[0]["advice"]


def test_the_share_that_training_reaches_is_that_of_the_model_nearest_in_width() -> None:
    assert RATES.mfu_of("bf16", 100) == 0.5
    assert RATES.mfu_of("bf16", 2048) == pytest.approx(0.7)
    assert RATES.reached_by("bf16", 2048) == 5.6e11
    assert RATES.mfu_of("int8", 2048) is RATES.reached_by("int8", 2048) is None


def test_a_type_that_was_measured_because_it_was_asked_for_stands_among_the_rates(tmp_path: Path) -> None:
    """A processor without products of fp16 is asked for them too: to say how slow they are."""
    model = str(tiny.write_model(tmp_path / "model"))
    rates.keep(2, rates.Rates({"fp32": 4e11, "fp16": 1e10}))
    found, told = planned(model, threads=2, html=str(tmp_path / "plan.html"))
    assert found["machine"]["mfu"]["fp16"] is None
    assert re.search(r"fp16 +│? *10.* GFLOP/s", told), told


def test_the_page_holds_all_that_is_printed_and_a_bar_for_every_part_of_memory(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    rates.keep(2, RATES)
    target = tmp_path / "plan.html"
    found, printed = planned(str(tmp_path / "model"), threads=2, rows=100, html=str(target))
    page = target.read_text(encoding="utf-8")
    for run in found["runs"]:
        for part, count in run["memory"].items():
            assert f'title="{part} {format_bytes(count)}"' in page
    assert page.count("<h2>") == 9
    marked = next(run for row in found["methods"] for run in row["runs"] if row["name"] == "lora:dora")
    assert f">{marked['peak_bytes'] / MIB:,.0f}</td>" in page
    assert found["advice"] in page and "40% assumed" in page
    for cell in ("the whole run", "lora, r = 256", "GGUF Q4_K_M", "bits a parameter"):
        assert cell in printed and cell in page
