"""Every sentence with which an adapter directory is refused, and what looks odd and is not."""

from __future__ import annotations

import json

import pytest
import torch

from lorafit.config import LoRAConfig
from lorafit.errors import TargetError
from lorafit.export import peft
from lorafit.lora.inject import lora_layers
from tests import tiny
from tests.export.adapters import KEY, adapted, refused, rewrite, rewrite_tensors

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
        ("lora_bias", True),
        ("layer_replication", [[0, 1], [0, 2]]),
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
