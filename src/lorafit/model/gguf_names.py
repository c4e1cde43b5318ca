"""llama.cpp's tensor names under the names that transformers gives the same parameters, and back. No torch.

Source: gguf's tensor_mapping.py and llama.cpp's conversion/*.py.
"""

from __future__ import annotations

import re

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3_IN_BLOCK = IN_BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NOT_PARAMETERS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
LAYER = re.compile(r"model\.layers\.(\d+)\.([a-z_.]+)\.(weight|bias)")
BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")


def hf_name(architecture: str, name: str) -> str | None:
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`; None where no name is known."""
    in_block = GEMMA3_IN_BLOCK if architecture == "gemma3" else IN_BLOCK
    if match := BLOCK.fullmatch(name):
        layer, part, kind = match.groups()
        return f"model.layers.{layer}.{in_block[part]}.{kind}" if part in in_block else None
    part, _, kind = name.rpartition(".")
    return f"{OUTSIDE[part]}.{kind}" if part in OUTSIDE else None


def gguf_name(architecture: str, name: str) -> str | None:
    """The same the other way round."""
    in_block = GEMMA3_IN_BLOCK if architecture == "gemma3" else IN_BLOCK
    if match := LAYER.fullmatch(name):
        layer, part, kind = match.groups()
        own = next((ours for ours, theirs in in_block.items() if theirs == part), None)
        return f"blk.{layer}.{own}.{kind}" if own else None
    part, _, kind = name.rpartition(".")
    own = next((ours for ours, theirs in OUTSIDE.items() if theirs == part), None)
    return f"{own}.{kind}" if own else None
