"""Merging: the update becomes part of the base's weights, checked on probes, saved as a plain Hugging Face model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafit import files
from lorafit.errors import AdapterError, MergeError, RunDirError
from lorafit.lora.base import KINDS, kind_name
from lorafit.methods import table

PROBE_ROWS = 4
PROBE_TOKENS = 24
PROBE_TEXT = """The quick brown fox jumps over the lazy dog. Où est la bibliothèque? 图书馆在哪里?
def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

1, 1, 2, 3, 5, 8, 13, 21, 34, 55. Dear Sir or Madam, thank you for your letter of 7 May.
"""


@dataclass(frozen=True)
class ProbeDifference:
    """How far logits moved. difference: ||after - before|| / ||before|| over the logits of the worst row.

    tolerance: what rounding explains, see `tolerance`.
    """

    difference: float
    tolerance: float

    @property
    def explained(self) -> bool:
        """Whether rounding explains the difference; never where it is not a number."""
        return self.difference <= self.tolerance


def merge_into_base(model: nn.Module, tokenizer: Any | None, force: bool = False) -> ProbeDifference:
    """Write the update at its present scale into the base's weights and take the adapter off; the model is plain then.

    The logits of the merged model are held against those of the unmerged one on fixed pseudo-random token ids and,
    given a tokenizer, on a few texts. Load the base in float32 to merge without loss, whatever is saved afterwards.
    A head that was tied and has a weight of its own now is no longer tied in the model's config.
    Raises AdapterError if there is no adapter, MergeError if the difference is more than rounding explains, unless
    `force`, or something is not finite; the model is then as it was.
    """
    if not table.is_attached(model):
        raise AdapterError("the model has no adapter to merge", "Attach or load one first")
    method = table.of(model)
    probes = _probes(model, tokenizer)
    before = _logits(model, probes)
    method.merge(model)
    found = ProbeDifference(_difference(before, _logits(model, probes)), tolerance(model))
    if not found.explained and not (force and math.isfinite(found.difference)):
        method.unmerge(model)
        raise MergeError(
            f"the merged model's logits differ from the unmerged one's by {found.difference:.1e} of their norm, and "
            f"rounding explains {found.tolerance:.1e}",
            "Nothing was written. Does the model use an adapted weight in a second place? Use the adapter unmerged, or "
            "write it all the same with --force",
        )
    table.forget(model)
    _state_ties(model)
    return found


def save_merged(model: Any, tokenizer: Any | None, directory: Path, dtype: torch.dtype) -> ProbeDifference:
    """Cast a merged model to `dtype`, in place, and write it as a plain Hugging Face directory, all of it or nothing.

    model: a transformers model, as `merge_into_base` left it. Tied weights are written once. Each weight is cast once,
    from the merged one. Returns how far the cast moved the logits, 0 where there was nothing to cast: a report, not
    a check, since this loss was asked for.
    Raises RunDirError if the directory is not empty or can't be written, AdapterError if an adapter is still attached,
    MergeError if the cast makes a logit infinite or NaN.
    """
    check_output(directory)
    if table.is_attached(model):
        raise AdapterError("the model still has its adapter", "Call merge_into_base first")
    moved = _cast(model, tokenizer, dtype)

    def fill(temporary: Path) -> None:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)  # the library leaves weights to their owner alone

    files.write_dir_atomic(directory, fill)
    return moved


def check_output(directory: Path) -> None:
    """Raises RunDirError if `directory` is a file or holds anything."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        what = "already holds files" if directory.is_dir() else "is a file"
        raise RunDirError(f"{directory} {what}", "Choose another directory with -o")


def probe_logits(model: nn.Module, tokenizer: Any | None) -> Tensor:
    """Of the fixed rows that merging is held against: (rows, tokens, vocabulary)."""
    return _logits(model, _probes(model, tokenizer))


def logits_moved(before: Tensor, model: nn.Module, tokenizer: Any | None) -> float:
    """How far the model's logits are from those, as `ProbeDifference.difference`."""
    return _difference(before, probe_logits(model, tokenizer))


def update_moved(model: nn.Module, tokenizer: Any | None) -> float:
    """How far an adapted model's logits are from those of its base, as `ProbeDifference.difference`."""
    tuned = probe_logits(model, tokenizer)
    method, scale = table.of(model), table.scale_of(model)
    method.set_scale(model, 0)
    try:
        return _difference(tuned, probe_logits(model, tokenizer))
    finally:
        method.set_scale(model, scale)


def tolerance(model: nn.Module) -> float:
    """The relative difference of two logits that are equal but for rounding: 2 (eps32 sqrt(k L) + eps sqrt(L)).

    A logit stands at the end of a chain of L layers, each a sum of at most k products. Sums are kept in float32 (eps32;
    in float64 for a float64 model): k L roundings, each relative to the partial sum by at most eps32, and independent
    in sign, so that they add up in quadrature to eps32 sqrt(k L). Weights and activations are rounded to the base's
    own dtype once a layer: eps sqrt(L) likewise. Both runs are off by that much: 2. The unit roundoff is eps / 2, and
    the half that is left over is for what the chain amplifies (normalisation, softmax).
    Source for independent roundings: Higham and Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis".
    """
    kinds = [KINDS[name](module) for module in model.modules() if (name := kind_name(module)) is not None]
    sums = [kind for kind in kinds if kind.feature_dim is not None]  # an embedding is looked up, not summed
    length = len(kinds)
    width = max((kind.in_features for kind in sums), default=1)
    eps = max(torch.finfo(kind.weight.dtype).eps for kind in kinds)
    return rounding(width, length, eps)


def rounding(width: int, length: int, eps: float) -> float:
    """The formula of `tolerance`. width: k. length: L. eps: of the dtype that weights and activations are kept in."""
    eps_sum = min(eps, torch.finfo(torch.float32).eps)
    return 2 * (eps_sum * math.sqrt(width * length) + eps * math.sqrt(length))


def _probes(model: nn.Module, tokenizer: Any | None) -> Tensor:
    """Token ids (rows, tokens) without padding: pseudo-random ones, the same every time, then rows of encoded text."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]  # a method of every transformers model
    device, vocabulary = embeddings.weight.device, embeddings.weight.shape[0]
    tokens = min(PROBE_TOKENS, getattr(model.config, "max_position_embeddings", None) or PROBE_TOKENS)
    rows = [torch.randint(vocabulary, (PROBE_ROWS, tokens), generator=torch.Generator().manual_seed(0))]
    if tokenizer is not None:
        text = tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]
        whole = torch.tensor(text[: min(PROBE_ROWS, len(text) // tokens) * tokens], dtype=torch.int64)
        rows.append(whole.clamp(max=vocabulary - 1).reshape(-1, tokens))  # a tokenizer may know more than the model
    return torch.cat(rows).to(device)


@torch.no_grad()
def _logits(model: nn.Module, probes: Tensor) -> Tensor:
    """Logits without dropout, in float32 at least: (rows, tokens, vocabulary)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        logits = cast(Tensor, model(input_ids=probes).logits)
    finally:
        for module in training:
            module.training = True
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _difference(before: Tensor, after: Tensor) -> float:
    """||after - before|| / ||before|| of the worst row; NaN if one is."""
    rows = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    return float(rows.max())


def _state_ties(model: nn.Module) -> None:
    """Say in the config if the head is tied no longer: it would be tied again when the model is loaded."""
    config: Any = model.config
    head: Any = model.get_output_embeddings()  # type: ignore[operator]  # methods of every transformers model
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not embeddings.weight:
        for one in (config, config.get_text_config()):
            if getattr(one, "tie_word_embeddings", False):
                one.tie_word_embeddings = False


def _cast(model: nn.Module, tokenizer: Any | None, dtype: torch.dtype) -> ProbeDifference:
    """Cast what is saved, and only that: buffers that a model computes itself (rotary frequencies) stay as they are."""
    saved = model.state_dict(keep_vars=True).values()
    to_cast = [tensor for tensor in saved if tensor.is_floating_point() and tensor.dtype != dtype]
    if not to_cast:
        return ProbeDifference(0.0, tolerance(model))
    probes = _probes(model, tokenizer)
    before = _logits(model, probes)
    for tensor in to_cast:
        tensor.data = tensor.data.to(dtype)  # in place: what is tied stays tied
    after = _logits(model, probes)
    if not after.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        raise MergeError(f"the merged model's logits are not finite in {name}", "Use --dtype bf16 or fp32")
    return ProbeDifference(_difference(before, after), tolerance(model))
