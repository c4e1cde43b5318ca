"""Modules that an adapter replaces whole, such as an output head: PEFT's `modules_to_save`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.errors import TargetError
from lorafit.lora.adapted import Adapted, SharedState
from lorafit.lora.ties import weight_key
from lorafit.quant.modules import Quantized

OWN = "own_"  # before the name of the base's parameter that a trained one replaces


@dataclass
class WholeState(SharedState):
    """bases: the modules that have the same new parameters. before: while merged, what each of them had."""

    bases: list[nn.Module] = field(default_factory=list)
    before: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = field(default_factory=list)


class Whole(Adapted):
    """A module of any class with other parameters in the place of all of its own.

    own_weight, own_bias, ...: shaped as the base's, float32 (float64 over float64). At scale s a parameter in force is
    W0 + s (W - W0); at 0 the base is used as it is. Modules that are one weight and stay so have the same ones: tied_to
    is then the name of the first. Others that share the base's weight keep it: merging gives this module its own.
    """

    shared: WholeState

    def __init__(
        self, base: nn.Module, *, name: str, values: dict[str, nn.Parameter], shared: WholeState, tied_to: str | None
    ) -> None:
        super().__init__(base, name=name, shared=shared, tied_to=tied_to)
        shared.bases.append(base)
        self.changes = tuple(values)
        for key, value in values.items():
            self.register_parameter(OWN + key, value)
        # Computes what the base's class does, and nothing that was put in the base's place. A tuple: no child of this.
        self._stand_in = (copy.copy(base),)

    @property
    def keys(self) -> list[str]:
        """The names of the base's parameters."""
        return [name.removeprefix(OWN) for name, _ in self.named_parameters(recurse=False)]

    def in_force(self, key: str, original: Tensor | None = None) -> Tensor:
        """A parameter at the present scale, float32 or float64. original: of the base, where it has another one now."""
        own = self.get_parameter(OWN + key)
        if self.scale == 1:
            return own
        original = self.base.get_parameter(key) if original is None else original
        return torch.lerp(original.to(own.dtype), own, self.scale)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What a module of the base's class with the parameters in force gives."""
        if not self.is_active:
            return self.base(*arguments, **named)
        (stand_in,) = self._stand_in
        own = {key: self.in_force(key).to(self.base.get_parameter(key).dtype) for key in self.keys}
        stand_in._parameters = {**self.base._parameters, **own}  # type: ignore[dict-item]  # none is registered
        return type(stand_in).forward(stand_in, *arguments, **named)

    @torch.no_grad()
    def merge(self) -> None:
        """Give the base these parameters, and all modules that have the same. Twice is once."""
        if self.merged:
            return
        of_base = {key: self.base.get_parameter(key) for key in self.keys}
        new = {
            key: nn.Parameter(self.in_force(key).to(old.dtype, copy=True), requires_grad=False)
            for key, old in of_base.items()
        }
        self.shared.before = [(base, dict(base._parameters)) for base in self.shared.bases]
        for base in self.shared.bases:
            base._parameters.update(new)
        self.shared.original = next(iter(of_base.values()))

    def unmerge(self) -> None:
        """Put the base's own parameters back, the very same."""
        if self.shared.original is not None:
            for base, before in self.shared.before:
                base._parameters.update(before)
            self.shared.before, self.shared.original = [], None

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        tied = f", tied_to={self.tied_to}" if self.tied_to else ""
        return f"replaces {', '.join(self.keys)}, scale={self.scale:g}{tied}"


def attach_whole(model: nn.Module, groups: Iterable[Sequence[str]]) -> dict[str, Whole]:
    """Replace modules, all parameters of which are then trained. groups: names; those of one group share what is new.

    Fresh parameters are those of the base. Returns what was put in place, by name. Nothing is changed if anything is
    wrong. Raises TargetError for a module that is adapted already, or that stays in fewer bits.
    """
    made: dict[str, Whole] = {}
    for group in groups:
        shared, owner = WholeState(), None
        for name in group:
            module = model.get_submodule(name)
            _check(name, module)
            values = _values(module) if owner is None else dict(zip(owner.keys, owner.parameters(False), strict=True))
            made[name] = Whole(
                module, name=name, values=values, shared=shared, tied_to=None if owner is None else owner.name
            )
            owner = owner or made[name]
    for name, whole in made.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, whole)
    return made


def whole_modules(model: nn.Module) -> dict[str, Whole]:
    """All modules that are replaced whole, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Whole)}


def with_same_weight(model: nn.Module, name: str) -> list[str]:
    """The names of all modules with the weight of this one, in the model's order; its own among them."""
    key = weight_key(model.get_submodule(name))
    return [name] if key is None else [other for other, module in model.named_modules() if weight_key(module) == key]


def _check(name: str, module: nn.Module) -> None:
    if isinstance(module, Adapted):
        raise TargetError(f"{name} is adapted, and is to be replaced as well", "Leave it out of one of the two")
    if isinstance(module, Quantized):
        raise TargetError(
            f"{name} stays in {module.stored.name} and is to be replaced", "Leave out --base-storage for this adapter"
        )


def _values(module: nn.Module) -> dict[str, nn.Parameter]:
    own = {key: value for key, value in module._parameters.items() if value is not None}
    return {
        key: nn.Parameter(value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True))
        for key, value in own.items()
    }
