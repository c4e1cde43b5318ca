"""Where a block's sublayers begin and end, by the names that transformers' models give their layers. No torch.

A family with names of its own is a name here.
"""

from __future__ import annotations

from collections.abc import Sequence

# The linear layer whose output is added to the residual stream: of attention, and of the MLP.
ATTENTION_ENDS = (
    "o_proj", "out_proj", "attn.c_proj", "attention.output.dense", "attention.dense", "self_attention.dense",
    "attention.out_lin", "self_attn.dense",
)  # fmt: skip
MLP_ENDS = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "output.dense", "ffn.lin2")
# What gives keys and values; in some families one layer gives queries too.
KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "query_key_value", "c_attn", "qkv_proj")
SEPARATE, FUSED = ("k_proj", "v_proj"), ("c_attn", "qkv_proj")
MLPS = ("mlp", "ffn", "feed_forward")


def is_one_of(name: str, usual: Sequence[str]) -> bool:
    """Whether a module's dotted name is one of these, or ends in one at a dot.

    BERT's `attention.output.dense` ends as its MLP's `output.dense` does, and is another.
    """
    if "attention.output.dense" not in usual and _ends(name, "attention.output.dense"):
        return False
    return any(_ends(name, end) for end in usual)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
