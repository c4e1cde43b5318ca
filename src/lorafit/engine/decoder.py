"""A decoder layer as one autograd function, where it is built as most are: norm, attention, norm, gated MLP.

Its operations are those that it is made of otherwise (`linear`, `elementwise`, `attention`), in the same order and so
with the same bits. What is saved is what autograd costs for thirty small steps: a layer of a small model spends a tenth
of its time there. It serves where attention goes row by row (`kernels.rows`), and only a layer that gave the same bits
when it was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.engine import attention, kernels, workspace
from lorafit.engine.groups import Group, is_served, is_whole
from lorafit.engine.kernels import rows as row_kernels
from lorafit.engine.kernels.rows import RowTable
from lorafit.engine.linear import FrozenLinears, How
from lorafit.engine.patch import ROTARY_FUNCTION, Patches, gated_kind, norm_settings
from lorafit.engine.tally import TALLY
from lorafit.lora.layer import LoRALayer

NORMS = ("input_layernorm", "post_attention_layernorm")
LINEARS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm. weight: (hidden,) float32. See `kernels.plain.rms_norm`."""

    weight: Tensor
    eps: float
    round_first: bool

    def forward(self, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y, inverse rms). more: added to x before, in its place."""
        return kernels.of(x).rms_norm(x, self.weight, self.eps, self.round_first, more)  # type: ignore[no-any-return]

    def back(self, gy: Tensor, x: Tensor, inverse: Tensor, more: Tensor) -> Tensor:
        """The gradient of x, and `more` added to it."""
        return kernels.of(x).rms_norm_backward(gy, x, self.weight, inverse, more)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Parts:
    """What a layer is made of. heads, kv_heads: of queries and of keys; dim: of a head. kind: of the activation.

    window: most keys that a query sees, 0 for all. adapted: the layers whose update is computed with them.
    """

    norms: tuple[Norm, Norm]
    qkv: FrozenLinears
    o: FrozenLinears
    gate_up: FrozenLinears
    down: FrozenLinears
    adapted: tuple[LoRALayer, ...]
    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int
    kind: int

    @property
    def groups(self) -> tuple[FrozenLinears, ...]:
        """In the order in which they run."""
        return self.qkv, self.o, self.gate_up, self.down

    def heads_of(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as views of (n, sum of outs): (n, heads, dim) each."""
        counts = self.heads, self.kv_heads, self.kv_heads
        parts = torch.split(qkv, [count * self.dim for count in counts], dim=1)
        q, k, v = (part.view(-1, count, self.dim) for part, count in zip(parts, counts, strict=True))
        return q, k, v

    def turn_(self, qkv: Tensor, cosine: Tensor, sine: Tensor, inverse: bool) -> None:
        """Rotary embedding of queries and keys where they lie."""
        turned = self.heads + self.kv_heads
        both = qkv[:, : turned * self.dim].view(-1, turned, self.dim)
        kernels.of(qkv).rotary_(both, cosine, sine, inverse)


def parts_of(
    layer: nn.Module, groups: Sequence[Group], patches: Patches, windows: Mapping[nn.Module, int]
) -> Parts | None:
    """What the layer is made of, if it looks as usual and everything in it was replaced.

    windows: what attention modules asked for, which rows as short as the probe's cannot show.
    """
    attend, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    norms = [norm_settings(getattr(layer, name, None)) for name in NORMS]
    kind = gated_kind(mlp)
    places = zip((attend, attend, mlp, mlp), LINEARS, strict=True)
    found = [_group([getattr(module, name, None) for name in names], groups) for module, names in places]
    whole = [group for group in found if group is not None]
    dim, scale = getattr(attend, "head_dim", None), getattr(attend, "scaling", None)
    code = {module.__name__ for module, name, _ in patches.functions if name == ROTARY_FUNCTION}
    if type(attend).__module__ not in code or not isinstance(dim, int) or not isinstance(scale, float):
        return None
    if (
        not isinstance(attend, nn.Module)
        or attend not in windows
        or kind is None
        or norms[0] is None
        or norms[1] is None
        or len(whole) < len(found)
    ):
        return None
    qkv, o, gate_up, down = (group.linears for group in whole)
    return Parts(
        norms=(Norm(**norms[0]), Norm(**norms[1])),
        qkv=qkv, o=o, gate_up=gate_up, down=down,
        adapted=tuple(m for group in whole for m in group.modules if isinstance(m, LoRALayer)),
        heads=qkv.outs[0] // dim, kv_heads=qkv.outs[1] // dim, dim=dim, scale=scale, window=windows[attend],
        kind=kind,
    )  # fmt: skip


def _group(modules: list[Any], groups: Sequence[Group]) -> Group | None:
    """The group of just these modules, whose update it computes too."""
    found = next((group for group in groups if group.modules[0] is modules[0]), None) if modules[0] else None
    if found is None or len(found.modules) != len(modules):
        return None
    same = all(own is given and is_whole(own) for own, given in zip(found.modules, modules, strict=True))
    return found if same else None


def served(x: Tensor, parts: Parts) -> bool:
    """Whether attention over activations like x goes row by row."""
    like = x.new_empty(0, 1, parts.dim)
    return row_kernels.serve(like, like)


def signature(layer: nn.Module) -> object:
    """Equal for layers that are built alike: parts of the same classes, whose plain settings are the same."""
    return tuple((type(part), repr(sorted(_settings(part).items()))) for part in (layer, *layer.children()))


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = bool | int | float | str | None
    return {key: value for key, value in vars(module).items() if isinstance(value, plain) and key != "layer_idx"}


def same_bits(layer: nn.Module, parts: Parts, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether the layer as one function gives what it gives by itself, bit for bit."""
    expected = layer(*arguments, **named)
    return isinstance(expected, Tensor) and torch.equal(expected, forward_of(layer, parts)(*arguments, **named))


def forward_of(
    layer: nn.Module, parts: Parts, wanted: Callable[[], Tensor | None] = lambda: None
) -> Callable[..., Any]:
    """A forward for the layer that is one function where it can be, and what it was before elsewhere.

    wanted: the places of tokens, (p,) int64, each once, whose output alone is read; others may get zeros. None: all.
    """
    own = layer.forward

    def forward(hidden_states: Tensor, *more: Any, **named: Any) -> Any:
        rows, turn = attention.rows_in_force(), named.get("position_embeddings")
        packed = rows is not None and hidden_states.shape[0] == 1 and turn is not None and not more
        if not packed or named.get("past_key_values") is not None or not all(map(is_served, parts.adapted)):
            return own(hidden_states, *more, **named)
        trained = [tensor for group in parts.groups for tensor in group.trained_now()]
        return _Layer.apply(hidden_states, *turn, parts, rows, wanted(), *trained)  # type: ignore[no-untyped-call, misc]

    return forward


def _by_group(parts: Parts, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """What is trained in each group."""
    counts = [group.trained for group in parts.groups]
    firsts = [sum(counts[:number]) for number in range(len(counts))]
    return [tensors[first : first + count] for first, count in zip(firsts, counts, strict=True)]


class _Layer(torch.autograd.Function):
    """x: (1, n, hidden). cosine, sine: (1, n, dim). Returns (1, n, hidden)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        parts: Parts,
        rows: RowTable,
        wanted: Tensor | None,
        *trained: Tensor,
    ) -> Tensor:
        own, run = _by_group(parts, trained), kernels.of(x)
        x, cosine, sine = x[0].contiguous(), cosine[0], sine[0]
        normal, inverse_1 = parts.norms[0].forward(x)
        qkv = parts.qkv.run(normal, own[0])
        parts.turn_(qkv.y, cosine, sine, inverse=False)
        q, k, v = parts.heads_of(qkv.y)
        seen, log_sum = row_kernels.forward(q, k, v, rows, parts.scale, parts.window)
        TALLY.add(attention.row_flop(q, v, rows))
        some = _Some(wanted, len(x))
        o = parts.o.run(some.of(seen.flatten(1)), own[1])
        middle = o.y if o.own is None else _copy(o.y)
        normal, inverse_2 = parts.norms[1].forward(middle, more=some.of(x))
        gate_up = parts.gate_up.run(normal, own[2])
        down = parts.down.run(run.gated(*torch.split(gate_up.y, parts.gate_up.outs, dim=1), parts.kind), own[3])
        ctx.parts, ctx.rows, ctx.some = parts, rows, some
        ctx.how = [group.how for group in (qkv, o, gate_up, down)]
        turned = qkv.own is qkv.y
        ctx.save_for_backward(
            x, cosine, sine, inverse_1, qkv.y, seen, log_sum, middle, inverse_2, gate_up.y,
            qkv.h, o.h, gate_up.h, down.h, None if turned else qkv.own, o.own, gate_up.own, down.own, *trained,
        )  # fmt: skip
        return some.spread((down.y if down.own is None else _copy(down.y)).add_(middle))[None]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        parts: Parts = ctx.parts
        some: _Some = ctx.some
        how, ctx.how = ctx.how, None  # autograd lets go of saved tensors by itself, of these it does not
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        x, cosine, sine, inverse_1, qkv, seen, log_sum, middle, inverse_2, gate_up = saved[:10]
        hs, owns = saved[10:14], saved[14:18]
        normals = [norm.forward for norm in parts.norms]
        # Nothing below the lowest group that is adapted has a gradient, unless the layer's input has one.
        lowest = -1 if ctx.needs_input_grad[0] else next(n for n, by in enumerate(how) if by.update is not None)
        gx, found = None, _Found(parts, how, hs, owns, lowest)

        g, gated = some.of(g[0]).contiguous(), _Gated(gate_up, parts)
        back = found.back(3, g, gated.value)
        if back is not None:
            back = found.back(2, gated.back(back), lambda _: normals[1](middle)[0])
        if back is not None:
            g = parts.norms[1].back(back, middle, inverse_2, g)
            back = found.back(1, g, lambda _: some.of(seen.flatten(1)))
        if back is not None:
            g_qkv = workspace.rows(x, *qkv.shape)
            at = parts.scale, parts.window, parts.heads_of(g_qkv)
            g_seen = some.spread(back).view(seen.shape)
            row_kernels.backward(*parts.heads_of(qkv), g_seen, log_sum, ctx.rows, *at)
            TALLY.add(2 * attention.row_flop(seen, seen, ctx.rows))
            parts.turn_(g_qkv, cosine, sine, inverse=True)
            if how[0].lengths is not None and owns[0] is None:
                own = _copy(qkv)
                parts.turn_(own, cosine, sine, inverse=True)
                found.owns = own, *owns[1:]
            back = found.back(0, g_qkv, lambda _: normals[0](x)[0])
        if back is not None:
            gx = parts.norms[0].back(back, x, inverse_1, some.spread(g))[None]
        return gx, None, None, None, None, None, *found.gradients()


def _copy(x: Tensor) -> Tensor:
    """What is kept apart, since x is written over."""
    return workspace.rows(x, *x.shape).copy_(x)


@dataclass(frozen=True, eq=False)
class _Some:
    """The tokens that what follows attention is computed for. places: (p,) int64, or None for all. total: of tokens."""

    places: Tensor | None
    total: int

    def of(self, x: Tensor) -> Tensor:
        """Their rows of x, (total, width)."""
        return x if self.places is None else x[self.places]

    def spread(self, x: Tensor) -> Tensor:
        """x, a row for each of them, with zeros for all others: (total, width)."""
        return x if self.places is None else x.new_zeros(self.total, x.shape[1]).index_copy_(0, self.places, x)


class _Gated:
    """A gated activation in the backward pass: its value and its gradients, in one pass where both are wanted."""

    def __init__(self, both: Tensor, parts: Parts) -> None:
        self.run, self.kind = kernels.of(both), parts.kind
        self.gate, self.up = torch.split(both, parts.gate_up.outs, dim=1)
        self.gradients: Tensor | None = None

    def value(self, gy: Tensor | None) -> Tensor:
        """What it gave. gy: the gradient of that, where it goes on."""
        if gy is None:
            return self.run.gated(self.gate, self.up, self.kind)  # type: ignore[no-any-return]
        y: Tensor
        self.gradients, y = self.run.gated_again(gy, self.gate, self.up, self.kind)
        return y

    def back(self, gy: Tensor) -> Tensor:
        """The gradients of gate and up, side by side."""
        if self.gradients is None:
            self.gradients = self.run.gated_backward(gy, self.gate, self.up, self.kind)
        return self.gradients


class _Found:
    """The gradients of what is trained, as the groups are gone through from the last to the first.

    how, hs, owns: of each group, from its forward pass. lowest: the number of the first group that is adapted.
    """

    def __init__(
        self, parts: Parts, how: list[How], hs: Sequence[Tensor], owns: Sequence[Tensor | None], lowest: int
    ) -> None:
        self.parts, self.how, self.hs, self.owns, self.lowest = parts, how, hs, owns, lowest
        self.by_group: dict[int, list[Tensor]] = {}

    def back(self, number: int, g: Tensor, x: Callable[[Tensor | None], Tensor]) -> Tensor | None:
        """The gradient of what group `number` was given; None where nothing below wants it."""
        of = self.hs[number], self.how[number], self.owns[number]
        gx, self.by_group[number] = self.parts.groups[number].back(g, x, *of, number > self.lowest)
        return gx

    def gradients(self) -> list[Tensor | None]:
        """Of all tensors in their order; None where none was wanted."""
        groups = enumerate(self.parts.groups)
        return [g for n, group in groups for g in self.by_group.get(n) or _nothing(group.trained)]


def _nothing(count: int) -> list[Tensor | None]:
    return [None] * count
