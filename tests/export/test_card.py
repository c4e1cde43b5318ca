"""The model card says what run.json holds, and nothing else."""

from __future__ import annotations

import yaml

from lorafit.export.card import render

RESULT = {
    "model": "smollm2-135m",
    "data": "train.jsonl",
    "method": "lora",
    "variant": "dora",
    "r": 16,
    "alpha": 32.0,
    "train_s": 65.0,
    "load_s": 3.25,
    "steps": 1200,
    "skipped_steps": [],
    "stopped_early": False,
    "tokens_seen": 40938,
    "tokens_supervised": 1234,
    "tokens_computed": 50000,
    "peak_rss_bytes": 3 << 29,
    "predicted_peak_bytes": 1 << 30,
    "trainable_params": 1000,
    "total_params": 200_000,
    "train_loss": 0.51234,
    "eval_loss": None,
    "best_step": None,
    "seed": 0,
    "precision": "bf16",
    "threads": 2,
    "system": "Be | brief.\nBe kind.",
    "versions": {"python": "3.11.2", "torch": "2.13.0"},
    "data_sha256": "d" * 64,
    "model_sha256": "e" * 64,
}


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_front_matter_is_what_hugging_face_reads():
    assert front_matter(render(RESULT)) == {
        "base_model": "smollm2-135m",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lorafit", "lora", "dora"],
    }


def test_a_tag_stands_once_and_odd_names_are_quoted():
    matter = front_matter(render(RESULT | {"variant": "lora", "model": 'C: #1 "x"'}))
    assert matter["tags"] == ["lorafit", "lora"]
    assert matter["base_model"] == 'C: #1 "x"'


def test_measured_figures_stand_with_their_units():
    card = render(RESULT)
    for line in (
        "| trainable parameters | 1,000 of 200,000 (0.50%) |",
        "| training loss of the last step | 0.5123 |",
        "| training time | 1 min 05 s |",
        "| loading time | 3.25 s |",
        "| peak memory | 1.50 GiB |",
        "| optimizer steps | 1,200 |",
        "| torch | 2.13.0 |",
        "| r | 16 |",
        "| alpha | 32.0 |",
        "| seed | 0 |",
        f"| data | {'d' * 64} |",
    ):
        assert line in card.splitlines()


def test_what_was_not_measured_is_not_claimed():
    card = render(RESULT)
    assert "None" not in card
    for words in ("held-out", "skipped", "stopped"):
        assert words not in card


def test_an_evaluation_and_what_went_wrong_are_told():
    card = render(RESULT | {"eval_loss": 0.25, "best_step": 20, "skipped_steps": [3, 4], "stopped_early": True})
    assert "| best held-out loss | 0.2500 |" in card
    assert "| step of the best held-out loss | 20 |" in card
    assert "| steps skipped, not finite | 2 |" in card
    assert "| stopped early | yes" in card


def test_text_of_the_user_does_not_break_the_table():
    assert r"| system message of all rows | Be \| brief.<br>Be kind. |" in render(RESULT).splitlines()


def test_the_commands_to_use_it_are_there():
    card = render(RESULT)
    for command in (
        "lorafit eval . train.jsonl --rows 100",
        "lorafit chat .",
        "lorafit merge . -o merged",
        "PeftModel.from_pretrained",
    ):
        assert command in card


SHIPPED = {"base_path": "/m/base.gguf", "base_kind": "gguf", "base_license": "mit", "not_exported": {}}


def test_the_licence_of_the_base_is_stated_or_said_to_be_missing():
    assert front_matter(render(RESULT | SHIPPED))["license"] == "mit"
    assert "| licence of the base | mit |" in render(RESULT | SHIPPED)
    bare = render(RESULT)
    assert "license" not in front_matter(bare) and "state no licence" in bare


def test_what_cannot_be_exported_is_said_in_place_of_a_command():
    refused = {"gguf-lora": "the adapter is of variant dora", "ollama": "the chat template counts"}
    card = render(RESULT | SHIPPED | {"not_exported": refused})
    assert "lorafit export . -o tuned.gguf" in card and "--format gguf-lora" not in card
    assert "Merged only: the adapter is of variant dora." in card
    assert "Not as it is: the chat template counts." in card and "ollama create" not in card
    none = render(RESULT | SHIPPED | {"not_exported": dict.fromkeys(("gguf", "gguf-lora", "ollama"), "it is a gpt2")})
    assert "lorafit export" not in none


def test_an_adapter_beside_its_card_is_named_so():
    card = render(RESULT | SHIPPED, adapter=".")
    assert 'from_pretrained(base, ".")' in card and "beside this file" in card


def test_the_settings_of_the_training_are_there():
    card = render(RESULT | {"settings": {"lr": 0.002, "targets": "all-linear", "max_steps": None}})
    assert "| learning rate | 0.002 |" in card and "| targets | all-linear |" in card and "most steps" not in card


def test_a_method_that_peft_does_not_read_is_not_shown_in_peft():
    card = render(RESULT | {"method": "prefix", "variant": "lora"})
    assert "in lorafit's own format" in card and "PeftModel" not in card and "lorafit chat ." in card
