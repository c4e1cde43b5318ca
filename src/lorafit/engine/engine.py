"""One engine per model: what can be made faster is, the rest runs as it was; the numbers are those of plain autograd.

`prepare` looks at the model by running it on a few tokens: which linear layers share an input, whether packed rows give
what rows alone give, whether logits are the head's output as it is. What it finds is in `Engine.notes`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.engine import attention, decoder, loss, workspace
from lorafit.engine.batch import Batch, Bucket
from lorafit.engine.groups import Group, Int8Error, calibrate, make_group
from lorafit.engine.layers import (
    Features,
    decoder_layers,
    ends_by_token,
    in_place_of,
    recompute,
    untouched_layers,
)
from lorafit.engine.packing import Packing
from lorafit.engine.patch import Patches, patch_gated_mlps, patch_norms, patch_rotary
from lorafit.engine.probe import Probe
from lorafit.errors import ModelError
from lorafit.model.spec import OF_POSITIONS, too_long
from lorafit.slabs import SLABS, trim_heap

ATTRIBUTE = "_lorafit_engine"
MOVED = ("input_ids", "position_ids", "attention_mask", "predicts", "targets", "weights")


@dataclass(eq=False)
class Engine:
    """A model made ready to run fast. packing: how its batches are to be built. notes: what runs slower, and why.

    int8_errors: of every group of linear layers, where the precision is int8 and `use_int8` was called.
    tight: whether memory matters more than time. features: see `keep_features`.
    ends_early: whether what follows the last attention is computed for the tokens alone that predict something.
    prepare_s: what all this took, in seconds.
    """

    model: nn.Module
    packing: Packing = field(default_factory=lambda: Packing(padded=True, share_prefix=False))
    chunked: bool = False
    patches: Patches = field(default_factory=Patches)
    groups: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    int8_errors: list[Int8Error] = field(default_factory=list)
    tight: bool = False
    prepare_s: float = 0.0
    features: Features | None = None
    ends_early: bool = False
    _layout: tuple[Bucket, ...] | None = None
    _wanted: Tensor | None = None
    _configs: list[Any] = field(default_factory=list)
    _stepped: bool = False
    _most_tokens: int | None = None

    @property
    def released(self) -> bool:
        """Whether a stored weight was freed."""
        return any(group.released for group in self.groups)

    @property
    def hidden(self) -> int:
        """Width of the activations between layers."""
        return int(self.model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations: that of frozen parameters, whatever the adapter's is; else of those trained."""
        parameters = list(self.model.parameters())
        return next((p for p in parameters if not p.requires_grad), parameters[0]).dtype

    def training_loss(self, batch: Batch) -> Tensor:
        """`loss` of rows of the training set, starting from their features where `keep_features` has computed them."""
        if self.features is None:
            return self.loss(batch)
        with in_place_of(self.features.forwards(self.model, batch)):
            return self.loss(batch)

    def loss(self, batch: Batch) -> Tensor:
        """Sum over supervised tokens of weight x negative log-likelihood, in nats: a scalar float32 with its graph."""
        compute = loss.chunked_loss if self.chunked else loss.whole_loss
        batch = self._moved(batch)
        with self._in_force(batch.layout, batch.predicting):
            return compute(self.model, batch)

    @torch.no_grad()
    def nll(self, batch: Batch) -> Tensor:
        """What `loss` is the weighted sum of: (pairs,) float32, nats of each target of the batch, in its order."""
        compute = loss.chunked_nll if self.chunked else loss.whole_nll
        batch = self._moved(batch)
        with self._in_force(batch.layout, batch.predicting):
            return compute(self.model, batch)

    @torch.no_grad()
    def nll_and_likeliest(self, batch: Batch) -> Tensor:
        """Of each target of a model that writes text its nats, and 1 where no token is likelier: (pairs, 2) float32."""
        compute = loss.chunked_reading if self.chunked else loss.whole_reading
        batch = self._moved(batch)
        with self._in_force(batch.layout, batch.predicting):
            return compute(self.model, batch, loss.nll_and_likeliest)

    @torch.no_grad()
    def head_inputs(self, batch: Batch) -> Tensor:
        """What the output head is given where `batch` predicts something: (pairs, hidden), in their order."""
        batch = self._moved(batch)
        with self._in_force(batch.layout, batch.predicting):
            return loss.head_inputs(self.model, batch)

    def _moved(self, batch: Batch) -> Batch:
        """The batch where the model is. Raises DataError for a row that it has not enough positions for."""
        if self._most_tokens and (tokens := int(batch.position_ids.max()) + 1) > self._most_tokens:
            raise too_long(tokens, self._most_tokens, row="a row")
        device = next(self.model.parameters()).device
        if device.type == "cpu":
            return batch
        moved = {name: value.to(device) for name in MOVED if (value := getattr(batch, name)) is not None}
        return dataclasses.replace(batch, **moved)

    def use_int8(self, batch: Batch, release: bool = False) -> None:
        """Products with frozen weights in int8 from now on, calibrated on this batch of real rows.

        A group whose error on it is too large stays as it was, and is in `notes`. Leaves no gradients. release: as
        `release_weights`, of every weight as soon as its int8 copies exist. Layers keep their inputs alone meanwhile:
        there are more weights than ever after, and a row may be long.
        """
        started = time.perf_counter()

        def forward() -> Tensor:
            return self.loss(batch) / max(1, batch.supervised_tokens)

        with _without_dropout(self.model), in_place_of(self._recomputed()):
            self.int8_errors = calibrate(self.groups, forward, release)
        for parameter in self.model.parameters():
            parameter.grad = None
        self.notes += [
            f"{error.label} stays in bf16: int8 would be off by {error.forward:.1%} forward, {error.backward:.1%} back"
            for error in self.int8_errors
            if error.too_large
        ]
        self.prepare_s += time.perf_counter() - started

    @torch.no_grad()
    def keep_features(self, path: Path, lengths: list[int], batches: Iterable[Batch]) -> None:
        """Compute what the lowest trained layer is given, once for all epochs, into a file at `path`.

        lengths: tokens of each training row. batches: all of these rows. Needs `untouched_layers(model)` > 0.
        """
        started = time.perf_counter()
        features = Features(path, lengths, untouched_layers(self.model), self.hidden, self.dtype)
        features.fill(self.loss, self.model, batches)
        self.features = features
        self.prepare_s += time.perf_counter() - started

    def recompute_layers(self) -> None:
        """Keep only each layer's input for the backward pass from now on."""
        for layer, forward in self._recomputed():
            self.patches.set(layer, forward)

    def _recomputed(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """Of each layer a forward that keeps its input alone."""

        def running() -> Callable[[], AbstractContextManager[None]]:
            return partial(self._in_force, self._layout, self._wanted)  # as of now

        return [(layer, recompute(layer, running)) for layer in decoder_layers(self.model)[1]]

    @contextmanager
    def _in_force(self, layout: tuple[Bucket, ...] | None, wanted: Tensor | None) -> Iterator[None]:
        before = self._layout, self._wanted
        self._layout, self._wanted = layout, wanted
        packed = attention.packed(self._configs, layout) if layout is not None else nullcontext()
        try:
            with packed, self.patches.in_force():
                yield
        finally:
            self._layout, self._wanted = before

    def release_weights(self) -> None:
        """Free the stored weights that a product has its own copy of. Afterwards only this engine can run the model."""
        if any([group.release() for group in self.groups]):
            workspace.release()

    def after_step(self) -> None:
        """Where memory is tight, hand back what the step has freed; the next one pays for it with page faults.

        Otherwise, after the first, what it had no use for.
        """
        if self.tight:
            workspace.release()
        elif not self._stepped:
            SLABS.release()
        self._stepped = True

    def close(self) -> None:
        """Give the model its own forwards back. Raises ModelError if its weights were released."""
        if self.released:
            raise ModelError("the model's weights were released to save memory", "Load the model again")
        self.patches.undo()
        if getattr(self.model, ATTRIBUTE, None) is self:
            delattr(self.model, ATTRIBUTE)


def plain(model: nn.Module) -> Engine:
    """An engine that changes nothing: padded rows, the model's own operations. The oracle of the others."""
    return Engine(model)


def _positions_of(model: nn.Module) -> int | None:
    """As `ModelSpec.most_tokens`."""
    learned = any(name.rpartition(".")[2] in OF_POSITIONS for name, _ in model.named_modules())
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    return int(stated) if learned and stated else None


@torch.no_grad()
def prepare(model: nn.Module, share_prefix: bool, release: bool = False) -> Engine:
    """Look at the model, which has its adapters attached, and replace what can be.

    Products are in the type of its weights. share_prefix: whether rows may have a common prefix computed once; not
    under dropout, whose masks are keyed by row. release: as `release_weights`, of every weight as soon as its product
    has a copy.
    """
    started = time.perf_counter()
    earlier: Engine | None = getattr(model, ATTRIBUTE, None)
    if earlier is not None:
        earlier.close()
    engine = Engine(model, _configs=attention.configs_of(model), _most_tokens=_positions_of(model))
    setattr(model, ATTRIBUTE, engine)
    attention.register()
    with _without_dropout(model):
        probe = Probe(model)
        engine.chunked = probe.logits_are_the_heads()
        reason = probe.why_not_packed()
        linear_groups = probe.linear_groups()
        patch_norms(model, engine.patches)
        patch_gated_mlps(model, engine.patches)
        patch_rotary(model, engine.patches)
    if reason is None:
        engine.packing = Packing(padded=False, share_prefix=share_prefix)
    else:
        engine.notes.append(f"rows are padded: {reason}")
    names = {module: name for name, module in model.named_modules()}
    for modules in linear_groups:
        engine.groups.append(make_group(modules, [names[m] for m in modules], engine.patches))
        if release and engine.groups[-1].release():
            workspace.release()  # or all weights would be there twice before the first step
    if reason is None:
        with _without_dropout(model):
            _fuse_layers(engine, probe)
    trim_heap()
    engine.prepare_s = time.perf_counter() - started
    return engine


def _fuse_layers(engine: Engine, probe: Probe) -> None:
    """Let every decoder layer be one function, where that gives the same bits for the probe's rows.

    Of layers that are built alike, with one window, one is tried. The last one computes what follows its attention for
    the tokens alone that predict something, where nothing after it mixes tokens.
    """
    like = torch.empty(0, dtype=engine.dtype, device=next(engine.model.parameters()).device)
    tried, fused = dict[object, bool](), dict[nn.Module, decoder.Parts]()
    for layer, (arguments, named) in probe.layer_calls.items():
        parts = decoder.parts_of(layer, engine.groups, engine.patches, probe.windows)
        if parts is None or not decoder.served(like, parts):
            continue
        alike = decoder.signature(layer), parts.window
        if alike not in tried:
            with engine._in_force(probe.packed.layout, None):
                tried[alike] = decoder.same_bits(layer, parts, arguments, named)
        if tried[alike]:
            fused[layer] = parts
            engine.patches.set(layer, decoder.forward_of(layer, parts))
    layers = decoder_layers(engine.model)[1]
    if layers and all(layer in fused for layer in layers) and _ends_by_token(engine, probe):
        engine.ends_early = True
        engine.patches.set(layers[-1], decoder.forward_of(layers[-1], fused[layers[-1]], lambda: engine._wanted))


def _ends_by_token(engine: Engine, probe: Probe) -> bool:
    arguments, named = probe.layer_calls[decoder_layers(engine.model)[1][-1]]
    like = arguments[0] if arguments else named["hidden_states"]
    with engine._in_force(probe.packed.layout, None):
        return ends_by_token(
            engine.model, loss.head_of(engine.model), lambda: loss.run(engine.model, probe.packed), like
        )


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
