"""Tiny random models of each architecture, and a writer of GGUF files with llama.cpp's names and orders."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

WORDS = ["he", "ll", "hell", "hello", "Ġhello", "Ġw", "Ġwo", "ĠĠ", "th", "the", "Ġthe"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ w", "Ġw o", "Ġ Ġ", "t h", "th e", "Ġ the"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *WORDS, "<think>"]
TYPES = [3] * 3 + [1] * (len(TOKENS) - 4) + [4]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

COMMON = {
    "vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> GGUF architecture, transformers' config class, changes
    "llama": ("llama", "LlamaConfig", {"tie_word_embeddings": True}),
    "llama_untied_biased": ("llama", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("llama", "LlamaConfig", {"head_dim": 32, "rms_norm_eps": 1e-5}),
    "llama_rope3": ("llama", "LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "head_dim": 64}),
    "llama_linear": (
        "llama", "LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("llama", "MistralConfig", {"sliding_window": None}),
    "mistral_window": ("llama", "MistralConfig", {"sliding_window": 16}),
    "qwen2": ("qwen2", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2_yarn": (
        "qwen2", "Qwen2Config",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                             "original_max_position_embeddings": 64}},
    ),
    "qwen3": ("qwen3", "Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": (
        "gemma3", "Gemma3TextConfig",
        {"head_dim": 32, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 32},
    ),
    "gpt2": (  # one that our own loader does not read
        "gpt2", "GPT2Config",
        {"max_position_embeddings": 1024, "num_key_value_heads": None, "intermediate_size": None},
    ),
}  # fmt: skip


def tiny(name: str) -> Any:
    """A random model in float32 and eval mode. Norms and biases are random too: a lost one must be seen."""
    _, config_class, changes = MODELS[name]
    config = getattr(transformers, config_class)(**{**COMMON, **changes})
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("norm.weight") or key.endswith("bias"):
            # multiples of 2^-10, so that Gemma's w + 1 is exact
            parameter.data = (parameter.data + 0.3 * torch.randn_like(parameter)).mul(1024).round().div(1024)
    return model


def write_gguf(path: Path, model: Any, architecture: str, kind: str = "F32", pre: str = "smollm", **more: Any) -> Path:
    """Write `model` as llama.cpp's converter would; matrices in the block format `kind`."""
    writer = gguf.GGUFWriter(path, architecture)
    _write_sizes(writer, model.config, architecture)
    _write_tokenizer(writer, pre, more)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        data = _converted(name, weight, model.config, architecture).numpy()
        quantized = gguf.GGMLQuantizationType[kind if data.ndim == 2 else "F32"]
        writer.add_tensor(_gguf_name(name, architecture), gguf.quants.quantize(data, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    elif architecture != "qwen2":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    _write_rope(writer, config.rope_parameters, head_dim)


def _write_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], head_dim: int) -> None:
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, head_dim))


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """One by one, as llama.cpp's converter of Llama 3.1 works them out."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        longest, shortest = (
            rope["original_max_position_embeddings"] / rope[f"{k}_freq_factor"] for k in ("low", "high")
        )
        if wavelength < shortest:
            divisors.append(1.0)
        elif wavelength > longest:
            divisors.append(rope["factor"])
        else:
            turns = rope["original_max_position_embeddings"] / wavelength
            share = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            divisors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.array(divisors, dtype=np.float32)


def _write_tokenizer(writer: gguf.GGUFWriter, pre: str, more: dict[str, Any]) -> None:
    writer.add_tokenizer_model(more.get("tokenizer_model", "gpt2"))
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(more.get("tokens", TOKENS))
    writer.add_token_types(more.get("types", TYPES))
    if "scores" in more:
        writer.add_token_scores(more["scores"])
    else:
        writer.add_token_merges(more.get("merges", MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    if "add_bos" in more:
        writer.add_add_bos_token(more["add_bos"])
    if "space_prefix" in more:
        writer.add_add_space_prefix(more["space_prefix"])
    writer.add_chat_template(TEMPLATE)


def _converted(name: str, weight: torch.Tensor, config: Any, architecture: str) -> torch.Tensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if architecture == "llama" and heads:
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return weight + 1
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return weight.T.contiguous()
    return weight


def _gguf_name(name: str, architecture: str) -> str:
    """By the tables of the package gguf, not by ours."""
    found = _name_map(architecture).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


@cache
def _name_map(architecture: str) -> gguf.TensorNameMap:
    kind = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    return gguf.get_tensor_name_map(kind, 8)


@pytest.fixture(scope="session")
def tiny_models() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = tiny(name)
        return made[name]

    return get


@pytest.fixture
def gguf_of(tmp_path: Path, tiny_models: Callable[[str], Any]) -> Callable[..., Path]:
    def write(name: str = "llama", kind: str = "F32", **more: Any) -> Path:
        return write_gguf(tmp_path / f"{name}.{kind}.gguf", tiny_models(name), MODELS[name][0], kind, **more)

    return write


@pytest.fixture
def hf_of(tmp_path: Path, tiny_models: Callable[[str], Any]) -> Callable[[str], Path]:
    def write(name: str = "llama") -> Path:
        tiny_models(name).save_pretrained(tmp_path / name)
        return tmp_path / name

    return write
