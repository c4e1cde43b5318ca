"""What a model may be that llama.cpp's loader of its architecture cannot be told, and so would compute otherwise.

Source: llama.cpp's src/models/*.cpp and conversion/*.py: which keys are read for which architecture.
"""

from __future__ import annotations

from typing import Any

from lorafit.errors import ModelError
from lorafit.model.gguf_config import GEMMA3_27B_LAYERS, GEMMA3_LOCAL_THETA, GEMMA3_PATTERN

ACTIVATIONS = {"gemma3": ("gelu_pytorch_tanh",)}  # all others: silu
GEMMA3 = "gemma3"
SLIDING = "sliding_attention"


def check(config: Any, architecture: str) -> None:
    """Refuse a model whose file llama.cpp would read as another one. config: of the text model. Raises ModelError."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in ACTIVATIONS.get(architecture, ("silu", "swish")):
        raise _unlike(f"its activation is {activation}")
    if getattr(config, "partial_rotary_factor", None) not in (None, 1, 1.0):
        raise _unlike("it rotates a part of each head only")
    if architecture == GEMMA3:
        _check_gemma3(config)


def _check_gemma3(config: Any) -> None:
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    wanted = config.hidden_size // heads if layers == GEMMA3_27B_LAYERS else config.head_dim
    if config.query_pre_attn_scalar != wanted:
        raise _unlike(f"its queries are scaled by {config.query_pre_attn_scalar}, and there by {wanted}")
    full = [kind != SLIDING for kind in config.layer_types]
    if full != [(layer + 1) % GEMMA3_PATTERN == 0 for layer in range(layers)]:
        raise _unlike(f"not every {GEMMA3_PATTERN}th of its layers alone attends to everything")
    local = config.rope_parameters["sliding_attention"]
    if (local["rope_theta"], local.get("rope_type", "default")) != (GEMMA3_LOCAL_THETA, "default"):
        raise _unlike(f"its sliding layers rotate positions by a base of {local['rope_theta']:g}")
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None):
        raise _unlike("its logits are capped")


def _unlike(why: str) -> ModelError:
    return ModelError(f"llama.cpp cannot be told what this model is: {why}", "Use it in PEFT's format, or merged")


def window(config: Any, architecture: str) -> int | None:
    """Tokens that a layer looks back at, where the model has such layers and llama.cpp's architecture has none."""
    size: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    is_sliding = architecture != GEMMA3 and size is not None and (kinds is None or SLIDING in kinds)
    return size if is_sliding else None


def context_length(config: Any, architecture: str) -> int:
    """The context that a GGUF file states: up to the window there is no difference, beyond it there would be one."""
    longest: int = config.max_position_embeddings
    return min(longest, window(config, architecture) or longest)


def context_remark(config: Any, architecture: str) -> str | None:
    """A line for the user where the file states less context than the model has."""
    config = config.get_text_config()
    stated, longest = context_length(config, architecture), config.max_position_embeddings
    if stated == longest:
        return None
    return (
        f"the model looks back {stated:,} tokens and llama.cpp's {architecture} at all of them: the file states a "
        f"context of {stated:,} instead of {longest:,}, up to which both are the same"
    )
