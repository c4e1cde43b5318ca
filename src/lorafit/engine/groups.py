"""Linear layers that share an input, with the product that serves them; int8 is calibrated on real rows first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorafit import slabs
from lorafit.engine.lengths import ROWS_AT_ONCE, row_squares
from lorafit.engine.linear import Factors, FrozenLinears
from lorafit.engine.patch import Patches
from lorafit.engine.product import Dense, FromStored, Int8, Packed, PackedInt8, Product, make_int8, plus
from lorafit.engine.update import Addend
from lorafit.lora.base import Kind, make_kind
from lorafit.lora.layer import LoRALayer
from lorafit.quant.modules import QuantizedLinear

USUAL_ROWS = 512
# Largest relative error (Frobenius norm) of a product in int8, on the rows it was calibrated on, forward and backward.
# Scaled column by column, SmolLM2's layers stay below 0.032 and 0.07, and its loss is that of bf16; not scaled, up to
# 0.064 and 0.125, and a run ended with a test loss 15% higher.
INT8_LIMITS = (0.05, 0.1)
# The rows whose products are computed both ways.
SAMPLED = slice(None, None, 4)


@dataclass(eq=False)
class Group:
    """Modules (adapted or plain linear layers), their weights stacked (sum of outs, in), and what computes them.

    W: None where it stays in fewer bits, or was released.
    """

    modules: list[nn.Module]
    kinds: list[Kind]
    names: list[str]
    W: Tensor | None
    linears: FrozenLinears
    released: bool = False

    @property
    def label(self) -> str:
        """Such as `model.layers.3.mlp.gate_proj+up_proj`."""
        rest = [name.rsplit(".", 1)[-1] for name in self.names[1:]]
        return "+".join([self.names[0], *rest])

    def release(self) -> bool:
        """Give the memory of the stored weights back, where the product has its own copy and nothing else reads them.

        The modules keep a weight of the same shape that takes no memory and must not be used; W is None from then on.
        Returns whether there was anything to give.
        """
        if self.W is None or isinstance(self.linears.product, Dense) or not all(map(is_whole, self.modules)):
            return False
        for kind in self.kinds:
            weight = kind.weight
            weight.data = weight.new_zeros(()).expand(weight.shape)
        self.W, self.released = None, True
        return True


def make_group(modules: list[nn.Module], names: list[str], patches: Patches) -> Group:
    """Let one product serve modules that share an input. An adapted one with a variant or dropout keeps its branch."""
    bases = [m.base if isinstance(m, LoRALayer) else m for m in modules]
    kinds = [make_kind(base) for base in bases]
    stored = [base.stored for base in bases if isinstance(base, QuantizedLinear)]
    W = None if stored else _stack_weights(kinds)
    factors = [_factors(m) if is_whole(m) and isinstance(m, LoRALayer) else None for m in modules]
    linears = FrozenLinears(
        FromStored(stored) if W is None else _product(W),
        [k.out_features for k in kinds],
        [k.bias for k in kinds],
        factors,
        _squares(bases, W, factors),
    )
    for index, (module, base) in enumerate(zip(modules, bases, strict=True)):
        target = module if is_whole(module) else base
        patches.set(target, _forward(linears, index, target, module))
    return Group(modules, kinds, names, W, linears)


def _forward(linears: FrozenLinears, index: int, target: nn.Module, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The new forward of `target`, which is `layer` or the base of it. A merged weight is not the one prepared."""
    is_own = target is layer
    own: Any = type(target).forward

    def forward(x: Tensor) -> Tensor:
        if isinstance(layer, LoRALayer) and (layer.merged or (is_own and not is_served(layer))):
            y: Tensor = own(target, x)
            return y
        return linears(index, x)

    return forward


def is_whole(module: nn.Module) -> bool:
    """Whether the group computes the module's update as well, and not only its base."""
    if not isinstance(module, LoRALayer):
        return True
    return (module.variant.is_low_rank or module.variant.has_lengths) and module.dropout.p == 0


def is_served(layer: LoRALayer) -> bool:
    """Whether the group's product holds for the layer as it is now: not merged, and not learning at another scale.

    The gradient of lengths is made for the updated weight itself, and no training is at another scale than 1.
    """
    as_trained = layer.scale == 1 or not layer.variant.has_lengths
    return not layer.merged and (as_trained or not torch.is_grad_enabled())


def _factors(layer: LoRALayer) -> Factors:
    A, B = (lambda: layer.factors()[0]), (lambda: layer.factors()[1])
    if not layer.variant.has_lengths:
        return Factors(A, B, lambda: layer.scaling * layer.scale)
    return Factors(
        A,
        B,
        lambda: layer.scaling if layer.scale else 0.0,
        lambda: layer.get_parameter("magnitude"),
        lambda: layer.scale,
    )


def _squares(bases: list[nn.Module], W: Tensor | None, factors: list[Factors | None]) -> Tensor | None:
    """|w|^2 of all rows, where the updated weight has lengths of its own."""
    if all(f is None or f.m is None for f in factors):
        return None
    if W is not None:
        return row_squares([W])
    parts = (base.stored.decoded_parts(ROWS_AT_ONCE, base.dtype) for base in bases if isinstance(base, QuantizedLinear))
    return row_squares(part for each in parts for _, part in each)


def _stack_weights(kinds: list[Kind]) -> Tensor:
    """(sum of outs, in). The modules' own weights become views of it, so nothing is kept twice."""
    if len(kinds) == 1:
        return kinds[0].read_weight()
    weights = [kind.read_weight() for kind in kinds]
    rows, (width, dtype) = sum(map(len, weights)), (weights[0].shape[1], weights[0].dtype)
    place = slabs.empty((rows, width), dtype) if weights[0].device.type == "cpu" else None
    whole = torch.cat(weights, out=place)
    first = 0
    for kind in kinds:
        kind.weight.data = whole[first : first + kind.out_features]
        first += kind.out_features
    return whole


def _product(W: Tensor) -> Product:
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if W.device.type == "cpu" and W.dtype == torch.float32 and has_onednn:
        return Packed(W, USUAL_ROWS)
    return Dense(W)


# --- int8 -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int8Error:
    """Relative errors (Frobenius norm) of a group's products in int8 on the rows it was calibrated on."""

    label: str
    forward: float
    backward: float

    @property
    def too_large(self) -> bool:
        """Whether the group is to stay as it was."""
        return not (self.forward <= INT8_LIMITS[0] and self.backward <= INT8_LIMITS[1])


def calibrate(groups: list[Group], forward: Callable[[], Tensor], release: bool) -> list[Int8Error]:
    """Put int8 products into groups, each measured against the dense one; where the error is too large, it stays.

    forward: gives the loss of some real rows, whose backward pass may compute layers again. release: give stored
    weights back, each as soon as it is done with; the next int8 copies take their place.
    """
    errors: dict[Group, Int8Error] = {}

    def finish(group: Group) -> None:
        measured = group.linears.product
        assert isinstance(measured, _Calibration)
        error = Int8Error(group.label, measured.forward_error.value, measured.backward_error.value)
        chosen = measured.int8 if measured.int8 is not None and not error.too_large else None
        group.linears.product = chosen or Dense(measured.W)
        if release:
            group.release()
        errors[group] = error

    for group in groups:
        assert group.W is not None, "weights are released after calibration"
        group.linears.product = _Calibration(group.W, partial(finish, group))
    loss = forward()
    for group in groups:
        if isinstance(group.linears.product, _Calibration):
            group.linears.product.is_first = False
    loss.backward()  # type: ignore[no-untyped-call]
    for group in groups:  # those below the lowest adapter have no backward pass
        if group not in errors:
            finish(group)
    return [errors[group] for group in groups]


@dataclass
class _Error:
    """A relative error in the Frobenius norm, over several calls."""

    difference: float = 0.0
    size: float = 0.0

    def add(self, expected: Tensor, got: Tensor) -> None:
        self.difference += _square(got - expected)
        self.size += _square(expected)

    @property
    def value(self) -> float:
        return float((self.difference / self.size) ** 0.5) if self.size else 0.0


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float32)) ** 2


class _Calibration(Dense):
    """int8's product, made from the first x that comes by and held against the dense one, which takes over if need be.

    finish: called when every forward call has had its backward call. is_first: whether forward calls are counted, and
    not those of a layer that is computed again.
    """

    def __init__(self, W: Tensor, finish: Callable[[], None]) -> None:
        super().__init__(W)
        self.finish, self.pending, self.is_first = finish, 0, True
        self.int8: Int8 | PackedInt8 | None = None
        self.forward_error, self.backward_error = _Error(), _Error()

    def forward(self, x: Tensor, update: Addend | None = None) -> Tensor:
        """The product x W^T, plus the update."""
        self.pending += self.is_first
        if self.int8 is None:
            self.int8 = make_int8(self.W, x.abs().amax(0))
        y = self.int8.forward(x)
        self.forward_error.add(super().forward(x[SAMPLED]), y[SAMPLED])
        if not self.forward_error.value <= INT8_LIMITS[0]:
            y = super().forward(x)
        return plus(y, update)

    def backward(self, g: Tensor, update: Addend | None = None) -> Tensor:
        """The product g W, plus the update."""
        assert self.int8 is not None, "made in the forward pass"
        gx = self.int8.backward(g)
        self.backward_error.add(super().backward(g[SAMPLED]), gx[SAMPLED])
        if not self.backward_error.value <= INT8_LIMITS[1]:
            gx = super().backward(g)
        self.pending -= 1
        if self.pending == 0:
            self.finish()
        return plus(gx, update)
