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
from lorafit.plan.counts import matrices, part_of

FIRST_BLOCK = re.compile(r"(?:^|\.)0\.")


@dataclass(frozen=True)
class Group:
    """Linear layers that are given the same input. shapes: (out, in) of each. name: what it is."""

    name: str
    shapes: tuple[tuple[int, int], ...]


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
    weights = {name: shape for name, shape in matrices(spec).items() if FIRST_BLOCK.search(name)}
    found: dict[str, list[tuple[int, int]]] = {slot: [] for slot, _ in SLOTS}
    for name, shape in weights.items():
        slot = next((slot for slot, pattern in SLOTS if re.search(pattern, name)), None)
        if slot is None:
            raise ModelError(
                f"{spec.name} has blocks with {name}, whose operations are not known here",
                "Operations and time are predicted for dense decoders and encoders",
            )
        found[slot].append(shape)
    return tuple(Group(slot, tuple(shapes)) for slot, shapes in found.items() if shapes)


def lora_step(spec: ModelSpec, r: int, tokens: int, predicted: int, pairs: int, ending: int | None = None) -> Flop:
    """A step of LoRA on all linear layers of the blocks, a frozen head, frozen embeddings.

    tokens: that go through the blocks. predicted: whose logits are computed. pairs: (query, key) pairs that attention
    multiplies, summed over the rows. ending: tokens that what follows the last attention is computed for, all by
    default. Where nothing below is trained no gradient is computed: the input of the lowest layers has none.
    """
    flop, groups = Flop(0, 0, 0), block_groups(spec)
    for layer in range(spec.layers):
        for number, group in enumerate(groups):
            if group.name == "o":
                flop += attention_flop(spec, pairs)
            ends = ending is not None and layer == spec.layers - 1 and group.name != "qkv"
            count = ending if ends and ending is not None else tokens
            flop += _adapted(group, r, count, input_has_gradient=layer > 0 or number > 0)
    head = head_flop(spec, predicted)
    return flop + Flop(head, head, 0)


def _adapted(group: Group, r: int, tokens: int, input_has_gradient: bool) -> Flop:
    """Of y = x W^T + h B^T with h = x A^T: W's product, those of h and h B^T, and the gradients of B, h, A and x."""
    dense = sum(2 * tokens * out * into for out, into in group.shapes)
    by_A = sum(2 * tokens * r * into for _, into in group.shapes)
    by_B = sum(2 * tokens * r * out for out, _ in group.shapes)
    backward = 2 * by_B + by_A + (dense + by_A if input_has_gradient else 0)
    return Flop(dense + by_A + by_B, backward, 0)


def attention_flop(spec: ModelSpec, pairs: int) -> Flop:
    """Q K^T and P V: 2 * 2 * pairs * heads * head_dim forward; backward each has two products more."""
    forward = 4 * pairs * spec.heads * spec.head_dim
    return Flop(forward, 2 * forward, 3 * forward)


def full_step(spec: ModelSpec, tokens: int, predicted: int, pairs: int) -> Flop:
    """A step that trains all weights: every product has a gradient of its input and one of its weight."""
    flop, groups = Flop(0, 0, 0), block_groups(spec)
    for _ in range(spec.layers):
        for group in groups:
            dense = sum(2 * tokens * out * into for out, into in group.shapes)
            flop += Flop(dense, 2 * dense, 0)
        flop += attention_flop(spec, pairs)
    head = head_flop(spec, predicted)
    return flop + Flop(head, 2 * head, 0)


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
