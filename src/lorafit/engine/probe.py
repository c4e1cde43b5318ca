"""Looking at a model by running it, still untouched, on a few tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.engine import attention, loss
from lorafit.engine.batch import Batch, Bucket
from lorafit.engine.layers import decoder_layers
from lorafit.engine.linear import is_frozen
from lorafit.lora.layer import LoRALayer
from lorafit.quant.modules import QuantizedLinear

PROBE_ROW = 7
PREFIX = 2  # tokens that both rows begin with
# What models raise that were not written for attention functions, or get None for a mask that they need.
REFUSALS = (NotImplementedError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)


class Probe:
    """Two short rows of one length with the same beginning, and what the model makes of them."""

    def __init__(self, model: nn.Module) -> None:
        """Runs the model once; it must be without dropout."""
        self.model = model
        device = next(model.parameters()).device
        vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        ids = torch.randint(0, vocabulary, (2, PROBE_ROW), generator=torch.Generator().manual_seed(0)).to(device)
        ids[1, :PREFIX] = ids[0, :PREFIX]
        self.rows = ids
        self.packed = _packed_rows(ids)
        self.head_calls: list[tuple[Tensor, Tensor]] = []
        self.linear_calls: list[tuple[nn.Module, Tensor]] = []
        # What each decoder layer was given for `packed`.
        self.layer_calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        # The window of each attention module that was called for it.
        self.windows: dict[nn.Module, int] = {}
        self.logits = self._watched()

    def _watched(self) -> Tensor:
        """Logits, (2, PROBE_ROW, vocabulary), with what the output head and the linear layers were given on the way."""
        handles = [
            module.register_forward_pre_hook(lambda module, arguments: self.linear_calls.append((module, arguments[0])))
            for module in _linears(self.model)
        ]
        handles.append(
            loss.head_of(self.model).register_forward_hook(
                lambda module, arguments, output: self.head_calls.append((arguments[0], output))
            )
        )
        try:
            logits: Tensor = self.model(input_ids=self.rows, use_cache=False).logits
            return logits
        finally:
            for handle in handles:
                handle.remove()

    def logits_are_the_heads(self) -> bool:
        """Whether logits are the output head's output, untouched, and hidden states its input."""
        calls = self.head_calls
        return len(calls) == 1 and torch.equal(calls[0][1].reshape(self.logits.shape), self.logits)

    def why_not_packed(self) -> str | None:
        """The reason why this model can't run rows one after the other, or None if it gives what rows alone give."""
        batch = self.packed
        # What a few tokens can't show: masks that matter in longer rows only, and never reach an attention function.
        config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        handles = [
            layer.register_forward_pre_hook(
                lambda *call: self.layer_calls.update({call[0]: call[1:]}), with_kwargs=True
            )
            for layer in decoder_layers(self.model)[1]
        ]
        try:
            configs = attention.configs_of(self.model)
            with attention.watched_windows() as self.windows, attention.packed(configs, batch.layout or ()):
                got = loss.run(self.model, batch).logits[0]
        except REFUSALS as error:
            return f"{type(self.model).__name__} does not take packed attention ({_first_line(error)})"
        finally:
            for handle in handles:
                handle.remove()
        hidden_mask = getattr(config, "attention_chunk_size", None) or (
            getattr(config, "sliding_window", None) and not any(self.windows.values())
        )
        if hidden_mask:
            return f"{type(self.model).__name__} limits attention by its mask alone"
        expected = torch.cat([self.logits[0], self.logits[1, PREFIX:]])
        # Contamination between rows, or wrong positions, change logits by as much as they are large.
        off = float((got.float() - expected.float()).norm() / expected.float().norm())
        # A head of labels gives float32 of whatever it is given.
        eps = max(torch.finfo(x.dtype).eps for x in (got, self.head_calls[0][0]))
        if not off < 4 * eps**0.75:
            return f"{type(self.model).__name__} gives other numbers for packed rows (relative difference {off:.1g})"
        return None

    def linear_groups(self) -> list[list[nn.Module]]:
        """Frozen linear layers in the order of their calls; those that were given the same tensor together."""
        calls = self.linear_calls
        times = Counter(id(module) for module, _ in calls)
        groups: list[list[nn.Module]] = []
        previous: Tensor | None = None
        for module, x in calls:
            if times[id(module)] > 1:
                continue
            if groups and x is previous and _stackable(groups[-1][-1], module):
                groups[-1].append(module)
            else:
                groups.append([module])
            previous = x
        return groups


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _linears(model: nn.Module) -> list[nn.Module]:
    """Linear layers, adapted or not, without the output head, what is trained, and what layers share."""
    head = loss.head_of(model)
    inside = {id(m.base) for m in model.modules() if isinstance(m, LoRALayer)} | {id(m) for m in head.modules()}
    found = []
    for module in model.modules():
        base = module.base if isinstance(module, LoRALayer) else module
        tied = isinstance(module, LoRALayer) and (module.tied_to is not None or module.transposed)
        usual = type(base) in (nn.Linear, QuantizedLinear) or type(base).__name__ == "Conv1D"
        if usual and is_frozen(base) and id(module) not in inside and not tied:
            found.append(module)
    return found


def _stackable(a: nn.Module, b: nn.Module) -> bool:
    """Both plain nn.Linear inside: their weights can be views of one stacked matrix. Or both in blocks."""
    bases = [m.base if isinstance(m, LoRALayer) else m for m in (a, b)]
    if all(type(base) is QuantizedLinear for base in bases):
        return True
    return all(type(base) is nn.Linear for base in bases) and bases[0].weight.dtype == bases[1].weight.dtype


def _packed_rows(rows: Tensor) -> Batch:
    """Two rows that share their first tokens, packed by hand: the prefix once, then what each adds."""
    a, b = rows
    ids = torch.cat([a, b[PREFIX:]])
    rest = len(a) - PREFIX

    def bucket(first: int, length: int, prefix: int) -> Bucket:
        tokens = torch.arange(first, first + length, dtype=torch.int32, device=ids.device)
        return Bucket(tokens, torch.tensor([length], dtype=torch.int32, device=ids.device), length, 0, prefix)

    position = torch.cat([torch.arange(len(a)), torch.arange(PREFIX, len(b))]).to(ids.device)
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(
        input_ids=ids[None],
        position_ids=position[None],
        attention_mask=None,
        layout=(bucket(0, PREFIX, 0), bucket(PREFIX, rest, PREFIX), bucket(len(a), rest, PREFIX)),
        token_rows=torch.zeros_like(ids)[None],
        predicts=nothing,
        targets=nothing,
        weights=nothing.float(),
        rows=2,
        real_tokens=len(a) + len(b),
        supervised_tokens=0,
    )
