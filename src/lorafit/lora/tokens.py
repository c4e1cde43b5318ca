"""Trained rows of single tokens: an embedding, and the output head, in which some tokens have rows of their own.

All other rows stay frozen. The rows replace those of the base; they are no sum with it, since a token that the base
never saw has no row worth adding to. Compare PEFT's `trainable_token_indices`, whose file format they are saved in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.errors import TargetError
from lorafit.lora.adapted import Adapted, SharedState
from lorafit.lora.base import refusal
from lorafit.lora.ties import weight_key
from lorafit.quant.modules import Quantized


class TokenRows(Adapted):
    """An embedding or an output head over `base` in which the rows of some tokens are trained.

    rows: (tokens, width), float32 (float64 over a float64 base), the trained parameter. ids: (tokens,) int64, which
    tokens they belong to.
    At scale s a row in force is W0 + s (rows - W0); at 0 the base is used as it is. A head tied to an embedding has the
    same rows: tied_to is then the embedding's name.
    """

    rows: nn.Parameter
    ids: Tensor
    slots: Tensor

    def __init__(
        self, base: nn.Module, *, name: str, rows: nn.Parameter, ids: Tensor, shared: SharedState, tied_to: str | None
    ) -> None:
        super().__init__(base, name=name, shared=shared, tied_to=tied_to)
        self.is_head = not isinstance(base, nn.Embedding)
        self.register_parameter("rows", rows)
        self.register_buffer("ids", ids, persistent=False)
        # Token -> which of the rows is its own, -1 for none.
        slots = torch.full((_weight(base).shape[0],), -1, dtype=torch.int64, device=ids.device)
        slots[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("slots", slots, persistent=False)

    def rows_in_force(self) -> Tensor:
        """The rows at the present scale: (tokens, width), float32."""
        if self.scale == 1:
            return self.rows
        own = _weight(self.base)[self.ids].to(self.rows.dtype)
        return torch.lerp(own, self.rows, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """An embedding of ids (...) gives (..., width); a head of (..., width) gives logits (..., vocabulary)."""
        y = cast(Tensor, self.base(x))
        if not self.is_active:
            return y
        return self._with_logits(x, y) if self.is_head else self._with_embeddings(x, y)

    def _with_embeddings(self, x: Tensor, y: Tensor) -> Tensor:
        slots = self.slots[x]
        own = F.embedding(slots.clamp(min=0), self.rows_in_force()).to(y.dtype)
        scale = getattr(self.base, "embed_scale", None)  # of Gemma's, BART's: see `base.Embedding`
        if scale is not None:
            own = own * (scale.to(own.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((slots >= 0)[..., None], own, y)

    def _with_logits(self, x: Tensor, y: Tensor) -> Tensor:
        bias = cast(nn.Linear, self.base).bias
        own = F.linear(x, self.rows_in_force().to(x.dtype), None if bias is None else bias[self.ids])
        return y.index_copy(-1, self.ids, own)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the rows into the base's weight, for all modules that share it. Twice is once."""
        if self.merged:
            return
        weight = _weight(self.base)
        rows = self.rows_in_force().to(weight.dtype)
        self.shared.original = weight[self.ids].clone()
        weight[self.ids] = rows

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original rows back, bitwise."""
        if self.shared.original is not None:
            _weight(self.base)[self.ids] = self.shared.original
            self.shared.original = None

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        tied = f", tied_to={self.tied_to}" if self.tied_to else ""
        return f"tokens={len(self.ids)}, scale={self.scale:g}{tied}"


def make_room(model: Any, ids: Sequence[int]) -> int:
    """Give a transformers model rows up to the largest id. Returns how many were added.

    A new row is the mean of all that were there, in float32: what the model knows of a token that it never saw (Hewitt
    2021, Initializing New Word Embeddings for Pretrained Language Models). Adapters must not be attached yet. Raises
    TargetError for an embedding in fewer bits.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, Quantized):
        raise TargetError(
            f"rows of single tokens cannot be trained in an embedding that stays in {embedding.stored.name}",
            "Leave out --add-tokens or --base-storage keep",
        )
    before = int(model.get_input_embeddings().weight.shape[0])
    wanted = max(ids) + 1
    if wanted <= before:
        return 0
    trains = bool(model.get_input_embeddings().weight.requires_grad)
    model.resize_token_embeddings(wanted, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if module is not None:
                weight = _weight(module).requires_grad_(trains)  # a head that is made anew would train
                weight[before:] = weight[:before].mean(dim=0, dtype=torch.float32).to(weight.dtype)
    return wanted - before


def attach_rows(
    model: Any,
    ids: Sequence[int],
    start: Sequence[Sequence[int]] | None = None,
    only: Collection[str] | None = None,
) -> dict[str, TokenRows]:
    """Train the rows of some tokens, in the embedding and in the output head, and nothing else of these.

    ids: the tokens, each once, below the number of rows. start: for each, the tokens whose mean row it begins with;
    without, or where there are none, its own row of the base. only: names of the modules that have rows, and those that
    share a weight with them; None for both. Returns what was put in place, by name; a head that is tied to the
    embedding shares its rows. Raises TargetError where either is adapted already, or is of no such kind.
    """
    names = {module: name for name, module in model.named_modules()}
    made: dict[str, TokenRows] = {}
    index = torch.tensor(list(ids), dtype=torch.int64)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is None:
            continue
        owner = next((o for o in made.values() if weight_key(o.base) == weight_key(module)), None)
        if only is not None and names[module] not in only and owner is None:
            continue
        _check(module, names[module])
        made[names[module]] = TokenRows(
            module,
            name=names[module],
            rows=owner.rows if owner else nn.Parameter(_first_rows(_weight(module), index, start)),
            ids=index.to(_weight(module).device),
            shared=owner.shared if owner else SharedState(),
            tied_to=owner.name if owner else None,
        )
    for name, rows in made.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, rows)
    return made


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """All modules with trained rows, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TokenRows)}


def _check(module: nn.Module, name: str) -> None:
    if isinstance(module, Adapted):
        raise TargetError(
            f"{name} is adapted already, so rows of single tokens cannot be trained in it too",
            f"Leave {name} out of the targets",
        )
    reason = refusal(module)
    if reason is None and not isinstance(module, nn.Embedding | nn.Linear):
        reason = f"is a {type(module).__name__}"
    if reason is not None:
        raise TargetError(f"rows of single tokens cannot be trained in {name}: it {reason}", "Leave out --add-tokens")


@torch.no_grad()
def _first_rows(weight: Tensor, ids: Tensor, start: Sequence[Sequence[int]] | None) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = weight.detach()[ids].to(wide)
    for number, pieces in enumerate(start or ()):
        if pieces:
            rows[number] = weight.detach()[list(pieces)].to(wide).mean(dim=0)
    return rows


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)
