"""Safetensors directories, what is refused, and SmolLM2 whole against transformers' own GGUF loader."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorafit.errors import ModelError
from lorafit.model import gguf_tokenizer, spec
from lorafit.model.load import load


@pytest.fixture
def model_dir(hf_of, gguf_of):
    """A directory with weights, config and tokenizer."""
    from lorafit.model import gguf_header

    path = hf_of()
    gguf_tokenizer.build(gguf_header.read_header(gguf_of())).save_pretrained(path)
    return path


def refused(path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        load(spec.read(str(path)), torch.float32)
    assert "\n" not in str(caught.value)


def edit_config(path, **changes) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_directory_gives_the_saved_model(model_dir, tiny_models) -> None:
    read = spec.read(str(model_dir))
    loaded = load(read, torch.float32)
    assert loaded.spec is read
    assert not loaded.model.training
    expected = tiny_models("llama").state_dict()
    assert all(torch.equal(expected[k], v) for k, v in loaded.model.state_dict().items())
    assert sum(p.numel() for p in loaded.model.parameters()) == read.parameters
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("hello the")) == "hello the"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_asked_one(dtype, model_dir) -> None:
    model = load(spec.read(str(model_dir)), dtype).model
    assert {dtype} == {p.dtype for p in model.parameters()}


def test_unset_maximal_length_becomes_the_models(model_dir) -> None:
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": int(1e30)}))
    assert load(spec.read(str(model_dir)), torch.float32).tokenizer.model_max_length == 256


def test_missing_parameter_is_refused(model_dir) -> None:
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    refused(model_dir, r"lacks 1 parameters: model\.norm\.weight")


def test_parameter_of_another_shape_is_refused(model_dir) -> None:
    weights = load_file(model_dir / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    refused(model_dir, r"has in another shape 1 parameters: model\.norm\.weight")


def test_unused_tensor_is_counted(model_dir, caplog) -> None:
    weights = load_file(model_dir / "model.safetensors")
    weights["model.extra.weight"] = torch.ones(7)
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING, "lorafit"):
        load(spec.read(str(model_dir)), torch.float32)
    assert "1 tensors are not used: model.extra.weight" in caplog.text
    assert "LOAD REPORT" not in caplog.text


def test_directory_without_tokenizer_is_refused(hf_of) -> None:
    refused(hf_of(), "the tokenizer of .* cannot be read")


def test_own_code_never_runs_unless_trusted(model_dir) -> None:
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit_config(model_dir, model_type="own", auto_map=auto_map)
    (model_dir / "configuration_own.py").write_text(f"open({str(model_dir / 'ran')!r}, 'w')")
    refused(model_dir, r"code of its own \(configuration_own\.py, modeling_own\.py\).*--trust-remote-code")
    assert not (model_dir / "ran").exists()


def test_own_code_is_not_needed_where_transformers_knows_the_architecture(model_dir) -> None:
    edit_config(model_dir, auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (model_dir / "configuration_own.py").write_text(f"open({str(model_dir / 'ran')!r}, 'w')")
    load(spec.read(str(model_dir)), torch.float32)
    assert not (model_dir / "ran").exists()


def test_architecture_that_nobody_knows_is_refused(model_dir) -> None:
    edit_config(model_dir, model_type="own")
    refused(model_dir, "the config of .* cannot be read")


def test_encoder_is_refused(tmp_path) -> None:
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "is no causal language model but BertForMaskedLM")


def test_smollm2_equals_transformers_own_gguf_loader_bitwise(tmp_path) -> None:
    read = spec.read("smollm2-135m")
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        read.path.parent, gguf_file=read.path.name, dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    loaded = load(read, torch.float32)
    ours = dict(loaded.model.named_parameters())
    theirs = dict(expected.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(parameter, ours[name]) for name, parameter in theirs.items())
    assert sum(p.numel() for p in ours.values()) == read.parameters
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert dict(loaded.model.named_buffers()).keys() == dict(expected.named_buffers()).keys()
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffer, dict(loaded.model.named_buffers())[name])


def test_gguf_of_one_directory_and_the_file_itself_are_one_model(gguf_of, tmp_path) -> None:
    path = gguf_of()
    (tmp_path / "alone").mkdir()
    shutil.copy(path, tmp_path / "alone")
    assert spec.read(str(tmp_path / "alone")).tensors == spec.read(str(path)).tensors
