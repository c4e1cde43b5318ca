"""A GGUF file written from a model is that model again."""

from __future__ import annotations

import logging

import gguf
import pytest
import torch

from lorafit.errors import ModelError
from lorafit.model import gguf_header, gguf_tensors, spec
from lorafit.model.load import load

NAMES = [
    "llama", "llama_untied_biased", "llama_wide_heads", "llama_rope3", "llama_linear", "mistral", "qwen2",
    "qwen2_yarn", "qwen3", "gemma3",
]  # fmt: skip
IDS = torch.arange(24).reshape(1, 24) * 7 % 200 + 3  # longer than gemma3's sliding window of 8


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", NAMES)
def test_f32_file_gives_the_same_logits_bitwise(name, gguf_of, tiny_models) -> None:
    loaded = load(spec.read(str(gguf_of(name))), torch.float32)
    assert torch.equal(logits(tiny_models(name)), logits(loaded.model))
    assert not loaded.model.training


@pytest.mark.parametrize("name", NAMES)
def test_spec_counts_what_the_model_has(name, gguf_of, tiny_models) -> None:
    read = spec.read(str(gguf_of(name)))
    assert sum(p.numel() for p in tiny_models(name).parameters()) == read.parameters
    assert set(dict(tiny_models(name).named_parameters())) == set(read.tensors)
    assert read.storage == {"F32": read.parameters}
    assert read.weight_bytes >= 4 * read.parameters


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16", "BF16", "Q5_0"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_quantized_file_is_unpacked_and_in_the_models_order(name, kind, gguf_of, tiny_models) -> None:
    loaded = load(spec.read(str(gguf_of(name, kind))), torch.float32)
    quantized = gguf.GGMLQuantizationType[kind]
    for key, original in tiny_models(name).named_parameters():
        found = loaded.model.get_parameter(key)
        # quantizing row by row commutes with the order of rows, so the expected needs no permutation
        stored = gguf.quants.quantize(original.detach().numpy(), quantized) if original.ndim == 2 else None
        expected = original if stored is None else torch.from_numpy(gguf.quants.dequantize(stored, quantized))
        assert torch.equal(expected, found), key


@pytest.mark.parametrize("kind", sorted(gguf_tensors.UNPACK))
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_unpacking_equals_the_gguf_package_bitwise(kind, rows, tmp_path) -> None:
    quantized = gguf.GGMLQuantizationType[kind]
    values = torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)).numpy()
    values[0, :32] = 0  # a block whose scale is 0
    stored = gguf.quants.quantize(values, quantized)
    (tmp_path / "raw").write_bytes(b"pad!" + stored.tobytes())
    info = gguf_header.TensorInfo("w", (rows, 96), kind, 4, stored.nbytes)
    expected = torch.from_numpy(gguf.quants.dequantize(stored, quantized).copy()).reshape(rows, 96)
    assert torch.equal(expected, gguf_tensors.read_tensor(tmp_path / "raw", info))


def test_loading_keeps_the_number_of_threads(gguf_of) -> None:
    before = torch.get_num_threads()
    load(spec.read(str(gguf_of())), torch.float32)
    assert before == torch.get_num_threads()


def test_loading_twice_is_identical(gguf_of) -> None:
    read = spec.read(str(gguf_of("llama", "Q4_1")))
    first, second = (load(read, torch.bfloat16).model.state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bf16_rounds_after_unpacking(name, gguf_of) -> None:
    read = spec.read(str(gguf_of(name, "Q4_1")))
    exact, rounded = (load(read, dtype).model for dtype in (torch.float32, torch.bfloat16))
    assert rounded.config.dtype == torch.bfloat16
    for key, parameter in exact.named_parameters():
        assert torch.equal(parameter.bfloat16(), rounded.get_parameter(key)), key


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_spec_from_gguf_equals_spec_from_config_json(name, gguf_of, hf_of) -> None:
    shared = (
        "architecture", "layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "max_positions",
        "tied", "parameters", "tensors",
    )  # fmt: skip
    of_hf, of_gguf = spec.read(str(hf_of(name))), spec.read(str(gguf_of(name)))
    assert {k: getattr(of_hf, k) for k in shared} == {k: getattr(of_gguf, k) for k in shared}


def test_dequantised_model_is_saved_and_loaded_as_safetensors(gguf_of, tmp_path) -> None:
    loaded = load(spec.read(str(gguf_of("qwen2", "Q8_0"))), torch.float32)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load(spec.read(str(tmp_path / "saved")), torch.float32)
    assert torch.equal(logits(loaded.model), logits(again.model))
    assert not hasattr(again.model.config, "quantization_config")


def test_tensor_of_no_known_name_is_refused(gguf_of, tiny_models, tmp_path) -> None:
    path = gguf_of()
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ModelError, match=r"has 1 tensors unknown to llama: blk.1.ffn_xx.weight"):
        load(spec.read(str(path)), torch.float32)


def test_missing_tensor_is_refused(tmp_path, gguf_of) -> None:
    path = gguf_of()
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.2.ffn_up.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 parameters: model.layers.1.mlp.up_proj.weight"):
        load(spec.read(str(path)), torch.float32)


def test_sizes_that_contradict_the_tensors_are_refused(gguf_of) -> None:
    path = gguf_of()
    key = b"llama.attention.head_count\x04\x00\x00\x00"
    data = path.read_bytes()
    assert key in data
    path.write_bytes(data.replace(key + b"\x04", key + b"\x07"))
    with pytest.raises(
        ModelError, match=r"the weights of .* cannot be read: .*not a multiple of the number of attention heads \(7\)"
    ):
        load(spec.read(str(path)), torch.float32)


def test_another_architecture_goes_through_transformers_with_a_note(gguf_of, tiny_models, caplog) -> None:
    read = spec.read(str(gguf_of("gpt2")))
    with caplog.at_level(logging.WARNING, "lorafit"):
        loaded = load(read, torch.float32)
    assert read.architecture == "gpt2"
    assert sum(p.numel() for p in tiny_models("gpt2").parameters()) == read.parameters
    assert torch.equal(logits(tiny_models("gpt2")), logits(loaded.model))
    assert "architecture gpt2 is read by transformers' own GGUF loader" in caplog.text


def test_model_that_transformers_dequantised_can_be_saved(gguf_of, tmp_path) -> None:
    loaded = load(spec.read(str(gguf_of("gpt2", "Q8_0"))), torch.float32)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load(spec.read(str(tmp_path / "saved")), torch.float32)
    assert torch.equal(logits(loaded.model), logits(again.model))
