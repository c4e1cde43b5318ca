"""Floating-point operations of training, from shapes: a multiply and an add are two.

Products alone are counted, as in the FLOP counts of the literature: norms, activations and softmax are a percent of a
model of any size. Forward, a weight of N numbers costs 2 N a token; backward, 2 N more for the gradient of its input,
and 2 N for its own, which a frozen weight does not have. So full fine-tuning costs about 6 N a token and LoRA about
4 N (Kaplan et al. 2020, section 2.1; Hu et al. 2021, section 4.2).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from lorafit.errors import ModelError
from lorafit.model.spec import ModelSpec
from lorafit.plan.counts import block_of, matrices, part_of


@dataclass(frozen=True)
class Group:
    """Linear layers that are given the same input. shapes: (out, in) of each. weights: names. name: what they are."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Flop:
    """Of one forward and backward pass. attention: the part of both that is not linear in the number of tokens."""

    forward: int
    backward: int
    attention: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Flop) -> Flop:
        return Flop(self.forward + other.forward, self.backward + other.backward, self.attention + other.attention)


# The slots of a decoder's or an encoder's block, in the order in which they run, by what their layers are called.
SLOTS = (
    ("qkv", r"[qkv]_proj|qkv_proj|c_attn|query_key_value|\.(?:query|key|value)\.|attn\.in_proj|Wqkv"),
    ("o", r"o_proj|out_proj|attn\.c_proj|attention\.output\.dense|attention\.dense|self_attention\.dense"),
    ("up", r"gate_proj|up_proj|gate_up_proj|c_fc|intermediate\.dense|dense_h_to_4h|fc1|fc_in"),
    ("down", r"down_proj|mlp\.c_proj|output\.dense|dense_4h_to_h|fc2|fc_out"),
)


def block_groups(spec: ModelSpec) -> tuple[Group, ...]:
    """The linear layers of one block that share an input, in the order in which they run; all blocks are alike.

    Raises ModelError for a block with a weight that has no slot, such as a mixture of experts.
    """
    weights = {name: shape for name, shape in matrices(spec).items() if block_of(name) == 0}
    found: dict[str, list[str]] = {slot: [] for slot, _ in SLOTS}
    for name in weights:
        slot = next((slot for slot, pattern in SLOTS if re.search(pattern, name)), None)
        if slot is None:
            raise ModelError(
                f"{spec.name} has blocks with {name}, whose operations are not known here",
                "Operations and time are predicted for dense decoders and encoders",
            )
        found[slot].append(name)
    return tuple(Group(slot, tuple(weights[n] for n in own), tuple(own)) for slot, own in found.items() if own)


def head_flop(spec: ModelSpec, predicted: int) -> int:
    """Forward, of so many tokens: the vocabulary's rows, and what an encoder has in front of them."""
    before = [
        prod(shape)
        for name, shape in spec.tensors.items()
        if len(shape) == 2 and part_of(name) == "head" and spec.vocab not in shape
    ]
    return 2 * predicted * (spec.vocab * spec.hidden + sum(before))


def padded_pairs(lengths: Sequence[int]) -> int:
    """What eager attention multiplies for rows padded to the longest: every query with every key."""
    return len(lengths) * max(lengths) ** 2


def causal_pairs(lengths: Sequence[int]) -> int:
    """What a causal row needs: each query with itself and those before it."""
    return sum(length * (length + 1) // 2 for length in lengths)
