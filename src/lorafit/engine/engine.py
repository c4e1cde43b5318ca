"""One engine per model: what can be made faster is, the rest runs as it was; the numbers are those of plain autograd.

`prepare` looks at the model by running it on a few tokens: which linear layers share an input, whether packed rows give
what rows alone give, whether logits are the head's output as it is. What it finds is in `Engine.notes`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.engine import attention, loss
from lorafit.engine.batch import Batch, Bucket, Packing
from lorafit.engine.linear import Factors, FrozenLinears, is_frozen
from lorafit.engine.patch import Patches, patch_gated_mlps, patch_norms, patch_rotary
from lorafit.engine.product import Dense, Int8, Packed, Product
from lorafit.lora.base import make_kind
from lorafit.lora.layer import LoRALayer

USUAL_ROWS = 512
PROBE_ROW = 6
# What models raise that were not written for attention functions, or get None for a mask that they need.
REFUSALS = (NotImplementedError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)
ATTRIBUTE = "_lorafit_engine"


@dataclass
class Engine:
    """A model made ready to be trained fast. packing: how its batches are to be built. notes: what runs slower, why."""

    model: nn.Module
    precision: str
    packing: Packing
    chunked: bool
    patches: Patches
    notes: list[str] = field(default_factory=list)
    prepare_s: float = 0.0

    def loss(self, batch: Batch) -> Tensor:
        """Sum over supervised tokens of weight x negative log-likelihood, in nats: a scalar float32 with its graph."""
        batch = _to_device(batch, next(self.model.parameters()).device)
        compute = loss.chunked_loss if self.chunked else loss.whole_loss
        with self._running(batch):
            return compute(self.model, batch)

    def close(self) -> None:
        """Give the model its own forwards back."""
        self.patches.undo()
        if getattr(self.model, ATTRIBUTE, None) is self:
            delattr(self.model, ATTRIBUTE)

    @contextmanager
    def _running(self, batch: Batch) -> Iterator[None]:
        packed = packed_attention(self.model, batch.layout) if batch.layout is not None else nullcontext()
        with packed, self.patches.in_force():
            yield


def plain(model: nn.Module) -> Engine:
    """An engine that changes nothing: padded rows, the model's own operations. The oracle of the others."""
    return Engine(model, "as loaded", Packing(padded=True, share_prefix=False), False, Patches())


@torch.no_grad()
def prepare(model: nn.Module, precision: str, share_prefix: bool) -> Engine:
    """Look at the model, which has its adapters attached, and replace what can be.

    precision: fp32, bf16, fp16 or int8, the type of the products with frozen weights. share_prefix: whether rows may
    have a common prefix computed once; not under dropout, whose masks are keyed by row.
    """
    started = time.perf_counter()
    engine = Engine(model, precision, Packing(padded=True, share_prefix=False), False, Patches())
    earlier: Engine | None = getattr(model, ATTRIBUTE, None)
    if earlier is not None:
        earlier.close()
    setattr(model, ATTRIBUTE, engine)
    attention.register()
    probe = _Probe(model)
    with _without_dropout(model):
        engine.chunked = probe.logits_are_the_heads()
        reason = probe.why_not_packed()
        groups = probe.linear_groups()
        patch_norms(model, engine.patches)
        patch_gated_mlps(model, engine.patches)
        patch_rotary(model, engine.patches)
    if reason is None:
        engine.packing = Packing(padded=False, share_prefix=share_prefix)
    else:
        engine.notes.append(f"rows are padded: {reason}")
    for group in groups:
        _patch_linears(group, precision, engine.patches)
    engine.prepare_s = time.perf_counter() - started
    return engine


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def packed_attention(model: nn.Module, layout: tuple[Bucket, ...]) -> Iterator[None]:
    """While this holds, the model's attention is ours over these buckets."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = {key: c for key, c in configs.items() if hasattr(c, "_attn_implementation_internal")}
    before = {key: c._attn_implementation_internal for key, c in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = attention.NAME
        with attention.packed(layout):
            yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def _to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved = copy.copy(batch)
    for name in ("input_ids", "position_ids", "attention_mask", "predicts", "targets", "weights"):
        value = getattr(batch, name)
        object.__setattr__(moved, name, None if value is None else value.to(device))
    return moved


# --- linear layers --------------------------------------------------------------------------------------------------


def _patch_linears(modules: list[nn.Module], precision: str, patches: Patches) -> None:
    """Let one product serve modules that share an input. An adapted one with a variant or dropout keeps its branch."""
    whole = [_whole(module) for module in modules]
    bases = [m.base if isinstance(m, LoRALayer) else m for m in modules]
    stacked = _stack_weights(bases)
    group = FrozenLinears(
        _product(stacked, precision),
        [make_kind(base).out_features for base in bases],
        [make_kind(base).bias for base in bases],
        [_factors(m) if w and isinstance(m, LoRALayer) else None for m, w in zip(modules, whole, strict=True)],
    )
    for index, (module, base) in enumerate(zip(modules, bases, strict=True)):
        target = module if whole[index] else base
        patches.set(target, _forward(group, index, target, module))


def _forward(group: FrozenLinears, index: int, target: nn.Module, layer: nn.Module) -> Any:
    """The new forward of `target`, which is `layer` or the base of it. A merged weight is not the one prepared."""
    own = type(target).forward

    def forward(x: Tensor) -> Tensor:
        if isinstance(layer, LoRALayer) and layer.merged:
            y: Tensor = own(target, x)
            return y
        return group(index, x)

    return forward


def _whole(module: nn.Module) -> bool:
    """Whether the group computes the module's update as well, and not only its base."""
    if not isinstance(module, LoRALayer):
        return True
    return module.variant_name == "lora" and module.dropout.p == 0


def _factors(layer: LoRALayer) -> Factors:
    return Factors(lambda: layer.factors()[0], lambda: layer.factors()[1], lambda: layer.scaling * layer.scale)


def _stack_weights(bases: list[nn.Module]) -> Tensor:
    """(sum of outs, in). The modules' own weights become views of it, so nothing is kept twice."""
    kinds = [make_kind(base) for base in bases]
    if len(bases) == 1:
        return kinds[0].read_weight()
    whole = torch.cat([kind.read_weight() for kind in kinds])
    first = 0
    for kind in kinds:
        kind.weight.data = whole[first : first + kind.out_features]
        first += kind.out_features
    return whole


def _product(W: Tensor, precision: str) -> Product:
    if precision == "int8":
        return Int8(W)
    if W.device.type == "cpu" and W.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return Packed(W, USUAL_ROWS)
    return Dense(W)


# --- looking at the model -------------------------------------------------------------------------------------------


class _Probe:
    """Runs the model, still untouched, on a few tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        device = next(model.parameters()).device
        vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        ids = torch.randint(0, vocabulary, (2 * PROBE_ROW,), generator=torch.Generator().manual_seed(0)).to(device)
        # Two rows with the same first two tokens.
        self.rows = [ids[:PROBE_ROW], torch.cat([ids[:2], ids[PROBE_ROW:]])]

    def logits_are_the_heads(self) -> bool:
        """Whether logits are the output head's output, untouched, and hidden states its input."""
        head, seen = loss.head_of(self.model), []
        handle = head.register_forward_hook(lambda module, arguments, output: seen.append((arguments[0], output)))
        try:
            logits = self._logits(self.rows[0])
        finally:
            handle.remove()
        return len(seen) == 1 and torch.equal(seen[0][1].reshape(logits.shape), logits)

    def why_not_packed(self) -> str | None:
        """The reason why this model can't run rows one after the other, or None if it gives what rows alone give."""
        batch = _packed_rows(self.rows)
        try:
            with packed_attention(self.model, batch.layout or ()):
                got = loss.run(self.model, batch).logits[0]
        except REFUSALS as error:
            return f"{type(self.model).__name__} does not take packed attention ({_first_line(error)})"
        expected = torch.cat([self._logits(self.rows[0]), self._logits(self.rows[1])[2:]])
        # Contamination between rows, or wrong positions, change logits by as much as they are large.
        off = float((got.float() - expected.float()).norm() / expected.float().norm())
        if not off < 4 * torch.finfo(got.dtype).eps ** 0.75:
            return f"{type(self.model).__name__} gives other numbers for packed rows (relative difference {off:.1g})"
        return None

    def linear_groups(self) -> list[list[nn.Module]]:
        """Frozen linear layers in the order of their calls; those that were given the same tensor together."""
        calls: list[tuple[nn.Module, Tensor]] = []
        handles = [
            module.register_forward_pre_hook(lambda module, arguments: calls.append((module, arguments[0])))
            for module in _linears(self.model)
        ]
        try:
            self._logits(self.rows[0])
        finally:
            for handle in handles:
                handle.remove()
        once = {id(module): sum(module is other for other, _ in calls) == 1 for module, _ in calls}
        groups: list[list[nn.Module]] = []
        previous: Tensor | None = None
        for module, x in calls:
            if not once[id(module)]:
                continue
            if groups and x is previous and _stackable(groups[-1][-1], module):
                groups[-1].append(module)
            else:
                groups.append([module])
            previous = x
        return groups

    def _logits(self, row: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=row[None], use_cache=False).logits
        return logits[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _linears(model: nn.Module) -> list[nn.Module]:
    """Linear layers, adapted or not, without the output head, what is trained, and what layers share."""
    head = loss.head_of(model)
    inside = {id(m.base) for m in model.modules() if isinstance(m, LoRALayer)}
    found = []
    for module in model.modules():
        base = module.base if isinstance(module, LoRALayer) else module
        tied = isinstance(module, LoRALayer) and (module.tied_to is not None or module.transposed)
        usual = type(base) is nn.Linear or type(base).__name__ == "Conv1D"
        if usual and is_frozen(base) and module is not head and id(module) not in inside and not tied:
            found.append(module)
    return found


def _stackable(a: nn.Module, b: nn.Module) -> bool:
    """Both plain nn.Linear inside: their weights can be views of one stacked matrix."""
    bases = [m.base if isinstance(m, LoRALayer) else m for m in (a, b)]
    return all(type(base) is nn.Linear for base in bases) and bases[0].weight.dtype == bases[1].weight.dtype


def _packed_rows(rows: list[Tensor]) -> Batch:
    """Two rows that share their first two tokens, packed by hand: the prefix once, then what each adds."""
    a, b = rows
    ids = torch.cat([a, b[2:]])
    n, m = len(a) - 2, len(b) - 2

    def bucket(first: int, length: int, prefix: int) -> Bucket:
        tokens = torch.arange(first, first + length, dtype=torch.int32, device=ids.device)
        return Bucket(tokens, torch.tensor([length], dtype=torch.int32, device=ids.device), length, 0, prefix)

    position = torch.cat([torch.arange(len(a)), torch.arange(2, len(b))]).to(ids.device)
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(
        input_ids=ids[None],
        position_ids=position[None],
        attention_mask=None,
        layout=(bucket(0, 2, 0), bucket(2, n, 2), bucket(2 + n, m, 2)),
        token_rows=torch.zeros_like(ids)[None],
        predicts=nothing,
        targets=nothing,
        weights=nothing.float(),
        rows=2,
        real_tokens=len(a) + len(b),
        supervised_tokens=0,
    )
