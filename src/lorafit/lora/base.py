"""Base kinds: what LoRA must know of a layer that it adapts, in four operations and two shapes.

Every kind presents its weight as one matrix W of shape (out_features, in_features), whatever the module stores:

| kind      | stored weight               | matrix W      | lora_A                   | lora_B         |
|-----------|-----------------------------|---------------|--------------------------|----------------|
| linear    | (out, in)                   | as stored     | (r, in)                  | (out, r)       |
| hf_conv1d | (in, out)                   | transposed    | (r, in)                  | (out, r)       |
| embedding | (num, dim)                  | transposed    | (r, num)                 | (dim, r)       |
| conv      | (out, in / groups, *kernel) | flattened (1) | (r, in / groups, *kernel) | (out, r, 1...) |
| quantized | fewer bits                  | decoded       | (r, in)                  | (out, r)       |

so that dW = scaling * B A holds for all of them with the factors flattened, and merging is written once.
A new kind is one class here and one line in `KINDS`.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorafit.errors import TargetError
from lorafit.quant.modules import QuantizedLinear

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Subclasses whose own forward was read and computes what their parent's does (transformers 5.23).
SAME_FORWARD = {"transformers.models.falcon.modeling_falcon.FalconLinear"}


class Kind:
    """One base module seen as a matrix W (out_features, in_features) plus a bias.

    module: the layer itself. feature_dim: the axis of the input that holds features, None where the input is token
    ids. transposed: the stored weight is W transposed.
    """

    transposed: ClassVar[bool] = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """Whether a module is of this kind, by its class."""
        raise NotImplementedError

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        """Why this one module of the kind can't be adapted, as the end of a sentence; None if it can."""
        return None

    @property
    def weight(self) -> nn.Parameter:
        """The stored weight, in the module's own layout."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def like(self) -> Tensor:
        """Of the type and on the device that the weight is computed in; nothing else of it is to be read."""
        return self.weight

    @property
    def bias(self) -> Tensor | None:
        """(out_features,) or None."""
        return cast("Tensor | None", getattr(self.module, "bias", None))

    @property
    def in_features(self) -> int:
        """Columns of W: the length of one row of lora_A."""
        return int(self.as_matrix(self.weight).shape[1])

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return int(self.as_matrix(self.weight).shape[0])

    @property
    def feature_dim(self) -> int | None:
        """The axis of the input that holds features."""
        return -1

    def shape_A(self, r: int) -> tuple[int, ...]:
        """The shape of lora_A at rank r."""
        return (r, self.in_features)

    def shape_B(self, r: int) -> tuple[int, ...]:
        """The shape of lora_B at rank r."""
        return (self.out_features, r)

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        """The projection h = A x, in the dtype of x. x: (..., in). A: (r, in). Returns (..., r)."""
        return F.linear(x, A.to(x.dtype))

    def expand(self, h: Tensor, B: Tensor) -> Tensor:
        """The expansion B h, in the dtype of h. h: (..., r). B: (out, r). Returns (..., out)."""
        return F.linear(h, B.to(h.dtype))

    def per_output(self, v: Tensor) -> Tensor:
        """A vector (out_features,) shaped so that it broadcasts over the module's output."""
        return v

    def as_matrix(self, stored: Tensor) -> Tensor:
        """A tensor in the weight's layout, viewed as a matrix (out_features, in_features)."""
        return stored.T if self.transposed else stored.flatten(1)

    def as_stored(self, W: Tensor) -> Tensor:
        """A matrix (out_features, in_features), viewed in the weight's layout."""
        return W.T if self.transposed else W.reshape(self.weight.shape)

    def read_weight(self) -> Tensor:
        """W: (out_features, in_features), a view of the stored weight without gradient. Do not write into it."""
        return self.as_matrix(self.weight.detach())

    def write_weight(self, W: Tensor) -> None:
        """Overwrite the stored weight in place, cast to its dtype. W: (out_features, in_features)."""
        with torch.no_grad():
            self.weight.copy_(self.as_stored(W))


class Linear(Kind):
    """nn.Linear: y = x W^T + bias."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """By class."""
        return isinstance(module, nn.Linear)

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        """The output projection of `nn.MultiheadAttention`, whose forward is never called."""
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "belongs to nn.MultiheadAttention, which reads its weight and never calls it"
        return None


class HFConv1D(Kind):
    """The `Conv1D` of transformers (GPT-2): a linear layer that stores its weight as (in, out)."""

    transposed = True

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """By the class's name and module: lora/ does not import transformers."""
        return any(
            c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__
        )


class Embedding(Kind):
    """nn.Embedding as y = W one_hot(id): in_features = num_embeddings, out_features = embedding_dim.

    A scaled embedding (Gemma, BART: output times `embed_scale`) scales the low-rank branch alike. The row of
    `padding_idx` gets no gradient through the embedding, as in torch; its column of A starts at zero, so it has no
    update at all. If a tied head shares the factors, the head may still teach that row, as it does in full training.
    """

    transposed = True

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """By class."""
        return isinstance(module, nn.Embedding)

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        """Options under which the output is not linear in the weight, or the gradient is rescaled row by row."""
        if getattr(module, "max_norm", None) is not None:
            return "renormalises its rows (max_norm), so that no update can be added to it"
        if getattr(module, "scale_grad_by_freq", False):
            return "scales its gradient by token frequency (scale_grad_by_freq), which factors A and B can't reproduce"
        return None

    @property
    def feature_dim(self) -> int | None:
        """None: the input is token ids."""
        return None

    @property
    def padding_idx(self) -> int | None:
        """The id whose row is not trained."""
        return cast("int | None", self.module.padding_idx)

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        """The columns of A that belong to the ids, in the dtype of the weight. x: (...) ids. Returns (..., r)."""
        return F.embedding(x, A.T, padding_idx=self.padding_idx).to(self.weight.dtype)

    def expand(self, h: Tensor, B: Tensor) -> Tensor:
        """B h, times `embed_scale` where the module has one. h: (..., r). Returns (..., dim)."""
        y = super().expand(h, B)
        scale = getattr(self.module, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


class Conv(Kind):
    """nn.Conv1d/2d/3d with any stride, padding, padding mode, dilation and groups.

    A is applied as a convolution like the base's, with r output channels in every group; B as a 1x1 convolution. With
    groups, A is the same for all of them, and dW.flatten(1) = scaling * B A still holds: mergeable at any r.
    """

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """By class."""
        return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)

    @property
    def _conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.module)  # the three classes have the same attributes

    @property
    def _spatial(self) -> int:
        return self.weight.dim() - 2

    @property
    def feature_dim(self) -> int | None:
        """Channels stand before the spatial axes, with or without a batch axis."""
        return -1 - self._spatial

    def shape_A(self, r: int) -> tuple[int, ...]:
        """(r, in / groups, *kernel)."""
        return (r, *self.weight.shape[1:])

    def shape_B(self, r: int) -> tuple[int, ...]:
        """(out, r, 1, ...)."""
        return (self.out_features, r, *[1] * self._spatial)

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        """x: ([N,] in, *spatial). A: (r, in / groups, *kernel). Returns ([N,] groups * r, *out_spatial)."""
        A = A.to(x.dtype).repeat(self._conv.groups, *[1] * (A.dim() - 1))
        return cast(
            Tensor, self._conv._conv_forward(x, A, None)
        )  # the base's own stride, padding, padding mode and dilation

    def expand(self, h: Tensor, B: Tensor) -> Tensor:
        """h: ([N,] groups * r, *spatial). B: (out, r, 1, ...). Returns ([N,] out, *spatial)."""
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[self._spatial]
        return conv(h, B.to(h.dtype), groups=self._conv.groups)

    def per_output(self, v: Tensor) -> Tensor:
        """(out,) -> (out, 1, ...), which broadcasts with and without a batch axis."""
        return v.view(-1, *[1] * self._spatial)


class Quantized(Kind):
    """A linear layer whose weight is stored in fewer bits (quant/modules.py): W is decoded whenever it is read."""

    @staticmethod
    def matches(module: nn.Module) -> bool:
        """By class."""
        return isinstance(module, QuantizedLinear)

    @property
    def _layer(self) -> QuantizedLinear:
        return cast(QuantizedLinear, self.module)

    @property
    def like(self) -> Tensor:
        """Empty: nothing is decoded for it."""
        return self._layer.stored.data.new_empty(0, dtype=self._layer.dtype)

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self._layer.in_features

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self._layer.out_features

    def as_stored(self, W: Tensor) -> Tensor:
        """W itself."""
        return W

    def write_weight(self, W: Tensor) -> None:
        """Use W in the place of what is stored; that again, where it decodes to just W."""
        self._layer.write(W)


KINDS: dict[str, type[Kind]] = {
    "linear": Linear,
    "hf_conv1d": HFConv1D,
    "embedding": Embedding,
    "conv": Conv,
    "quantized": Quantized,
}
LINEAR_KINDS = ("linear", "hf_conv1d", "quantized")  # what "all-linear" means


def kind_name(module: nn.Module) -> str | None:
    """The key in `KINDS` of the kind that a module's class belongs to, or None."""
    return next((name for name, kind in KINDS.items() if kind.matches(module)), None)


def refusal(module: nn.Module) -> str | None:
    """Why a module can't be adapted, as the end of the sentence "layer X ..."; None if it can."""
    name = kind_name(module)
    if name is None:
        return f"is a {type(module).__name__}, which has no low-rank update here"
    if isinstance(module, QuantizedLinear):
        return None
    weight = module._parameters.get("weight")
    if weight is None:
        return "computes its weight from other tensors (a parametrization), so that no update can be written into it"
    if nn.parameter.is_lazy(weight):
        return "is lazy and has no shape yet; run one batch through the model first"
    if weight.dtype not in FLOAT_DTYPES:
        return f"stores its weight as {str(weight.dtype).removeprefix('torch.')}, and no kind reads that"
    if not _forward_is_known(module):
        return f"is a {type(module).__name__} with its own forward, which a low-rank branch may not follow"
    return KINDS[name].refuses(module)


def make_kind(module: nn.Module) -> Kind:
    """The kind of an adaptable module. Raises TargetError if it can't be adapted."""
    reason = refusal(module)
    if reason is not None:
        raise TargetError(f"a layer can't be adapted: it {reason}", "Leave it out of targets")
    return KINDS[cast(str, kind_name(module))](module)


def _forward_is_known(module: nn.Module) -> bool:
    """Whether forward is torch's (or GPT-2's) own, or that of a subclass which was read and found linear in W."""
    if "forward" in module.__dict__:
        return False
    defining = next(c for c in type(module).__mro__ if "forward" in c.__dict__)
    if defining.__module__.startswith("torch.nn.modules.") or defining.__module__ == "transformers.pytorch_utils":
        return True
    if f"{defining.__module__}.{defining.__name__}" in SAME_FORWARD:
        return True
    # All 24 classes so named in transformers 5.23 are nn.Embedding times embed_scale and nothing else; a test looks.
    scaled = defining.__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
    return scaled and defining.__module__.startswith("transformers.")
