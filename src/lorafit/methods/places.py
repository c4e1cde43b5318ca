"""Where a block's sublayers begin and end, by the names that transformers' models give their layers.

A family with names of its own is a name here; `--targets` names layers where none of these does.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lorafit.config import MethodConfig
from lorafit.errors import TargetError, listed
from lorafit.lora.base import LINEAR_KINDS, kind_name, refusal
from lorafit.lora.targets import ALL_LINEAR, leaf_names, matches, select, select_layers

# The linear layer whose output is added to the residual stream: of attention, and of the MLP.
ATTENTION_ENDS = (
    "o_proj", "out_proj", "attn.c_proj", "attention.output.dense", "attention.dense", "self_attention.dense",
    "attention.out_lin", "self_attn.dense",
)  # fmt: skip
MLP_ENDS = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "output.dense", "ffn.lin2")
# What gives keys and values; in some families one layer gives queries too.
KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "query_key_value", "c_attn", "qkv_proj")
MLPS = ("mlp", "ffn", "feed_forward")


def chosen(model: nn.Module, config: MethodConfig, usual: Sequence[str]) -> list[str]:
    """The linear layers of --targets, or by default those of the names in `usual`, in the blocks of --layers.

    Raises TargetError where there are none.
    """
    if config.targets != ALL_LINEAR:
        names = select(model, config.targets).names
    else:
        names = [name for name, module in model.named_modules() if _is_linear(module) and _named(name, usual)]
    if not names:
        raise _not_found(model, usual)
    return select_layers(model, names, config.layers)


def modules_named(model: nn.Module, config: MethodConfig, usual: Sequence[str]) -> list[str]:
    """Modules of any kind, as `chosen`."""
    patterns = usual if config.targets == ALL_LINEAR else config.targets
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [name for name, _ in model.named_modules() if any(matches(pattern, name) for pattern in wanted)]
    if not names:
        raise _not_found(model, wanted)
    return select_layers(model, names, config.layers)


def _named(name: str, usual: Sequence[str]) -> bool:
    """BERT's `attention.output.dense` ends as its MLP's `output.dense` does."""
    if "attention.output.dense" not in usual and matches("attention.output.dense", name):
        return False
    return any(matches(pattern, name) for pattern in usual)


def _is_linear(module: nn.Module) -> bool:
    return kind_name(module) in LINEAR_KINDS and refusal(module) is None


def _not_found(model: nn.Module, usual: Sequence[str]) -> TargetError:
    here = leaf_names(name for name, module in model.named_modules() if _is_linear(module))
    return TargetError(
        f"this model has no layer of the usual names ({listed(usual, 20)})", f"Name some of its own: {listed(here, 20)}"
    )
