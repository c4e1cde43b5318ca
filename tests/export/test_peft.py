"""Adapter directories: what is written, that it is written whole, and the sentence that refuses each bad one."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from torch import nn
from transformers import AutoTokenizer

from lorafit.config import LoRAConfig
from lorafit.errors import AdapterError, RunDirError, TargetError
from lorafit.export import peft
from lorafit.lora.inject import attach, lora_layers
from lorafit.lora.variants import VARIANTS

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def adapted(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """The model with an adapter that does something."""
    attach(
        model,
        r=config.r,
        alpha=config.alpha,
        targets=config.targets,
        variant=config.variant,
        rule=config.scaling_rule,
        init=config.init,
        dropout=config.dropout,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        layers=config.layers,
        seed=0,
    )
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.get_parameter("lora_B"), generator=generator)
    return model


CONFIG = LoRAConfig(r=4, alpha=10, targets=["q_proj", "up_proj"])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    peft.save(adapted(tiny.llama(), CONFIG), path, CONFIG, base="the/base", tokenizer=None)
    return path


def rewrite(directory: Path, **fields: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite_tensors(directory: Path, change) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(directory: Path, sentence: str, model: nn.Module | None = None) -> None:
    """Loading is refused with this sentence, and the model is plain and unchanged afterwards."""
    model = model or tiny.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match=re.escape(sentence)):
        peft.load(model, directory)
    assert not lora_layers(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


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


# --- refused: files -------------------------------------------------------------------------------------------------


def test_a_directory_without_an_adapter_is_refused(tmp_path):
    refused(tmp_path, "holds no adapter: it has no adapter_config.json")


def test_a_config_that_is_no_json_is_refused(directory):
    (directory / "adapter_config.json").write_text('{"r": ')
    refused(directory, "adapter_config.json cannot be read")


def test_a_config_that_is_no_object_is_refused(directory):
    (directory / "adapter_config.json").write_text("[1]")
    refused(directory, "adapter_config.json holds a list, not an object")


def test_missing_weights_are_refused(directory):
    (directory / "adapter_model.safetensors").unlink()
    refused(directory, "has no adapter_model.safetensors")


def test_pickled_weights_are_refused_unread(directory):
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(b"anything")
    refused(directory, "holds its weights as adapter_model.bin, a pickle, which may run any code when it is read")


def test_damaged_weights_are_refused(directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    refused(directory, "adapter_model.safetensors cannot be read")


# --- refused: fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("trainable_token_indices", [3]),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("alora_invocation_tokens", [1, 2]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 64}),
        ("a_field_of_the_future", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", 1),
    ],
)
def test_what_lorafit_cannot_apply_is_refused_by_name(field, value, directory):
    rewrite(directory, **{field: value})
    refused(directory, f"adapter_config.json has {field} = {json.dumps(value)}, which lorafit can't apply")


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_field_that_is_empty_is_no_obstacle(value, directory):
    rewrite(directory, a_field_of_the_future=value, modules_to_save=value)
    peft.load(tiny.llama(), directory)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8", None])
def test_a_rank_that_is_none_is_refused(value, directory):
    rewrite(directory, r=value)
    refused(directory, f"adapter_config.json has r = {value!r}; a rank is a whole number of at least 1")
    rewrite(directory, r=4, rank_pattern={"q_proj": value})
    refused(directory, f"rank_pattern['q_proj'] = {value!r}; a rank is a whole number")


@pytest.mark.parametrize("value", [0, -3, 1e30, 4e6 + 1, float("nan"), float("inf"), True, "16"])
def test_an_absurd_alpha_is_refused(value, directory):
    rewrite(directory, lora_alpha=value)
    refused(
        directory, f"adapter_config.json has lora_alpha = {value!r}; with rank 4 it must be above 0 and at most 4e+06"
    )
    rewrite(directory, lora_alpha=8, alpha_pattern={"q_proj": value})
    refused(directory, f"alpha_pattern['q_proj'] = {value!r}; with rank 4")


def test_an_alpha_that_is_absurd_for_its_own_rank_alone_is_refused(directory):
    rewrite(directory, alpha_pattern={"q_proj": 3e6}, rank_pattern={"0.self_attn.q_proj": 2})
    refused(directory, "lora_alpha of model.layers.0.self_attn.q_proj = 3000000.0; with rank 2")


def test_a_large_alpha_is_loaded(directory):
    rewrite(directory, lora_alpha=4_000_000)
    assert peft.load(tiny.llama(), directory).alpha == 4e6


@pytest.mark.parametrize("value", [-0.1, 1, "0", True])
def test_a_dropout_that_is_none_is_refused(value, directory):
    rewrite(directory, lora_dropout=value)
    refused(directory, f"adapter_config.json has lora_dropout = {value!r}; it must be at least 0 and below 1")


@pytest.mark.parametrize("value", [None, [], "", [1]])
def test_targets_that_name_nothing_are_refused(value, directory):
    rewrite(directory, target_modules=value)
    refused(directory, f"adapter_config.json has target_modules = {json.dumps(value)}, which names no module")


def test_targets_of_another_model_are_refused(directory):
    rewrite(directory, target_modules=["c_attn"])
    refused(directory, "target_modules of adapter_config.json match nothing in this model: c_attn")


def test_a_target_that_is_no_layer_is_refused(directory):
    rewrite(directory, target_modules=["mlp"])
    model = tiny.llama()
    with pytest.raises(TargetError, match="LlamaMLP"):
        peft.load(model, directory)
    assert not lora_layers(model)


# --- refused: tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, directory):
    rewrite_tensors(directory, lambda tensors: tensors[KEY].__setitem__((0, 0), value))
    refused(directory, f"{KEY} holds values that are not finite")


def test_a_missing_tensor_is_refused(directory):
    rewrite_tensors(directory, lambda tensors: tensors.pop(KEY))
    refused(directory, f"the adapter does not fit: 1 tensors are missing: {KEY}")


def test_a_tensor_too_many_is_refused(directory):
    rewrite_tensors(directory, lambda tensors: tensors.update({KEY.replace("q_proj", "k_proj"): tensors[KEY].clone()}))
    refused(directory, f"the adapter does not fit: 1 have no place in the model: {KEY.replace('q_proj', 'k_proj')}")


def test_a_key_of_another_spelling_is_refused_with_the_right_one(directory):
    wrong = KEY.replace("lora_A.weight", "lora_A.default.weight")
    rewrite_tensors(directory, lambda tensors: tensors.update({wrong: tensors.pop(KEY)}))
    refused(directory, f"Did you mean {KEY!r}?")


def test_a_key_that_names_no_module_is_refused(directory):
    rewrite_tensors(
        directory, lambda tensors: tensors.update({"nonsense": torch.zeros(1), "x.y.weight": torch.zeros(1)})
    )
    refused(directory, "2 have no place in the model: nonsense, x.y.weight")


def test_a_wrong_shape_is_refused(directory):
    rewrite_tensors(directory, lambda tensors: tensors.update({KEY: torch.zeros(4, 31)}))
    refused(directory, f"{KEY} has shape (4, 31), the model and adapter_config.json want (4, 32)")


def test_a_rank_that_is_not_the_tensors_is_refused(directory):
    rewrite(directory, r=3)
    refused(directory, "has shape (4, 32), the model and adapter_config.json want (3, 32)")


def test_whole_numbers_are_refused(directory):
    rewrite_tensors(directory, lambda tensors: tensors.update({KEY: torch.zeros(4, 32, dtype=torch.int8)}))
    refused(directory, f"{KEY} holds int8, not floats")


def test_half_precision_is_loaded_into_float32(directory):
    rewrite_tensors(directory, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    model = tiny.llama()
    peft.load(model, directory)
    assert {p.dtype for layer in lora_layers(model).values() for p in layer.parameters(recurse=False)} == {
        torch.float32
    }


def test_an_adapter_with_dropout_drops_nothing_in_a_model_that_is_in_eval_mode(tmp_path):
    config = LoRAConfig(r=4, alpha=10, dropout=0.5)
    peft.save(adapted(tiny.llama(), config), tmp_path / "a", config, base="b", tokenizer=None)
    model, ids = tiny.llama(), torch.arange(9)[None]
    assert peft.load(model, tmp_path / "a").dropout == 0.5
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.eval()(ids).logits)


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
