"""What a model knows at each depth: the hidden states that its blocks are given, one by one.

Layer k is what block k is given: 0 the embeddings, then what the first k blocks have made of them; the last layer is
what the model gives, behind its last norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

from torch import Tensor, nn

from lorafit.engine.layers import Stopped, decoder_layers
from lorafit.errors import ConfigError


def check_layer(model: nn.Module, layer: int | None) -> int:
    """The number of the last layer. Raises ConfigError for a layer that the model has not, or if none are found."""
    count = len(decoder_layers(model)[1])
    if not count:
        raise ConfigError("the layers of this model are not found", "Leave --layer and --probe out")
    if layer is not None and layer > count:
        raise ConfigError(f"--layer {layer} is given, and the last layer is {count}", f"Give 0 to {count}")
    return count


def hidden_at(body: nn.Module, layer: int, run: Callable[[], Any]) -> Tensor:
    """The hidden states of a layer: (rows, width, hidden). run: runs `body`, and is left as soon as they are there."""
    blocks = decoder_layers(body)[1]
    if layer == len(blocks):
        return cast(Tensor, run().last_hidden_state)
    kept: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        kept.append(_given(arguments, named))
        raise Stopped

    handle = blocks[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with suppress(Stopped):
            run()
    finally:
        handle.remove()
    (hidden,) = kept
    return hidden


@contextmanager
def watched(body: nn.Module, told: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While this holds, `told` hears of every layer but the last, with its hidden states, in each pass."""

    def hook(layer: int) -> Callable[..., None]:
        return lambda module, arguments, named: told(layer, _given(arguments, named))

    with ExitStack() as stack:
        for layer, block in enumerate(decoder_layers(body)[1]):
            stack.callback(block.register_forward_pre_hook(hook(layer), with_kwargs=True).remove)
        yield


def _given(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return cast(Tensor, arguments[0] if arguments else named["hidden_states"])
