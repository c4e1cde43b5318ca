"""config.json alone -> names and shapes of all parameters, for families whose architecture is known. No torch.

For planning a model before its weights are there. Names are transformers'; tests hold every family against the model
that transformers builds from the same config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorafit.errors import ModelError, listed

Shapes = dict[str, tuple[int, ...]]
Config = Mapping[str, Any]


def shapes_of(config: Config, model_type: str) -> Shapes:
    """Every parameter's shape, a tied head left out. Raises ModelError for another family, or a missing size."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"the shapes of a {model_type!r} are not known from its config.json alone; known are {listed(FAMILIES)}",
            "Give a directory that has its weights, or their headers, too",
        )
    try:
        return FAMILIES[model_type](config)
    except KeyError as error:
        raise ModelError(f"config.json states no {error}", "Download it again") from None


def _llama(
    config: Config, qkv_bias: bool = False, qk_norm: bool = False, fused: bool = False, more_norms: bool = False
) -> Shapes:
    """Llama and what is built like it: RMS norms, gated MLP, grouped queries."""
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or hidden // heads
    q, kv = heads * dim, kv_heads * dim
    block: Shapes = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if more_norms:
        block |= {"pre_feedforward_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,)}
    if fused:
        linear: Shapes = {"self_attn.qkv_proj": (q + 2 * kv, hidden), "mlp.gate_up_proj": (2 * wide, hidden)}
    else:
        linear = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
        linear |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden)}
    linear |= {"self_attn.o_proj": (hidden, q), "mlp.down_proj": (hidden, wide)}
    block |= {f"{name}.weight": shape for name, shape in linear.items()}
    biased = [name for name in linear if _has_bias(name, config, qkv_bias)]
    block |= {f"{name}.bias": linear[name][:1] for name in biased}
    if qk_norm:
        block |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    return _whole(config, block, layers, hidden)


def _has_bias(name: str, config: Config, qkv_bias: bool) -> bool:
    if name.startswith("mlp."):
        return bool(config.get("mlp_bias"))
    return bool(config.get("attention_bias")) or (qkv_bias and not name.endswith("o_proj"))


def _whole(config: Config, block: Shapes, layers: int, hidden: int) -> Shapes:
    vocab = config["vocab_size"]
    found: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    found |= {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in block.items()}
    found["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        found["lm_head.weight"] = (vocab, hidden)
    return found


def _gemma(config: Config, **how: bool) -> Shapes:
    return _llama({"tie_word_embeddings": True, **config}, **how)


def _gpt2(config: Config) -> Shapes:
    """GPT-2, whose linear layers store (in, out)."""
    hidden, layers = config["n_embd"], config["n_layer"]
    wide = config.get("n_inner") or 4 * hidden
    block: Shapes = {}
    for name, into, out in (
        ("attn.c_attn", hidden, 3 * hidden),
        ("attn.c_proj", hidden, hidden),
        ("mlp.c_fc", hidden, wide),
        ("mlp.c_proj", wide, hidden),
    ):
        block |= {f"{name}.weight": (into, out), f"{name}.bias": (out,)}
    for name in ("ln_1", "ln_2"):
        block |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    found: Shapes = {
        "transformer.wte.weight": (config["vocab_size"], hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
    }
    found |= {f"transformer.h.{n}.{name}": shape for n in range(layers) for name, shape in block.items()}
    return found | {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}


FAMILIES: dict[str, Callable[[Config], Shapes]] = {
    "llama": _llama,
    "mistral": _llama,
    "smollm3": _llama,
    "granite": _llama,
    "qwen2": lambda config: _llama(config, qkv_bias=True),
    "qwen3": lambda config: _llama(config, qk_norm=True),
    "phi3": lambda config: _llama(config, fused=True),
    "gemma": _gemma,
    "gemma2": lambda config: _gemma(config, more_norms=True),
    "gemma3_text": lambda config: _gemma(config, more_norms=True, qk_norm=True),
    "gpt2": _gpt2,
}
