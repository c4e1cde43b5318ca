"""Operations of a step by each method: one walk through the blocks, which asks at every product where a gradient flows.

Forward every product is computed. Backward a product has one for the gradient of its input, where something below it is
trained, and one for that of its weight, where the weight itself is. What a method puts at a group of linear layers is
in OWN; tests hold all of it against torch's own counter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorafit.config import MethodConfig
from lorafit.model.spec import ModelSpec
from lorafit.model.sublayers import SEPARATE, is_one_of
from lorafit.plan.counts import COMPACTER_PARTS, chosen_blocks, part_of
from lorafit.plan.flops import Flop, Group, block_groups, head_flop

# Behind which groups a variant has its bottlenecks; one that stands beside the MLP ends there too.
BOTTLENECKS = {"houlsby": ("o", "down"), "compacter": ("o", "down"), "pfeiffer": ("down",), "parallel": ("down",)}


@dataclass(frozen=True)
class Amount:
    """What some passes take together: their operations are linear in it.

    tokens: that go through the blocks, virtual ones included. predicted: whose logits are computed. pairs: (query, key)
    pairs that attention multiplies, summed over the rows. ending: tokens that what follows the last attention is
    computed for, None for all. passes: how many they are.
    """

    tokens: int
    predicted: int
    pairs: int
    ending: int | None = None
    passes: int = 1


@dataclass(frozen=True)
class _Place:
    """Where a method may compute something. n: tokens. flows: whether what it is given has a gradient."""

    spec: ModelSpec
    config: MethodConfig
    group: Group
    n: int
    passes: int
    flows: bool


def step(spec: ModelSpec, config: MethodConfig, amount: Amount, labels: int = 0) -> Flop:
    """Forward and backward passes of what `config` trains, on all of its usual layers in the blocks of --layers.

    labels: of a head that tells them apart in the place of the output head. Raises ModelError for a model whose blocks
    are not known, TargetError for --layers that are not there.
    """
    walk = _Walk(spec, config, amount.passes)
    flop = Flop(0, 0, 0)
    for layer in range(spec.layers):
        for group in walk.groups:
            if group.name == "o":
                flop += walk.attention(amount.pairs)
            ends = layer == spec.layers - 1 and group.name != "qkv"
            n = amount.tokens if amount.ending is None or not ends else amount.ending
            flop += walk.group(layer, group, n)
    return flop + walk.head(amount.predicted, labels)


def ends_early(spec: ModelSpec, config: MethodConfig) -> bool:
    """Whether the engine computes what follows the last attention for the tokens alone that predict something.

    In 16 bits, in a decoder, and where every layer still runs as one function: nothing but low-rank updates stands in
    them. A head alone is given the mean of all tokens.
    """
    low_rank = config.method == "lora" and not config.dropout
    return spec.writes_text and (low_rank or config.method == "prompt")


def untouched(spec: ModelSpec, config: MethodConfig) -> int:
    """How many of the lowest layers nothing is trained in or below; they need not be computed in every epoch."""
    if config.method == "head":
        return spec.layers
    lowest = min(chosen_blocks(spec, config.layers), default=0)
    return 0 if config.method == "prompt" or config.layers is None else lowest


def once(spec: ModelSpec, layers: int, tokens: int, pairs: int) -> Flop:
    """A forward pass through so many of the lowest blocks, of which nothing is trained."""
    dense = sum(2 * tokens * out * into for group in block_groups(spec) for out, into in group.shapes)
    scores = 4 * pairs * spec.heads * spec.head_dim
    return Flop(layers * (dense + scores), 0, layers * scores)


class _Walk:
    """Where a gradient flows as the blocks are gone through from the first on.

    residual: in the residual stream. seen: in what attention is given, as queries and as keys. inner: in the MLP.
    """

    def __init__(self, spec: ModelSpec, config: MethodConfig, passes: int) -> None:
        self.spec, self.config, self.passes = spec, config, passes
        self.groups = block_groups(spec)
        self.chosen = chosen_blocks(spec, config.layers)
        self.starts, norms = _starting(spec, config, self.groups)
        self.own_norms = config.method == "bitfit" and norms
        everything = config.method == "full" and config.layers is None
        self.residual = config.method == "prompt" or everything or (self.own_norms and config.layers is None)
        self.seen = (False, False)
        self.inner = False

    def group(self, layer: int, group: Group, n: int) -> Flop:
        """A group of linear layers, and what the method has there."""
        config, here = self.config, layer in self.chosen
        # Whether a norm that stands before it is trained itself: an encoder's stand behind.
        norm = here and self.spec.writes_text and (config.method == "full" or self.own_norms)
        before = {
            "qkv": self.residual or norm,
            "o": any(self.seen),
            "up": self.residual or norm,
            "down": self.inner or (here and config.method == "ia3"),
        }[group.name]
        dense = sum(2 * n * out * into for out, into in group.shapes)
        trained = here and config.method == "full"
        flop = Flop(dense, dense * before + dense * trained, 0)
        starts = here and group.name in self.starts
        if here:
            # A network behind a layer is given what that gives; one beside the MLP what goes into it.
            beside = self.residual if config.variant == "parallel" else before
            flop += OWN.get(config.method, _nothing)(_Place(self.spec, config, group, n, self.passes, beside))
        self._passed(group, before, starts)
        return flop

    def _passed(self, group: Group, before: bool, starts: bool) -> None:
        flows = before or starts
        if group.name == "qkv":
            # Keys and values alone have something of these, where a layer of their own gives them.
            apart = self.config.method in ("prefix", "ia3") and len(group.weights) > 1
            self.seen = (before if apart else flows, flows)
        elif group.name == "up":
            self.inner = flows
        else:
            self.residual = self.residual or flows

    def attention(self, pairs: int) -> Flop:
        """Q K^T and P V: 2 * 2 * pairs * heads * head_dim; backward one product for each of q, k, v, and of P."""
        unit = 2 * pairs * self.spec.heads * self.spec.head_dim
        queries, keys = self.seen
        backward = unit * (queries + 2 * keys + (queries or keys))
        return Flop(2 * unit, backward, 2 * unit + backward)

    def head(self, predicted: int, labels: int) -> Flop:
        """The output head, or the head of labels, which is trained."""
        forward = 2 * predicted * labels * self.spec.hidden if labels else head_flop(self.spec, predicted)
        trained = bool(labels) or (self.config.method == "full" and self.config.layers is None)
        return Flop(forward, forward * self.residual + forward * trained, 0)


def _starting(spec: ModelSpec, config: MethodConfig, groups: Sequence[Group]) -> tuple[set[str], bool]:
    """The groups whose output has a gradient by what the method puts there; whether norms have biases."""
    biases = {name.removesuffix("bias") for name in spec.tensors if name.endswith(".bias")}
    norms = any(part_of(name) == "norms" for name in biases)
    every = {group.name for group in groups}
    if config.method == "bitfit":
        own = {group.name for group in groups if any(name.removesuffix("weight") in biases for name in group.weights)}
        return own or (set() if norms else every), norms
    found = {
        "lora": every,
        "full": every,
        "adapter": set(BOTTLENECKS.get(config.variant, ())),
        "prefix": {"qkv"},
        "ia3": {"qkv"},
    }
    return found.get(config.method, set()), norms


# --- what a method computes at a group of linear layers ---------------------------------------------------------------


def _nothing(place: _Place) -> Flop:
    return Flop(0, 0, 0)


def _low_rank(place: _Place) -> Flop:
    """Of h B^T with h = x A^T: the products, and the gradients of B, h, A and x. A frozen A has none.

    DoRA computes B A once a pass, for the norms.
    """
    shapes, r, n = place.group.shapes, place.config.r, place.n
    by_A = sum(2 * n * r * into for _, into in shapes)
    by_B = sum(2 * n * r * out for out, _ in shapes)
    if place.config.variant == "lora-fa":
        return Flop(by_A + by_B, by_B + (by_A + by_B) * place.flows, 0)
    product = place.passes * sum(2 * r * out * into for out, into in shapes) * (place.config.variant == "dora")
    return Flop(by_A + by_B + product, 2 * by_B + by_A + by_A * place.flows, 0)


def _bottleneck(place: _Place) -> Flop:
    """Two products, and the gradients of both weights, of what lies between and of what goes in."""
    if place.group.name not in BOTTLENECKS[place.config.variant]:
        return _nothing(place)
    flop = Flop(0, 0, 0)
    for width, _ in place.group.shapes:
        one = 2 * place.n * width * place.config.bottleneck
        flop += Flop(2 * one, 3 * one + one * place.flows, 0)
        if place.config.variant == "compacter":
            flop += _kronecker(width, place.config.bottleneck, place.passes)
    return flop


def _kronecker(width: int, inner: int, passes: int) -> Flop:
    """Two sums of Kronecker products, made anew in every pass: s t^T, and the sum over parts; both factors trained."""
    parts = COMPACTER_PARTS
    cells = (width // parts) * (inner // parts)
    forward = passes * 2 * (2 * parts * cells + 2 * parts * parts**2 * cells)
    return Flop(forward, 2 * forward, 0)


def _keys_and_values(place: _Place) -> Flop:
    """While they are reparametrised a network gives them: a product that every part computes, and one of its own."""
    if place.group.name != "qkv" or place.config.variant != "reparametrised":
        return _nothing(place)
    tokens, hidden = place.config.virtual_tokens, place.spec.hidden
    widths = _key_widths(place.spec, place.group)
    forward = place.passes * sum(2 * tokens * hidden * (hidden + width) for width in widths)
    return Flop(forward, 2 * forward, 0)


def _key_widths(spec: ModelSpec, group: Group) -> Sequence[int]:
    pairs = zip(group.weights, group.shapes, strict=True)
    separate = [out for name, (out, _) in pairs if is_one_of(name.removesuffix(".weight"), SEPARATE)]
    return separate or [2 * spec.kv_heads * spec.head_dim]


OWN: dict[str, Callable[[_Place], Flop]] = {
    "lora": _low_rank,
    "adapter": _bottleneck,
    "prefix": _keys_and_values,
}
