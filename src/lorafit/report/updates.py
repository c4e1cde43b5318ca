"""What was trained, module by module: how large an update is, and how many directions it uses. No model is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafit.config import MethodConfig
from lorafit.errors import AdapterError
from lorafit.export import peft, saved
from lorafit.export.peft_names import pattern_value as peft_value
from lorafit.export.peft_tensors import PREFIX
from lorafit.lora.targets import pattern_value
from lorafit.lora.update import scaling
from lorafit.report.directions import effective_rank, stable_rank
from lorafit.report.places import place

# Names of A and B in the files: PEFT's of a layer and of an embedding, and our own.
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"), ("lora_A", "lora_B"))
# DoRA's factor of each output, one number each, is no part of B A.
MAGNITUDES = ("lora_magnitude_vector", "magnitude")
# Variants whose file holds the A and B of the update.
LOW_RANK = ("lora", "lora-fa", "dora")
UPDATE = (
    "dW = scaling B A, of each layer. Norm: Frobenius, at scale 1. Effective rank: e to the entropy of the singular "
    "values as shares of their sum (Roy and Vetterli 2007), the number of directions that the update uses. Stable "
    "rank: the squared norm over the largest singular value squared."
)
DORA = "DoRA scales each output of W0 + dW besides; that factor is not in these figures."
# What a method trains where that is no update of a matrix, and where it begins.
TENSORS = {
    "lora": "What was trained of each module, as its norm.",
    "adapter": "Bottleneck adapters have no dW. Norms of their matrices; `up` begins at 0, so that its norm is what it "
    "has learned.",
    "prefix": "A prefix has no dW. Norms of the rows that are put before keys and values of each layer.",
    "prompt": "Virtual tokens have no dW. The norm of their embeddings.",
    "ia3": "(IA)3 multiplies by factors that begin at 1. The norm of what they differ from 1 by.",
    "bitfit": "Biases alone are trained. The norm of what is added to them.",
    "head": "A head alone is trained, and no dW. The norms of its weights.",
    "full": "All weights are trained. Their norms after training; what they differ from the base by is not in the run.",
}


@dataclass(frozen=True)
class Trained:
    """What one module was given. layer: its number, None outside of layers. kind: which module of a layer, and of what.

    norm: Frobenius. r, effective_rank, stable_rank: None for what is no update B A; the latter two also for one of 0.
    """

    name: str
    layer: int | None
    kind: str
    norm: float
    r: int | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None


def trained(adapter: Path) -> dict[str, Any]:
    """All that was trained, from an adapter's directory.

    Returns method; is_update, whether there are any updates B A; what, how the figures are to be read; modules, a list
    of Trained as dicts; others, the parts that are no update where the rest is. Raises AdapterError.
    """
    config = saved.settings_of(adapter)
    variant = peft.read_config(adapter).variant if config is None else config.variant
    method = "lora" if config is None else config.method
    found = list(
        _of_pairs(adapter, config) if method == "lora" and variant in LOW_RANK else _of_tensors(adapter, config)
    )
    is_update = any(one.r is not None for one in found)
    what = [UPDATE, *([DORA] if variant == "dora" else [])] if is_update else [TENSORS[method]]
    others = sorted({one.kind for one in found if one.r is None}) if is_update else []
    return {
        "method": method, "is_update": is_update, "what": " ".join(what), "modules": [asdict(one) for one in found],
        "others": others,
    }  # fmt: skip


def spectrum(A: Tensor, B: Tensor, factor: float) -> Tensor:
    """The singular values of factor B A, largest first: (r,) float64. B A itself, (out, in), is never formed.

    A: (r, in). B: (out, r). With B = Q R and A^T = Q' R' they are those of factor R R'^T, which is r x r.
    """
    R_B = torch.linalg.qr(B.double(), mode="r").R
    R_A = torch.linalg.qr(A.double().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(R_B @ R_A.T)
    return abs(factor) * values


def _of_pairs(adapter: Path, config: MethodConfig | None) -> Iterator[Trained]:
    """Updates of the layers, then whatever else the file holds."""
    factor_of = _factors(adapter, config)
    with _opened(adapter, config) as file:
        left = dict.fromkeys(file.keys())
        for key_A, key_B in PAIRS:
            for key in [key for key in left if key.endswith(f".{key_A}")]:
                stem = key.removesuffix(key_A)
                if stem + key_B not in left:
                    raise AdapterError(f"{adapter} has {key} and no {stem}{key_B}", "Copy the run again, and whole")
                name = stem.removesuffix(".").removeprefix(PREFIX)
                A, B = _finite(file, key).flatten(1), _finite(file, stem + key_B)
                # What stands around a convolution's rank is 1 in B, and is a part of the inputs in A.
                values = spectrum(A, B.reshape(len(B), len(A)), factor_of(name, len(A)))
                layer, kind = place(name)
                norm = math.sqrt(float((values**2).sum()))
                yield Trained(name, layer, kind, norm, len(A), effective_rank(values), stable_rank(values))
                del left[key], left[stem + key_B]
        yield from _norms(file, (key for key in left if not key.endswith(MAGNITUDES)), 0.0)


def _of_tensors(adapter: Path, config: MethodConfig | None) -> Iterator[Trained]:
    begins_at = 1.0 if config is not None and config.method == "ia3" else 0.0
    with _opened(adapter, config) as file:
        yield from _norms(file, file.keys(), begins_at)


def _norms(file: Any, keys: Iterable[str], begins_at: float) -> Iterator[Trained]:
    """One tensor at a time: those of full fine-tuning are a model. A factor's norm is that from where it begins."""
    for key in keys:
        name = key.removeprefix(PREFIX)
        layer, kind = place(name)
        tensor = _finite(file, key)
        start = begins_at if name.endswith(".factor") else 0.0
        yield Trained(name, layer, kind, float((tensor - start).norm()))


def _factors(adapter: Path, config: MethodConfig | None) -> Callable[[str, int], float]:
    """Of a module's name and rank, the scaling of its B A."""
    if config is None:
        read = peft.read_config(adapter)
        return lambda name, r: scaling(r, peft_value(read.alphas, name, read.alpha), read.scaling_rule)
    own = config

    def factor(name: str, r: int) -> float:
        alpha = pattern_value(own.alpha_pattern, name)
        return scaling(r, own.alpha if alpha is None else alpha, own.scaling_rule)

    return factor


def _opened(adapter: Path, config: MethodConfig | None) -> Any:
    """The file of tensors, to be read one by one. Raises AdapterError if it is missing or damaged."""
    path = adapter / (peft.WEIGHTS_NAME if config is None else saved.WEIGHTS_NAME)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}", "Copy the run again") from None


def _finite(file: Any, key: str) -> Tensor:
    """Raises AdapterError for what is not finite."""
    tensor: Tensor = file.get_tensor(key).float()
    if not tensor.isfinite().all():
        raise AdapterError(f"{key} holds values that are not finite", "Train it again")
    return tensor
