"""The decoder's layers: which of them training does not touch, and which are computed again in the backward pass.

Below the lowest layer that is adapted nothing changes, so what it is given is the same in every epoch: `Features` keeps
it on disk, and later forward passes start there. Above, `recompute` keeps a layer's input alone and runs the layer
again for its gradient (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost). What the last layer gives is
wanted for the tokens alone that predict something, where `ends_by_token`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafit.engine.batch import Batch
from lorafit.engine.tally import TALLY


def decoder_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """(name, layers): the model's blocks in order, with the name of the list that holds them; empty if not found."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)  # type: ignore[union-attr, operator]
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and count:
            return name, list(module)
    return "", []


def untouched_layers(model: nn.Module) -> int:
    """How many layers, from the first on, stand below everything that is trained.

    0 where anything is trained that is neither in a layer nor in the output head alone: it may come before them.
    """
    name, layers = decoder_layers(model)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    before = {id(p) for p in embeddings.parameters()}
    in_head = {id(p) for p in head.parameters()} - before if isinstance(head, nn.Module) else set()
    trained = [(path, p) for path, p in model.named_parameters() if p.requires_grad]
    lowest = len(layers)
    for path, parameter in trained:
        if layers and path.startswith(f"{name}."):
            lowest = min(lowest, int(path[len(name) + 1 :].split(".", 1)[0]))
        elif id(parameter) not in in_head:
            return 0
    return lowest if trained else 0


@contextmanager
def in_place_of(forwards: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """While this holds, these modules have other forwards."""
    before = [(module, module.__dict__.get("forward")) for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own


class Stopped(Exception):  # a signal, not an error
    """Raised to leave a forward pass where the rest is not wanted."""


class Features:
    """What layer `below` is given, for every token of every training row, in a memory-mapped file.

    offsets: (rows + 1,) int64, where each row's tokens begin. values: (tokens, hidden) in the model's type.
    """

    def __init__(self, path: Path, lengths: list[int], below: int, hidden: int, dtype: torch.dtype) -> None:
        self.path, self.below, self.dtype = path, below, dtype
        self.offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        bits = np.uint16 if dtype.itemsize == 2 else np.uint32
        self.others: int | None = None  # how many values a layer returns beside its output, where that is a tuple
        self.values = np.memmap(path, dtype=bits, mode="w+", shape=(sum(lengths), hidden))

    @staticmethod
    def file_bytes(lengths: list[int], hidden: int, dtype: torch.dtype) -> int:
        """Bytes of the file."""
        return sum(lengths) * hidden * dtype.itemsize

    def fill(self, engine_run: Callable[[Batch], Any], model: nn.Module, batches: Iterable[Batch]) -> None:
        """Run the model over all rows up to layer `below`, and keep what it would be given."""
        layers = decoder_layers(model)[1]
        seen: list[Tensor] = []

        def stop(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append(arguments[0] if arguments else named["hidden_states"])
            raise Stopped

        def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            self.others = len(output) - 1 if isinstance(output, tuple) else None

        handles = [
            layers[self.below].register_forward_pre_hook(stop, with_kwargs=True),
            layers[0].register_forward_hook(note),
        ]
        try:
            for batch in batches:
                try:
                    engine_run(batch)
                except Stopped:
                    self._keep(batch, seen.pop())
        finally:
            for handle in handles:
                handle.remove()
        self.values.flush()

    def _keep(self, batch: Batch, hidden: Tensor) -> None:
        """Every row's own tokens; a shared prefix belongs to each row that continues it."""
        flat = hidden.flatten(0, -2)
        as_bits = flat.view(torch.int16 if self.dtype.itemsize == 2 else torch.int32).numpy().view(self.values.dtype)
        for row, places in batch.row_places():
            self.values[int(self.offsets[row]) : int(self.offsets[row]) + len(places)] = as_bits[places]

    def of(self, batch: Batch) -> Tensor:
        """What layer `below` is given for the tokens of this batch: shaped like input_ids, and hidden."""
        lengths = self.offsets[1:] - self.offsets[:-1]
        position = torch.minimum(batch.position_ids, lengths[batch.token_rows] - 1)  # padding takes the last token's
        where = (self.offsets[batch.token_rows] + position).numpy()
        signed = np.int16 if self.dtype.itemsize == 2 else np.int32
        return torch.from_numpy(self.values[where].view(signed)).view(self.dtype)

    def forwards(self, model: nn.Module, batch: Batch) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """The layers below with what takes their place: the first gives the features, the others pass them on."""
        given = self.of(batch)

        def first(x: Tensor, *arguments: Any, **named: Any) -> Any:
            return self._as_output(given)

        def other(x: Tensor, *arguments: Any, **named: Any) -> Any:
            return self._as_output(x)

        layers = decoder_layers(model)[1][: self.below]
        return [(layer, other if number else first) for number, layer in enumerate(layers)]

    def _as_output(self, x: Tensor) -> Any:
        """What a layer returns: the tensor, or a tuple that it leads."""
        return x if self.others is None else (x, *[None] * self.others)


def ends_by_token(model: nn.Module, head: nn.Module, run: Callable[[], Any], like: Tensor) -> bool:
    """Whether a token's place before the head depends on the last layer's output for that token and on nothing else.

    run: takes the model over a few tokens. like: what a layer gives for them, (1, tokens, hidden). Layers must return
    tensors. Their output is replaced: by random numbers once, and once by those of every other token.
    """
    whole = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    every_other = torch.arange(like.shape[1], device=like.device) % 2 == 0
    found: list[Tensor] = []

    def stop(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.append(arguments[0])
        raise Stopped

    layers = decoder_layers(model)[1]
    handle = head.register_forward_pre_hook(stop)
    try:
        for given in (whole, whole * every_other[:, None]):
            others = [(layer, lambda *_, given=given, **named: given) for layer in layers]
            with in_place_of(others), suppress(Stopped):
                run()
    finally:
        handle.remove()
    return len(found) == 2 and torch.equal(*(hidden[:, every_other] for hidden in found))


def run_again(layer: nn.Module) -> Callable[..., Any]:
    """A forward for `layer` that keeps its input alone and runs once more, with a graph, when its gradient has come.

    So what hooks keep of its modules, whose outputs have a gradient in that second run alone, lives no longer than the
    layer's own backward pass (with `recompute`, their hooks hold what the first run gave).
    """
    own = layer.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return own(*arguments, **named)
        rest = dict(named)
        x, *more = arguments or (rest.pop("hidden_states"),)
        given = x if x.requires_grad else x.detach().requires_grad_()  # or its outputs would have no graph at all
        return checkpoint(lambda x: own(x, *more, **rest), given, use_reentrant=True, preserve_rng_state=False)

    return forward


def recompute(
    layer: nn.Module, running: Callable[[], Callable[[], AbstractContextManager[None]]]
) -> Callable[..., Any]:
    """A forward for `layer` that keeps its input alone.

    running: called in the forward pass, gives what makes the context that must hold when the layer runs once more.
    """
    own = layer.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return own(*arguments, **named)
        context, again = running(), False

        def run(*inner: Any) -> Any:
            nonlocal again
            before, TALLY.paused = TALLY.paused, again or TALLY.paused
            again = True
            try:
                with context():
                    return own(*inner, **named)
            finally:
                TALLY.paused = before

        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)

    return forward
