"""Shapes from a config alone, against the parameters of the models that transformers builds from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from lorafit.errors import ModelError
from lorafit.model.shapes import FAMILIES, shapes_of

LLAMA: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "smollm3": "SmolLM3", "granite": "Granite", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "phi3": "Phi3", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "gpt2": "GPT2",
}  # fmt: skip
MORE = {"llama": [{"attention_bias": True}, {"mlp_bias": True, "head_dim": 10}, {"tie_word_embeddings": True}]}


@pytest.mark.parametrize(
    ("family", "more"), [(name, more) for name in FAMILIES for more in [{}, *MORE.get(name, [])]], ids=str
)
def test_a_family_has_the_parameters_that_transformers_builds(family: str, more: dict[str, Any]) -> None:
    name = CLASSES[family]
    sizes = GPT2 if family == "gpt2" else LLAMA
    config = getattr(transformers, f"{name}TextConfig" if family == "gemma3_text" else f"{name}Config")(**sizes, **more)
    model_class = getattr(transformers, "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM")
    with torch.device("meta"):
        model = model_class(config)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == shapes_of(config.to_dict(), family)


def test_another_family_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ModelError, match=r"'mamba' are not known from its config.json alone; known are llama"):
        shapes_of({}, "mamba")


def test_a_config_without_a_size_is_refused() -> None:
    with pytest.raises(ModelError, match="states no 'intermediate_size'"):
        shapes_of({"hidden_size": 3}, "llama")
