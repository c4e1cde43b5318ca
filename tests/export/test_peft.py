"""Adapter directories: what is written, that it is written whole, and weights that several modules share."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from lorafit.config import LoRAConfig
from lorafit.errors import AdapterError, RunDirError
from lorafit.export import peft
from lorafit.lora.inject import lora_layers
from lorafit.lora.variants import VARIANTS
from tests import tiny
from tests.export.adapters import CONFIG, KEY, adapted, refused, rewrite, rewrite_tensors

# --- what is written ------------------------------------------------------------------------------------------------


def test_the_config_names_the_exact_modules_and_every_setting(directory):
    fields = json.loads((directory / "adapter_config.json").read_text())
    assert fields == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": "the/base",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 10,
        "target_modules": [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")],
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": "gaussian",
        "bias": "none",
        "fan_in_fan_out": False,
        "ensure_weight_tying": False,
    }


def test_patterns_and_layers_are_resolved_into_single_modules(tmp_path):
    config = LoRAConfig(
        r=4, alpha=9.5, targets=["q_proj", "v_proj"], layers="last:1", rank_pattern={"q_proj": 2},
        alpha_pattern={"*": 3},
    )  # fmt: skip
    peft.save(adapted(tiny.llama(), config), tmp_path / "a", config, base="b", tokenizer=None)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert fields["target_modules"] == names
    assert fields["lora_alpha"] == 9.5
    assert fields["rank_pattern"] == {r"^model\.layers\.1\.self_attn\.q_proj": 2}
    assert fields["alpha_pattern"] == {"^" + name.replace(".", r"\."): 3 for name in names}
    found = peft.load(tiny.llama(), tmp_path / "a")
    assert found.targets == names
    assert found.rank_pattern == {names[0]: 2}
    assert found.alpha_pattern == dict.fromkeys(names, 3.0)


def test_weights_are_contiguous_float32_under_pefts_keys(directory):
    tensors = load_file(directory / "adapter_model.safetensors")
    assert len(tensors) == 8
    assert tensors[KEY].shape == (4, 32)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_tokenizer_and_its_chat_template_stand_beside_the_adapter(tmp_path):
    tokenizer = tiny.tokenizer()
    peft.save(adapted(tiny.llama(), CONFIG), tmp_path / "a", CONFIG, base="b", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "a")
    messages = [{"role": "user", "content": "Hi"}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)


def test_an_adapter_without_layers_is_not_saved(tmp_path):
    with pytest.raises(AdapterError, match="the model has no adapter to save"):
        peft.save(tiny.llama(), tmp_path / "a", CONFIG, base="b", tokenizer=None)


def test_every_variant_has_a_place_in_the_format():
    assert peft.USE_DORA.keys() == VARIANTS.keys()


def test_a_variant_that_the_format_has_no_word_for_is_refused(tmp_path):
    model = adapted(tiny.llama(), CONFIG)
    with pytest.raises(AdapterError, match="PEFT's format has no variant 'tall'"):
        peft.save(model, tmp_path / "a", CONFIG.model_copy(update={"variant": "tall"}), base="b", tokenizer=None)


def test_a_module_in_two_places_is_marked_since_peft_adapts_the_first_alone(tmp_path):
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    config = LoRAConfig(r=2, alpha=5, targets=["0"])
    peft.save(adapted(model, config), tmp_path / "a", config, base="b", tokenizer=None)
    assert peft.read_config(tmp_path / "a").peft_type == "LORAFIT_LORA"


def test_a_name_that_ends_another_is_loaded_into_its_own_place(tmp_path):
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"q": nn.Linear(4, 4), "block": nn.ModuleDict({"q": nn.Linear(4, 4)})})

    config = LoRAConfig(r=2, alpha=5, targets=["re:q"])
    peft.save(adapted(model(), config), tmp_path / "a", config, base="b", tokenizer=None)
    again = model()
    assert peft.load(again, tmp_path / "a").targets == ["re:q"]
    assert list(lora_layers(again)) == ["q"]


# --- written whole, or not at all -----------------------------------------------------------------------------------


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_full_disk_leaves_the_older_adapter_and_nothing_beside_it(call, directory, monkeypatch):
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    model = adapted(tiny.llama(), LoRAConfig(r=2, alpha=5))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises(RunDirError, match="the disk is full"):
            peft.save(model, directory, CONFIG, base="b", tokenizer=None)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
    assert [path.name for path in directory.parent.iterdir()] == ["adapter"]


def test_a_full_disk_leaves_nothing_where_nothing_was(tmp_path, monkeypatch):
    model = adapted(tiny.llama(), CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full_disk)
        with pytest.raises(RunDirError, match="the disk is full"):
            peft.save(model, tmp_path / "run" / "adapter", CONFIG, base="b", tokenizer=tiny.tokenizer())
    assert list((tmp_path / "run").iterdir()) == []


# --- weights of the base, and shared ones ---------------------------------------------------------------------------

EMBEDDING = "base_model.model.model.embed_tokens"
TIED = LoRAConfig(r=4, alpha=10, targets=["embed_tokens", "q_proj"])


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    path = tmp_path / "tied"
    peft.save(adapted(tiny.llama(), TIED), path, TIED, base="b", tokenizer=None)
    return path


def test_a_tied_head_has_the_embeddings_factors_the_other_way_round(tied):
    tensors = load_file(tied / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.lm_head.lora_A.weight"], tensors[f"{EMBEDDING}.lora_embedding_B"].T)
    assert torch.equal(tensors["base_model.model.lm_head.lora_B.weight"], tensors[f"{EMBEDDING}.lora_embedding_A"].T)
    assert json.loads((tied / "adapter_config.json").read_text())["ensure_weight_tying"] is True


def test_embeddings_that_peft_saved_beside_the_adapter_must_be_the_models(tied):
    weight = tiny.llama().get_input_embeddings().weight.detach().clone()
    rewrite_tensors(tied, lambda tensors: tensors.update({f"{EMBEDDING}.base_layer.weight": weight}))
    peft.load(tiny.llama(), tied)
    rewrite_tensors(tied, lambda tensors: tensors.update({f"{EMBEDDING}.base_layer.weight": weight + 1}))
    refused(
        tied, f"the adapter brings its own {EMBEDDING}.base_layer.weight, (258, 32), which differs from the model's"
    )
    rewrite_tensors(tied, lambda tensors: tensors.update({f"{EMBEDDING}.base_layer.weight": weight[:9].clone()}))
    refused(tied, f"the adapter brings its own {EMBEDDING}.base_layer.weight, (9, 32), which differs from the model's")


def test_an_adapter_on_one_of_two_tied_modules_is_refused(tied):
    def drop_the_head(tensors):
        for key in [key for key in tensors if "lm_head" in key]:
            del tensors[key]

    rewrite_tensors(tied, drop_the_head)
    peft.load(tiny.llama(), tied)  # ensure_weight_tying: PEFT would tie the head by itself
    rewrite(tied, ensure_weight_tying=False, target_modules=["embed_tokens", "q_proj"])
    refused(tied, "the adapter changes model.embed_tokens but not lm_head, and in this model both are one weight")


def test_different_adapters_on_tied_modules_are_refused(tied):
    key = "base_model.model.lm_head.lora_A.weight"
    rewrite_tensors(tied, lambda tensors: tensors.update({key: tensors[key] + 1}))
    refused(tied, f"{key} is not the update of model.embed_tokens, and in this model both modules are one weight")


def test_a_convolution_that_peft_trained_without_its_dilation_is_refused(tmp_path):
    plain, dilated = nn.Conv2d(2, 3, 3, padding=2), nn.Conv2d(2, 3, 3, padding=2, dilation=2)
    config = LoRAConfig(r=2, alpha=5, targets=["0"])
    peft.save(adapted(nn.Sequential(plain), config), tmp_path / "a", config, base="b", tokenizer=None)
    refused(
        tmp_path / "a", "0 is a convolution with groups, dilation or a padding mode, for which", nn.Sequential(dilated)
    )
