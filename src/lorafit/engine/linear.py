"""Frozen linear layers with their low-rank updates, several that share one input at a time.

y_i = x W_i^T + b_i + scaling_i (x A_i^T) B_i^T. A frozen W has no gradient, so nothing is saved for it: only
x, and the r-wide h = x A^T. Where no earlier layer is adapted, x has no gradient either and g W is not computed.
Where rows of the updated weight have a length of their own, each output has a factor besides (`lengths`).
Source of the update: Hu et al. 2021, eq. 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorafit.engine import kernels
from lorafit.engine.elementwise import Recipe, recipe_of
from lorafit.engine.lengths import Lengthened, Lengths, lengths
from lorafit.engine.product import Product
from lorafit.engine.tally import TALLY
from lorafit.engine.update import PackedUpdate, Span, Update, make_update, spans


@dataclass(frozen=True, eq=False)
class Factors:
    """The update of one layer, asked anew each time. A: (r, in) and B: (out, r), float32, or views of the parameters.

    scaling: that of the layer times its scale. m: the lengths of the updated weight's rows, (out,), where it has such;
    then the scaling is the layer's alone, and 0 at scale 0, and strength is its scale.
    """

    A: Callable[[], Tensor]
    B: Callable[[], Tensor]
    scaling: Callable[[], float]
    m: Callable[[], Tensor] | None = None
    strength: Callable[[], float] = lambda: 1.0


class FrozenLinears:
    """Linear layers that are called one after the other with the same input: one product serves all of them.

    product: of their weights stacked, (sum of outs, in). outs: rows of each. biases, factors: of each, or None.
    squares: |w|^2 of each row, where a layer has lengths (then all adapted ones have). What is trained is given and
    asked for in the order of `trained_now`.
    The first that is called computes all outputs; each takes its own, once.
    """

    def __init__(
        self,
        product: Product,
        outs: list[int],
        biases: list[Tensor | None],
        factors: list[Factors | None],
        squares: Tensor | None = None,
    ) -> None:
        self.product, self.outs, self.factors, self.squares = product, outs, factors, squares
        self.bias = _stacked_bias(biases, outs)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []
        self._update: tuple[object, PackedUpdate] | None = None

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Output of layer `index`: (..., out), a view whose rows may be apart. x: (..., in)."""
        if self._input is not x or self._outputs[index] is None:
            self._input, self._outputs = x, list(self._compute(x))
        y = self._outputs[index]
        assert y is not None, "just computed"
        self._outputs[index] = None
        if not any(output is not None for output in self._outputs):
            self._input = None  # or the last input would live until the next call
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def spans(self, factors: Sequence[Tensor]) -> list[Span]:
        """The adapted layers, given their factors A, B in turn."""
        ranks = iter([len(A) for A in factors[::2]])
        adapted = [(next(ranks), f.scaling()) if f is not None else (None, 0.0) for f in self.factors]
        return spans(self.outs, [r for r, _ in adapted], [scaling for _, scaling in adapted])

    def update(self, factors: Sequence[Tensor], x: Tensor) -> Update | PackedUpdate:
        """The update of an input like x. One that reads the factors where they lie serves as long as they lie there."""
        scalings = [f.scaling() for f in self.factors if f is not None]
        key = x.dtype, x.device.type, scalings, [t.data_ptr() for t in factors]
        if self._update is not None and self._update[0] == key:
            return self._update[1]
        made = make_update(self.spans(factors), factors, x)
        self._update = (key, made) if isinstance(made, PackedUpdate) and made.reads(factors) else None
        return made

    def run(self, x: Tensor, trained: Sequence[Tensor]) -> Forward:
        """All outputs side by side. x: (n, in)."""
        update, h, addend = None, None, None
        factors = trained[: 2 * self.adapted]
        if factors:
            update = self.update(factors, x)
            h, addend = update.forward(x)
            TALLY.add(2 * x.shape[0] * sum(factor.numel() for factor in factors))
        y = self.product.forward(x, addend)
        TALLY.add(2 * x.shape[0] * x.shape[1] * y.shape[1])
        found = self._lengths(trained, x)
        own = None if found is None else self._lengthen(y, x, found)
        if self.bias is not None:
            y = y.add_(self.bias) if own is None else y + self.bias
        return Forward(y, h, How(update, found), own)

    def _lengths(self, trained: Sequence[Tensor], x: Tensor) -> Lengths | None:
        """What outputs are multiplied with, if with anything. Computed anew each time: an optimizer writes in place."""
        factors, ms = trained[: 2 * self.adapted], trained[2 * self.adapted :]
        strengths = [f.strength() for f in self.factors if f is not None]
        if not ms or not any(strengths) or self.squares is None:
            return None
        wide = torch.promote_types(ms[0].dtype, torch.float32)
        As, Bs, ms = ([tensor.to(wide) for tensor in some] for some in (factors[::2], factors[1::2], ms))
        each = zip(self.spans(factors), As, Bs, ms, strengths, strict=True)
        layers = [Lengthened(*layer) for layer in each if layer[-1]]
        product = self.product.thin(torch.cat(As).to(x.dtype))
        return lengths(self.squares, product, layers, torch.finfo(x.dtype).eps)

    def _lengthen(self, y: Tensor, x: Tensor, found: Lengths) -> Tensor:
        """Give y, the product with its update, what it is multiplied with, in its place. Returns y."""
        kernels.of(y).scale_columns_(y, found.gain)
        if found.rest is not None:
            y += self.product.forward(x) * found.rest
        return y

    def back(
        self,
        g: Tensor,
        x: Callable[[Tensor | None], Tensor],
        h: Tensor | None,
        how: How,
        own: Tensor | None,
        wants_gx: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """(gradient of x, gradients of what is trained). g: of all outputs, (n, sum of outs).

        x: what `run` was given, asked for once its own gradient is known, which it is told. h, how, own: what it gave.
        """
        update, of_m = how.update, list[Tensor]()
        if how.lengths is not None:
            assert own is not None and how.lengths.rest is None, "the layers' own forward serves other scales"
            g, sums = kernels.of(g).scale_columns_backward(g, own, how.lengths.gain)
            of_m = [(sums / how.lengths.m)[columns] for columns in self.columns]  # autograd rounds it to the type of m
        gh, addend = update.backward(g) if update is not None else (None, None)
        gx = None
        if wants_gx:
            gx = self.product.backward(g, addend)
            TALLY.add(2 * gx.numel() * g.shape[1])
        if update is None or gh is None or h is None:
            return gx, []
        gradients = update.gradients(x(gx), h, g, gh)
        of_A, of_B = (sum(gradient.numel() for gradient in gradients[first::2]) for first in (0, 1))
        # Their own, gh = g B, and what gh A adds to gx.
        TALLY.add(2 * g.shape[0] * (of_A + of_B + of_B + (of_A if wants_gx else 0)))
        return gx, gradients + of_m

    @property
    def adapted(self) -> int:
        """How many layers have an update."""
        return sum(f is not None for f in self.factors)

    @property
    def columns(self) -> list[slice]:
        """The outputs of each layer that has an update."""
        ends = list(itertools.accumulate(self.outs))
        return [slice(end - out, end) for end, out, f in zip(ends, self.outs, self.factors, strict=True) if f]

    @property
    def trained(self) -> int:
        """How many tensors are trained."""
        return sum((2 if f.m is None else 3) for f in self.factors if f is not None)

    def trained_now(self) -> list[Tensor]:
        """What is trained of the adapted layers: A, B in turn, and then the lengths of each."""
        factors = [t for f in self.factors if f is not None for t in (f.A(), f.B())]
        return factors + [f.m() for f in self.factors if f is not None and f.m is not None]

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        outputs: tuple[Tensor, ...] = _Apply.apply(flat, self, recipe_of(x), *self.trained_now())  # type: ignore[no-untyped-call]
        return outputs


class How(NamedTuple):
    """What `FrozenLinears.run` computed with: the update, None where nothing is adapted, and lengths of rows if any."""

    update: Update | PackedUpdate | None
    lengths: Lengths | None


class Forward(NamedTuple):
    """What `FrozenLinears.run` gives: y (n, sum of outs), and h = x A^T where something is adapted.

    own: where rows have lengths, y without biases, for the gradient of those; y itself, where it has no biases.
    """

    y: Tensor
    h: Tensor | None
    how: How
    own: Tensor | None


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: FrozenLinears, recipe: Recipe | None, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        y, h, ctx.how, own = group.run(x, trained)
        ctx.group = group
        # What x is made from, by `again`, is kept anyway.
        ctx.again = recipe.function if recipe else _as_it_is
        kept = recipe.tensors if recipe else (x,)
        ctx.save_for_backward(*(kept if trained else ()), h, own, *trained)
        ctx.inputs = len(kept) if trained else 0
        ctx.set_materialize_grads(False)
        return torch.split(y, group.outs, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        how, ctx.how = ctx.how, None  # autograd lets go of saved tensors by itself, of this it does not
        g = _side_by_side(gradients, ctx.group.outs)
        inputs, (h, own) = saved[: ctx.inputs], saved[ctx.inputs : ctx.inputs + 2]
        gx, found = ctx.group.back(g, lambda _: ctx.again(*inputs), h, how, own, ctx.needs_input_grad[0])
        return gx, None, None, *found


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _side_by_side(gradients: tuple[Tensor | None, ...], outs: list[int]) -> Tensor:
    """Gradients of the outputs as one matrix (n, sum of outs); without a copy where they lie in memory like that."""
    if len(gradients) == 1 and gradients[0] is not None:
        return gradients[0] if gradients[0].stride(-1) == 1 else gradients[0].contiguous()
    some = next(g for g in gradients if g is not None)
    if all(g is not None and _follows(some, g, sum(outs), sum(outs[:i])) for i, g in enumerate(gradients)):
        return some.as_strided((len(some), sum(outs)), (sum(outs), 1))
    whole = [g if g is not None else some.new_zeros(len(some), out) for g, out in zip(gradients, outs, strict=True)]
    return torch.cat(whole, dim=1)


def _follows(first: Tensor, g: Tensor, width: int, offset: int) -> bool:
    return (
        g.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and g.stride() == (width, 1)
        and g.storage_offset() == first.storage_offset() + offset
    )


def _stacked_bias(biases: list[Tensor | None], outs: list[int]) -> Tensor | None:
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(out) if b is None else b.detach() for b, out in zip(biases, outs, strict=True)])


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of the module itself is trained."""
    return not any(p.requires_grad for p in module.parameters(recurse=False))
