"""A GGUF header as the config.json of the same model: llama.cpp's keys under transformers' names. No torch.

Sources: llama.cpp's conversion/*.py (what the converter writes) and src/models/*.cpp (what it computes with it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lorafit.errors import ModelError
from lorafit.model.gguf_header import Header

GEMMA3_LOCAL_THETA = 10_000.0  # llama.cpp: rope base of sliding layers, where the file states none
GEMMA3_PATTERN = 6  # every sixth layer attends to everything
GEMMA3_27B_LAYERS = 62  # the one size that scales queries by hidden / heads instead of head_dim
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_FREQS = "rope_freqs.weight"


def config_dict(header: Header) -> dict[str, Any]:
    """The model's config as transformers spells it.

    For an architecture outside `ARCHITECTURES` it holds only what all of them share, under llama.cpp's own name
    of the architecture: enough for a ModelSpec, not for building the model. Raises ModelError if a size is missing.
    """
    common = _common(header)
    extend = ARCHITECTURES.get(header.architecture)
    return common | extend(header, common) if extend else common


def unsupported(header: Header) -> str:
    """Why this file is not read by our own loader, or nothing."""
    if header.architecture not in ARCHITECTURES:
        return f"architecture {header.architecture}"
    if header.get("expert_count", 0):
        return "mixture of experts"
    if header.architecture == "llama" and ("blk.0.attn_q.bias" in header.tensors) != (
        "blk.0.attn_output.bias" in header.tensors
    ):
        return "biases in the query and not in the output projection"
    return ""


def _common(header: Header) -> dict[str, Any]:
    layers, hidden = _size(header, "block_count"), _size(header, "embedding_length")
    heads = _size(header, "attention.head_count", 0)
    ids = {name: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKEN_IDS.items()}
    return {
        "model_type": header.architecture,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": _size(header, "feed_forward_length", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(header, "attention.head_count_kv", heads),
        "head_dim": _size(header, "attention.key_length", hidden // heads if heads else 0),
        "vocab_size": _vocab(header),
        "max_position_embeddings": _size(header, "context_length", 0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **ids,
    }


TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _size(header: Header, key: str, default: int | None = None) -> int:
    """An integer key; of a list with one entry a layer, the largest. Raises ModelError if it is needed and missing."""
    value = header.get(key, default)
    value = max(value) if isinstance(value, list) and value else value
    if not isinstance(value, int):
        raise ModelError(f"{header.path} states no {header.architecture}.{key} (got {value!r})", "Convert it again")
    return value


def _vocab(header: Header) -> int:
    if "token_embd.weight" in header.tensors:
        return header.tensors["token_embd.weight"].shape[0]
    return _size(header, "vocab_size", 0)


def _shortest(value: float) -> float:
    """The shortest decimal with the same float32: 9.999999747378752e-06 was 1e-05 before it was stored."""
    return float(str(np.float32(value)))


def _decoder(header: Header) -> dict[str, Any]:
    """What the four decoder families share."""
    eps = header.get("attention.layer_norm_rms_epsilon")
    if eps is None:
        raise ModelError(f"{header.path} states no attention.layer_norm_rms_epsilon", "Convert it again")
    return {"rms_norm_eps": _shortest(eps), "rope_parameters": _rope(header)}


def _llama(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    # the converter of llama writes the head's size as the number of rotated dimensions
    head_dim = header.get("attention.key_length", header.get("rope.dimension_count", common["head_dim"]))
    return _decoder(header) | {
        "architectures": ["LlamaForCausalLM"],
        "head_dim": head_dim,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


def _qwen2(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    return _decoder(header) | {"architectures": ["Qwen2ForCausalLM"]}


def _qwen3(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    bias = "blk.0.attn_q.bias" in header.tensors
    return _decoder(header) | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": bias}


def _gemma3(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    layers, heads = common["num_hidden_layers"], common["num_attention_heads"]
    is_27b = layers == GEMMA3_27B_LAYERS
    local_theta = _shortest(header.get("rope.freq_base_swa", GEMMA3_LOCAL_THETA))
    decoder = _decoder(header)
    return decoder | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "query_pre_attn_scalar": common["hidden_size"] // heads if is_27b else common["head_dim"],
        "sliding_window": _size(header, "attention.sliding_window"),
        "layer_types": _layer_types(header, layers),
        "final_logit_softcapping": header.get("final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": decoder["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
    }


def _layer_types(header: Header, layers: int) -> list[str]:
    pattern = header.get("attention.sliding_window_pattern", GEMMA3_PATTERN)
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
    return ["sliding_attention" if sliding else "full_attention" for sliding in pattern]


def _rope(header: Header) -> dict[str, Any]:
    """`rope_parameters`. Raises ModelError for a scaling that cannot be stated exactly."""
    theta = {"rope_theta": _shortest(header.get("rope.freq_base", 10_000.0))}
    if ROPE_FREQS in header.tensors:
        return theta | _llama3_rope(header, theta["rope_theta"])
    kind = header.get("rope.scaling.type", "none")
    if kind == "none":
        return theta | {"rope_type": "default"}
    factor = {"rope_type": kind, "factor": _shortest(header.get("rope.scaling.factor", 1.0))}
    if kind == "linear":
        return theta | factor
    if kind == "yarn" and (original := header.get("rope.scaling.original_context_length")):
        return theta | factor | {"original_max_position_embeddings": original}
    raise ModelError(
        f"{header.path} scales its rotary positions by {kind!r}; known for a GGUF are linear, yarn and llama3",
        "Use the safetensors version of the model",
    )


def _llama3_rope(header: Header, theta: float) -> dict[str, Any]:
    """Llama 3.1's scaling, of which a GGUF keeps only the resulting divisor of each frequency.

    The largest divisor is the factor; the other three constants are the same in every Llama 3, which is checked.
    """
    info = header.tensors[ROPE_FREQS]
    if info.type != "F32":
        raise ModelError(f"{header.path}: {ROPE_FREQS} is stored as {info.type}, not F32", "Convert it again")
    stored = np.fromfile(header.path, "<f4", info.shape[0], offset=info.offset)
    rope = {"rope_type": "llama3", "factor": _shortest(float(stored.max())), **LLAMA3_ROPE}
    if not np.allclose(stored, llama3_divisors(theta, 2 * len(stored), rope), rtol=1e-4):
        raise ModelError(
            f"{header.path} scales its rotary positions in a way that is not Llama 3's",
            "Use the safetensors version of the model",
        )
    return rope


def llama3_divisors(theta: float, head_dim: int, rope: dict[str, Any]) -> np.ndarray[Any, Any]:
    """(head_dim / 2,): what each rotary frequency is divided by. Source: Llama 3.1's reference `apply_scaling`."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / (2 * math.pi) * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: np.ndarray[Any, Any] = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return divisors


ARCHITECTURES: dict[str, Callable[[Header, dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
}
