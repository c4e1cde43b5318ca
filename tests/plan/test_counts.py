"""Counts from shapes against the models themselves, and the adapter files that are really written."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from lorafit.config import LoRAConfig
from lorafit.export import peft
from lorafit.lora.variants import VARIANTS
from lorafit.methods import lora
from lorafit.model import spec as model_spec
from lorafit.plan import counts
from lorafit.plan.forecast import ways
from tests import tiny


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=32)).eval()


def test_every_variant_of_the_registry_can_be_counted() -> None:
    assert counts.VARIANT_PARAMS.keys() == VARIANTS.keys()


@pytest.mark.parametrize("variant", counts.VARIANT_PARAMS)
@pytest.mark.parametrize("build", [tiny.llama, gpt2])
def test_predicted_parameters_and_file_are_those_of_a_saved_adapter(build, variant: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = build()
    model.save_pretrained(tmp_path / "model")
    spec = model_spec.read(str(tmp_path / "model"))
    config = LoRAConfig(r=3, alpha=7.0, variant=variant)
    attached = lora.attach(model, config)
    assert counts.VARIANT_PARAMS[variant](spec, 3) == attached.trainable_params
    peft.save(model, tmp_path / "adapter", config, base="b", tokenizer=None)
    written = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert counts.adapter_file_bytes(spec, variant, 3) == written


def test_parts_add_up_to_all_parameters_and_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    spec = model_spec.read(str(tmp_path / "model"))
    parts = counts.by_part(spec)
    assert sum(parts.values()) == spec.parameters == tiny.llama().num_parameters()
    assert (parts["embeddings"], parts["head"], parts["other"]) == (258 * 32, 0, 0)
    assert parts["norms"] == 5 * 32


def test_a_rank_that_a_layer_cannot_hold_is_shown_as_such(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model")
    found = {one.method: one for one in counts.trainable(model_spec.read(str(tmp_path / "model")))}
    assert found["lora, r = 16"].impossible is None
    assert found["lora, r = 32"].impossible == "4 of its layers hold a rank of at most 16"


def test_an_encoder_is_planned_without_what_it_cannot_do(tmp_path: Path) -> None:
    tiny.bert().save_pretrained(tmp_path)
    found = {one.method: one for one in counts.trainable(model_spec.read(str(tmp_path)), labels=7)}
    assert found["head, 7 labels"].params == 7 * (32 + 1)
    assert [name for name, one in found.items() if one.impossible and "r = " not in name] == [
        "adapter (parallel), width 64",
        "prefix (p-tuning-v2) of 20 tokens",
        "prefix (reparametrised) of 20 tokens",
        "prompt of 20 tokens",
    ]
    assert ways(model_spec.read(str(tmp_path))) == [("bf16", "auto"), ("fp32", "auto")]
