"""One adapted layer: a base and a variant of its update. Scale, merging, dropout and ties are written here, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lorafit.errors import MergeError, RankError
from lorafit.lora.adapted import Adapted, SharedState
from lorafit.lora.base import Kind, make_kind
from lorafit.lora.dropout import DropoutKey, drop
from lorafit.lora.init import INITS, stable_hash
from lorafit.lora.update import check_rank, delta_weight, scaling
from lorafit.lora.variants import VARIANTS


@dataclass(frozen=True)
class Dropout:
    """The share of the adapter's input that is dropped while training, and the key that all layers share."""

    p: float
    key: DropoutKey


class LoRALayer(Adapted):
    """A base module with a low-rank update: y = base(x) + scale * update(x).

    Trainable: lora_A and lora_B (shapes in `base.py`), what the variant adds (`magnitude`), and where ranks have a
    schedule gate (r,), what each row of lora_A is multiplied with (`gates.py`). They are float32
    (float64 over a float64 base) whatever the base stores; the branch is computed in the dtype of the activations.
    Casting the whole model (`model.half()`) casts them too.
    Attributes: base, r, alpha, scaling, scale, merged. `weight` is the base's own, without the update.
    Dropout applies to the input of the branch in training mode; an embedding's token ids are never dropped.
    started_at: A and B of a product that the base's weight gave up at the start, None where it is whole.
    transposed: the factors are used as A^T and B^T, because this module stores the owner's weight the other way round
    (a head tied to an embedding).
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    gate: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        *,
        name: str,
        r: int,
        alpha: float,
        scaling: float,
        variant: str,
        dropout: Dropout,
        parameters: dict[str, nn.Parameter],
        shared: SharedState,
        tied_to: str | None,
        transposed: bool,
    ) -> None:
        super().__init__(base, name=name, shared=shared, tied_to=tied_to)
        self.kind: Kind = make_kind(base)
        self.r, self.alpha, self.scaling, self.transposed = r, alpha, scaling, transposed
        self.variant_name, self.variant = variant, VARIANTS[variant]
        self.dropout, self.dropout_layer = dropout, stable_hash(name)
        self.started_at: tuple[Tensor, Tensor] | None = None
        for key, parameter in parameters.items():
            self.register_parameter(key, parameter)
        if "gate" not in parameters:
            self.register_parameter("gate", None)

    @property
    def in_features(self) -> int:
        """Columns of the base's weight as a matrix: a row of lora_A, flattened."""
        return self.kind.in_features

    @property
    def out_features(self) -> int:
        """Rows of the base's weight as a matrix."""
        return self.kind.out_features

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) as this module uses them, in their own dtype."""
        A, B = self.variant.factors(self)
        if self.gate is not None:
            A = self.gate.view(-1, *[1] * (A.dim() - 1)) * A
        return (B.T, A.T) if self.transposed else (A, B)

    def lasting_factors(self) -> tuple[Tensor, Tensor, int]:
        """(A, B, r) of the update of the base as its files have it.

        Where the base gave up a product at the start, that is subtracted again: B A - B0 A0 has twice the rank.
        Source: Meng et al. 2024, PiSSA, appendix C.
        """
        A, B = self.factors()
        if self.started_at is None:
            return A, B, self.r
        first_A, first_B = self.started_at
        return torch.cat([A, first_A]), torch.cat([B, -first_B], dim=1), 2 * self.r

    def lasting_rank(self, rule: str) -> tuple[int, float]:
        """(r, alpha) of `lasting_factors`, whose scaling is this layer's."""
        r = self.lasting_factors()[2]
        return r, self.alpha * (scaling(self.r, 1.0, rule) / scaling(r, 1.0, rule))

    def replace(self, lora_A: Tensor, lora_B: Tensor, rule: str) -> None:
        """Put factors of another rank in the place of these, at the same scaling. rule: of alpha.

        lora_A: (r, ...), lora_B: (out, r, ...), as the layer has them. What is trained stays so.
        """
        pairs = (lora_A, self.lora_A), (lora_B, self.lora_B)
        self.lora_A, self.lora_B = (nn.Parameter(new.to(old), old.requires_grad) for new, old in pairs)
        self.r = len(lora_A)
        # To twelve digits: 98 is meant where 2 / (1 / 49) is 98.00000000000001.
        self.alpha = float(f"{self.scaling / scaling(self.r, 1.0, rule):.12g}")
        self.scaling = scaling(self.r, self.alpha, rule)

    def share(self, owner: LoRALayer) -> None:
        """Use the factors that the layer it is tied to has now."""
        self.lora_A, self.lora_B = owner.lora_A, owner.lora_B
        self.r, self.alpha, self.scaling = owner.r, owner.alpha, owner.scaling

    def delta_weight(self) -> Tensor:
        """The matrix scaling * B A: (out_features, in_features), float32 or float64; without the scale."""
        return delta_weight(*self.factors(), self.scaling)

    def low_rank(self, x: Tensor) -> Tensor:
        """The branch scaling * B A x. x: the base's input. Returns the shape of its output."""
        A, B = self.factors()
        return self.kind.expand(self.scaling * self.kind.project(x, A), B)

    def forward(self, x: Tensor) -> Tensor:
        """base(x) plus the scaled update. At scale 0, or merged, the branch is skipped and base(x) comes back as is."""
        y = cast(Tensor, self.base(x))
        if not self.is_active:
            return y
        update = self.variant.forward(self, self._drop(x), y)
        if self.scale != 1:
            update = self.scale * update
        return y + update.to(y.dtype)

    def original_matrix(self) -> Tensor:
        """W0: (out_features, in_features) in the base's dtype, also while merged. A view: do not write into it."""
        original = self.shared.original
        if original is None:
            return self.kind.read_weight()
        return self.kind.as_matrix(original.to(self.kind.like))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W0 + scale * (W' - W0), computed in float32 (or float64), then cast once to the base's dtype.

        Returns the base's own layout and shape. Raises MergeError if the result is not finite.
        """
        W = self.original_matrix()
        if self.scale == 0:
            return self.kind.as_stored(W).clone()
        merged = self.merged_matrix(W).to(W.dtype)
        if not merged.isfinite().all():
            dtype = str(W.dtype).removeprefix("torch.")
            raise MergeError(
                f"merging {self.name} at scale {self.scale:g} gives weights that are not finite in {dtype}",
                "Lower the scale, or load the model in float32 first",
            )
        return self.kind.as_stored(merged).contiguous()

    @torch.no_grad()
    def merged_matrix(self, W: Tensor) -> Tensor:
        """The same of any W0, not cast: (out_features, in_features), float32 or float64. W: of that shape."""
        wide = W.to(torch.promote_types(W.dtype, torch.float32))
        if self.scale == 0:
            return wide
        # lerp is exact at both ends: W' itself at scale 1.
        return torch.lerp(wide, self.variant.merged_weight(self, wide), self.scale)

    def merge(self) -> None:
        """Write the update into the base's weight, for all layers that share it. Twice is once. Raises MergeError."""
        if self.merged:
            return
        merged = self.kind.as_matrix(self.merged_weight())
        self.shared.original = self.kind.weight.detach().to("cpu", copy=True)
        self.kind.write_weight(merged)

    def unmerge(self) -> None:
        """Put the original weight back, bitwise: it was kept, not subtracted. Unmerged layers stay as they are."""
        original = self.shared.original
        if original is not None:
            self.kind.write_weight(self.kind.as_matrix(original))
            self.shared.original = None

    def _drop(self, x: Tensor) -> Tensor:
        axis = self.kind.feature_dim
        if axis is None or self.dropout.p == 0 or not self.training:
            return x
        return drop(x, p=self.dropout.p, key=self.dropout.key, layer=self.dropout_layer, feature_dim=axis)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        tied = f", tied_to={self.tied_to}" if self.tied_to else ""
        return f"r={self.r}, alpha={self.alpha:g}, variant={self.variant_name}, scale={self.scale:g}{tied}"


def new_layer(
    base: nn.Module,
    *,
    name: str,
    r: int,
    alpha: float,
    rule: str,
    variant: str,
    init: str,
    generator: torch.Generator,
    dropout: Dropout,
) -> LoRALayer:
    """A fresh adapter over one module; its output is the base's. The generator (CPU) draws A.

    Raises RankError if r > min(in, out), ConfigError for alpha or the rule, TargetError if the base can't be adapted.
    """
    kind = make_kind(base)
    check_rank(r)
    limit = min(kind.in_features, kind.out_features)
    if r > limit:
        raise RankError(
            f"{name} ({type(base).__name__}, {kind.in_features} -> {kind.out_features}) holds a rank of at most "
            f"{limit}, got r = {r}",
            "Lower r, or give this layer its own in rank_pattern",
        )
    factor = scaling(r, alpha, rule)
    A = INITS[init](kind.shape_A(r), generator)
    A = A.to(device=kind.like.device, dtype=torch.promote_types(kind.like.dtype, torch.float32))
    padding_idx = getattr(base, "padding_idx", None)
    if padding_idx is not None:
        A[:, padding_idx] = 0  # this row gets no gradient, so what it starts with would stay
    B = torch.zeros(kind.shape_B(r), dtype=A.dtype, device=A.device)
    extra = VARIANTS[variant].init(kind, A, B, factor, generator)
    tensors = {"lora_A": A, "lora_B": B, **extra}
    return LoRALayer(
        base,
        name=name,
        r=r,
        alpha=alpha,
        scaling=factor,
        variant=variant,
        dropout=dropout,
        parameters={key: nn.Parameter(t, key not in VARIANTS[variant].frozen) for key, t in tensors.items()},
        shared=SharedState(),
        tied_to=None,
        transposed=False,
    )


def tied_layer(owner: LoRALayer, base: nn.Module, *, name: str) -> LoRALayer:
    """A layer over a second module that has the owner's weight: the same factors, scale and merging."""
    return LoRALayer(
        base,
        name=name,
        r=owner.r,
        alpha=owner.alpha,
        scaling=owner.scaling,
        variant=owner.variant_name,
        dropout=owner.dropout,
        parameters=dict(owner.named_parameters(recurse=False)),
        shared=owner.shared,
        tied_to=owner.name,
        transposed=make_kind(base).transposed != owner.kind.transposed,
    )
