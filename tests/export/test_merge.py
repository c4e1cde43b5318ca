"""Merging: the same logits, a plain Hugging Face directory, and a refusal where the model does not allow it."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorafit.errors import AdapterError, MergeError, RunDirError
from lorafit.export.merge import ProbeDifference, check_output, merge_into_base, save_merged, tolerance
from lorafit.lora.inject import attach, lora_layers, set_scale
from tests import tiny

IDS = torch.randint(258, (2, 11), generator=torch.Generator().manual_seed(1))


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=20, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    return GPT2LMHeadModel(config).eval()


MODELS = {"llama, tied": lambda: llama(tied=True), "llama, untied": lambda: llama(tied=False), "gpt2": gpt2}
TARGETS = {
    "linear layers": {name: "all-linear" for name in MODELS},
    "embeddings": {"llama, tied": "embed_tokens", "llama, untied": ["embed_tokens", "lm_head"], "gpt2": ["wte", "wpe"]},
}
CASES = [(model, what, "lora") for what in TARGETS for model in MODELS]
CASES += [(model, "linear layers", "dora") for model in MODELS] + [("llama, untied", "embeddings", "dora")]


def adapt(model: nn.Module, targets: str | list[str], variant: str = "lora") -> nn.Module:
    """An adapter that changes the logits a good deal."""
    attach(
        model,
        r=3,
        alpha=7,
        targets=targets,
        variant=variant,
        rule="alpha/r",
        init="kaiming",
        dropout=0.1,
        rank_pattern={},
        alpha_pattern={},
        layers=None,
        seed=0,
    )
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        if layer.tied_to is None:
            nn.init.normal_(layer.get_parameter("lora_B"), std=0.1, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.double()


def difference(expected: Tensor, got: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def keys(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(("name", "what", "variant"), CASES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_merged_directory_loads_in_plain_transformers_with_the_adapted_models_logits(
    name, what, variant, scale, tmp_path
):
    untuned = logits(MODELS[name]())
    model = adapt(MODELS[name](), TARGETS[what][name], variant)
    set_scale(model, scale)
    expected = logits(model)
    found = merge_into_base(model, tiny.tokenizer())
    assert found.explained and found.tolerance == tolerance(model)
    saved = save_merged(model, tiny.tokenizer(), tmp_path / "merged", torch.float32)
    assert saved.difference == 0.0
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "merged").iterdir()} == {0o644}

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")

    assert type(plain) is type(model)
    assert plain.dtype == torch.float32
    assert torch.equal(logits(plain), logits(model))
    assert difference(expected, untuned) > 1e3 * tolerance(model)
    assert difference(expected, logits(plain)) <= tolerance(model)
    is_tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert is_tied == (name != "llama, untied")
    assert ("lm_head.weight" in keys(tmp_path / "merged")) == (name == "llama, untied")
    assert not [key for key in keys(tmp_path / "merged") if "lora" in key or ".base." in key]


@pytest.mark.parametrize(
    ("dtype", "eps32", "eps"),
    [
        (torch.float64, 2.0**-52, 2.0**-52),
        (torch.float32, 2.0**-23, 2.0**-23),
        (torch.bfloat16, 2.0**-23, 2.0**-7),
    ],
)
def test_the_tolerance_is_the_derived_one(dtype, eps32, eps):
    longest_sum, layers = 48, 2 * 7 + 2  # seven projections a block, the embedding and the head
    expected = 2 * (eps32 * math.sqrt(longest_sum * layers) + eps * math.sqrt(layers))
    assert tolerance(llama(tied=True).to(dtype)) == pytest.approx(expected)
    assert tolerance(adapt(llama(tied=True).to(dtype), "all-linear")) == pytest.approx(expected)


def test_nothing_of_the_adapter_is_left_in_the_model():
    model, plain = adapt(llama(tied=True), "all-linear"), llama(tied=True)
    merge_into_base(model, None)
    assert not lora_layers(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_scale_zero_merges_to_the_base_bitwise():
    model, plain = adapt(llama(tied=False), "all-linear"), llama(tied=False)
    set_scale(model, 0)
    assert merge_into_base(model, None).difference == 0
    assert torch.equal(logits(model), logits(plain))


def test_a_model_in_training_mode_is_probed_without_dropout_and_stays_in_it():
    model = adapt(gpt2(), "all-linear").train()
    modes = {name: module.training for name, module in model.named_modules()}
    assert merge_into_base(model, None).explained
    assert all(module.training == modes[name] for name, module in model.named_modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_a_cast_is_reported_and_each_weight_is_rounded_once(name, dtype, tmp_path):
    model = adapt(MODELS[name](), "all-linear")
    merge_into_base(model, None)
    merged = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    moved = save_merged(model, tiny.tokenizer(), tmp_path / "merged", dtype)

    assert 0 < moved.difference <= moved.tolerance < 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == dtype
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
    assert all(torch.equal(tensor, merged[key].to(dtype)) for key, tensor in plain.state_dict().items())
    assert torch.equal(logits(plain), logits(model))


def test_a_half_precision_base_is_merged_within_its_own_rounding():
    model = adapt(llama(tied=True).bfloat16(), "all-linear")
    found = merge_into_base(model, tiny.tokenizer())
    assert 0 < found.difference <= found.tolerance < 0.1


def test_weights_that_leave_half_precision_behind_are_refused(tmp_path):
    model = llama(tied=False)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e6)
    with pytest.raises(MergeError, match="logits are not finite in float16"):
        save_merged(model, None, tmp_path / "merged", torch.float16)
    assert not (tmp_path / "merged").exists()


class TwoPlaces(LlamaForCausalLM):
    """A model that uses a weight in a second place, where no adapter follows: merging changes what it computes."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        gate = self.model.layers[0].mlp.gate_proj.weight
        return type(output)(logits=output.logits * gate.norm())


def test_a_model_that_merging_would_change_is_refused_and_left_as_it_was():
    model = adapt(TwoPlaces(llama(tied=True).config).eval(), "all-linear")
    before, expected = {k: t.clone() for k, t in model.state_dict().items()}, logits(model)
    with pytest.raises(MergeError, match="and rounding explains"):
        merge_into_base(model, None)
    assert len(lora_layers(model)) == 14
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_logits_that_are_not_a_number_are_refused():
    model = adapt(llama(tied=True), "q_proj")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(MergeError):
        merge_into_base(model, None)
    assert lora_layers(model)
    assert not ProbeDifference(math.nan, 1.0).explained


def test_a_model_without_an_adapter_is_not_merged():
    with pytest.raises(AdapterError, match="the model has no adapter to merge"):
        merge_into_base(llama(tied=True), None)


def test_a_model_with_its_adapter_still_on_is_not_saved_as_merged(tmp_path):
    with pytest.raises(AdapterError, match="the model still has its adapter"):
        save_merged(adapt(llama(tied=True), "q_proj"), None, tmp_path / "merged", torch.float32)
    assert not (tmp_path / "merged").exists()


def test_the_tokenizer_and_its_chat_template_are_saved_with_it(tmp_path):
    model = adapt(llama(tied=True), "q_proj")
    merge_into_base(model, None)
    save_merged(model, tiny.tokenizer(), tmp_path / "merged", torch.float32)
    messages = [{"role": "user", "content": "Hi"}]
    expected = tiny.tokenizer().apply_chat_template(messages)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(messages) == expected


# --- the output directory -------------------------------------------------------------------------------------------


def test_a_directory_that_holds_something_is_refused_and_an_empty_one_is_filled(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    model = llama(tied=True)
    with pytest.raises(RunDirError, match="full already holds files"):
        save_merged(model, None, tmp_path / "full", torch.float32)
    with pytest.raises(RunDirError, match="file is a file"):
        save_merged(model, None, tmp_path / "file", torch.float32)
    check_output(tmp_path / "new")
    save_merged(model, None, tmp_path / "empty", torch.float32)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_full_disk_leaves_nothing_half_written(call, tmp_path, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises(RunDirError, match="the disk is full"):
            save_merged(llama(tied=True), tiny.tokenizer(), tmp_path / "merged", torch.float32)
    assert list(tmp_path.iterdir()) == []
