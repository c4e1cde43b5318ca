"""Merging a Hugging Face model tensor by tensor: no more of it is in memory than what is being made.

file -> tensor -> rounded as in training -> W' in float32 -> cast once -> file of the same name. The model itself is a
skeleton (`model/skeleton.py`), which the adapter is put on: what merges here is what merges in memory.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorafit import files
from lorafit.errors import MergeError, ModelError, listed
from lorafit.export.merge import rounding
from lorafit.export.shards import Journal, Planned, check_space, in_progress, put_in_place, write_file
from lorafit.lora.adapted import Adapted
from lorafit.lora.base import Conv
from lorafit.lora.inject import adapted_modules
from lorafit.lora.layer import LoRALayer
from lorafit.lora.tokens import TokenRows
from lorafit.lora.whole import Whole
from lorafit.model.find import INDEX
from lorafit.model.keep import DTYPES, ENCODERS, can_be_rounded
from lorafit.model.skeleton import Skeleton, Stored, is_placeholder
from lorafit.slabs import trim_heap

# Tensor -> how it will be, and where it comes from: a tensor of the files, or the name of a parameter that has none.
FilePlan = dict[str, tuple[Planned, Stored | str]]
Plan = dict[str, FilePlan]  # by the name of the file
NUMBERS_AT_ONCE = 1 << 22  # of a tensor that nothing changes, cast and written so many at a time
PROBE_ROWS, PROBE_TOKENS = 4, 8
GENERATION = "generation_config.json"


@dataclass
class Found:
    """What was seen while tensors were merged. merged: how many an adapter changes. worst: layer that is furthest off.

    difference, tolerance: of the output of that layer, merged against unmerged, and what rounding explains of it.
    cast_square, square: sums of squares of what the cast changed, and of what it was given.
    """

    tensors: int = 0
    merged: int = 0
    worst: str = ""
    difference: float = 0.0
    tolerance: float = 0.0
    cast_square: float = 0.0
    square: float = 0.0

    def add(self, other: Found) -> None:
        """Take in what was seen in another file."""
        self.tensors, self.merged = self.tensors + other.tensors, self.merged + other.merged
        self.cast_square, self.square = self.cast_square + other.cast_square, self.square + other.square
        if _share(other) >= _share(self):
            self.worst, self.difference, self.tolerance = other.worst, other.difference, other.tolerance

    @property
    def cast_difference(self) -> float:
        """How far the cast changed all weights, relative to their norm."""
        return math.sqrt(self.cast_square / self.square) if self.square else 0.0


def _share(found: Found) -> float:
    return found.difference / found.tolerance if found.tolerance else 0.0


@dataclass(frozen=True)
class Merged:
    """What was written. left_out: heads that the file holds although they are tied. unused: tensors not of the model.

    resumed: files that an earlier attempt had finished.
    """

    found: Found
    files: int
    nbytes: int
    resumed: int
    left_out: list[str]
    unused: list[str]


@dataclass
class Job:
    """One merge. skeleton: with the adapter attached, at its scale. storage: nf4 or int8 where training rounded.

    dtype: of what is written. identity: of all that decides what that is. force: write it however far off.
    adapted: by name. tensors: parameters and stored buffers of the base, by their names without an adapter.
    """

    skeleton: Skeleton
    storage: str
    dtype: torch.dtype
    identity: dict[str, Any]
    force: bool
    adapted: dict[str, Adapted] = field(init=False)
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.adapted = adapted_modules(self.skeleton.model)
        self.tensors = _base_tensors(self.skeleton.model)


def merge(job: Job, tokenizer: Any, source: Path, output: Path, on_bytes: Callable[[int, int], None]) -> Merged:
    """Write the merged model to `output`, all of it or nothing; what is finished of an earlier attempt is kept.

    source: the directory of the model. on_bytes: called with how many bytes are done, and of how many. Raises
    MergeError for weights that are not finite, or layers that are further off than rounding explains; RunDirError.
    """
    _check_reached(job)
    plan, left_out, unused = _plan(job)
    total = sum(one.nbytes for tensors in plan.values() for one, _ in tensors.values())
    done, found = 0, Found()
    with in_progress(output) as directory:
        journal = Journal(directory, job.identity)
        sizes = {name: sum(one.nbytes for one, _ in tensors.values()) for name, tensors in plan.items()}
        check_space(directory, sum(size for name, size in sizes.items() if name not in journal.finished))
        for name, tensors in plan.items():
            if name not in journal.finished:
                journal.add(name, _write(job, directory / name, tensors))
            found.add(Found(**journal.finished[name]["found"]))
            done += sizes[name]
            on_bytes(done, total)
        _finish(job, tokenizer, source, directory, plan, total)
        put_in_place(directory, output)
    return Merged(found, len(plan), total, len(journal.resumed), left_out, unused)


def _check_reached(job: Job) -> None:
    """Raises ModelError where an adapter changes what the files name otherwise."""
    missed = [
        f"{name}.{key}"
        for name, module in job.adapted.items()
        for key in module.base._parameters
        if f"{name}.{key}" in job.skeleton.elsewhere
    ]
    if missed:
        raise ModelError(
            f"the adapter changes {listed(missed, 3)}, which the model's files hold under another name",
            "It cannot be merged tensor by tensor: use a machine on which it fits into memory",
        )


def _write(job: Job, path: Path, tensors: FilePlan) -> dict[str, Any]:
    """One file of merged tensors. Returns what the journal says of it."""
    found = Found()
    planned = {name: one for name, (one, _) in tensors.items()}
    entry = write_file(path, planned, lambda name: _pieces(job, name, *tensors[name], found))
    return entry | {"found": asdict(found)}


# --- what is to be written ------------------------------------------------------------------------------------------


def _plan(job: Job) -> tuple[Plan, list[str], list[str]]:
    """(the plan, names that are left out, names that the model does not use)."""
    plan: Plan = {}
    left_out, unused, written = list[str](), list[str](), set[object]()
    for one in job.skeleton.stored:
        tensors = plan.setdefault(one.file.name, {})
        if one.parameter is None:
            unused.append(one.name)
            tensors[one.name] = Planned(_dtype(job, one), one.entry.shape), one
            continue
        key = _identity(job, one.parameter)
        if key in written:
            left_out.append(one.name)  # tied: the files have it twice
            continue
        written.add(key)
        tensors[one.name] = Planned(_dtype(job, one), tuple(job.tensors[one.parameter].shape)), one
    last = plan[job.skeleton.stored[-1].file.name]
    for name, tensor in job.tensors.items():
        if name not in job.skeleton.elsewhere and _identity(job, name) not in written:
            # It was tied, and has a weight of its own now.
            written.add(_identity(job, name))
            last[name] = Planned(job.dtype, tuple(tensor.shape)), name
    return plan, left_out, unused


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    names = {module.base: name for name, module in adapted_modules(model).items()}
    for name, module in model.named_modules():
        if not isinstance(module, Adapted):
            own = names.get(module, name)
            stored = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
            tensors = {**module._parameters, **stored}
            found |= {f"{own}.{key}".lstrip("."): tensor for key, tensor in tensors.items() if tensor is not None}
    return found


def _identity(job: Job, name: str) -> object:
    """Equal for parameters that are one once merged."""
    path, _, leaf = name.rpartition(".")
    module = job.adapted.get(path)
    return (id(module.shared), leaf) if isinstance(module, Whole) else id(job.tensors[name])


def _dtype(job: Job, one: Stored) -> torch.dtype:
    """What the model does not know stays as it is, unless it has parameters under other names."""
    own = DTYPES[one.entry.dtype]
    is_cast = own.is_floating_point and (one.parameter is not None or bool(job.skeleton.elsewhere))
    return job.dtype if is_cast else own


def _finish(job: Job, tokenizer: Any, source: Path, directory: Path, plan: Plan, total: int) -> None:
    """All that stands beside the weights."""
    model: Any = job.skeleton.model
    config = model.config
    config.architectures, config.dtype = [type(model).__name__], job.dtype
    ends = [f"{name}.weight" for name in _ends(model)]
    if len({_identity(job, name) for name in ends}) > 1:
        for one in (config, config.get_text_config()):
            if getattr(one, "tie_word_embeddings", False):
                one.tie_word_embeddings = False
    config.save_pretrained(directory)
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, directory / GENERATION)
    tokenizer.save_pretrained(directory)
    if (source / INDEX).is_file():
        places = {name: file for file, tensors in plan.items() for name in tensors}
        files.write_json(
            directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        )


def _ends(model: Any) -> list[str]:
    """The names of the embedding and the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if module in ends]


# --- one tensor -----------------------------------------------------------------------------------------------------


def _pieces(job: Job, name: str, planned: Planned, origin: Stored | str, found: Found) -> Iterator[Tensor]:
    """The merged tensor in the type it is written in, whole or in rows. Notes in `found` what is seen."""
    found.tensors += 1
    if isinstance(origin, Stored) and origin.parameter is None:
        for rows in _in_rows(origin.read(), planned):
            yield rows if rows.dtype == planned.dtype else _cast(name, rows, planned.dtype, found)
        return
    parameter = origin if isinstance(origin, str) else cast(str, origin.parameter)
    path, _, leaf = parameter.rpartition(".")
    module, W = job.adapted.get(path), _original(job, origin, job.tensors[parameter])
    if module is not None and leaf in (module.keys if isinstance(module, Whole) else ("weight",)):
        found.merged += 1
        W = _merged(job, module, leaf, W, found)
    for rows in _in_rows(W, planned):
        yield _cast(name, rows, planned.dtype, found)
    trim_heap()


def _original(job: Job, origin: Stored | str, own: Tensor) -> Tensor:
    """The base's weight as training saw it. own: the model's, with numbers in it where it is an end."""
    if isinstance(origin, str) or not is_placeholder(own):
        return own.detach()
    W = origin.read()
    if job.storage in ENCODERS and origin.name in job.skeleton.linear and can_be_rounded(W, job.storage):
        return ENCODERS[job.storage](W).decode(torch.float32)
    return W


def _merged(job: Job, module: Adapted, leaf: str, W: Tensor, found: Found) -> Tensor:
    """W' in float32. Raises MergeError if what it computes is not what the unmerged module computes."""
    with torch.no_grad():
        if isinstance(module, Whole):
            return module.in_force(leaf, W).detach()
        if isinstance(module, TokenRows):
            merged = W.to(torch.promote_types(W.dtype, torch.float32), copy=True)
            merged[module.ids] = module.rows_in_force()
            return merged
        layer = cast(LoRALayer, module)
        merged = layer.merged_matrix(layer.kind.as_matrix(W))
        merged = (merged.T if layer.kind.transposed else merged.reshape(W.shape)).contiguous()
    _check(job, layer, W.to(merged.dtype), merged, found)
    return merged


def _check(job: Job, layer: LoRALayer, W: Tensor, merged: Tensor, found: Found) -> None:
    """Hold the layer's output with the update beside W against its output with `merged` alone, for random inputs."""
    width = layer.r + (0 if layer.kind.feature_dim is None else layer.in_features)
    seen = Found(worst=layer.name, tolerance=rounding(width, 1, torch.finfo(W.dtype).eps))
    seen.difference = _difference(layer, W, merged)
    if not seen.difference <= seen.tolerance and not (job.force and math.isfinite(seen.difference)):
        raise MergeError(
            f"the output of {layer.name} merged differs from that unmerged by {seen.difference:.1e} of its norm, and "
            f"rounding explains {seen.tolerance:.1e}",
            "Nothing was written. Use the adapter unmerged, or write it all the same with --force",
        )
    found.add(seen)


@torch.no_grad()
def _difference(layer: LoRALayer, W: Tensor, merged: Tensor) -> float:
    """||merged - unmerged|| / ||unmerged|| of the worst of a few rows of output."""
    base, x = layer.base, _input(layer, W.dtype)
    kept = base._parameters
    others = {key: None if p is None else nn.Parameter(p.to(W.dtype), requires_grad=False) for key, p in kept.items()}
    try:
        base._parameters = {**others, "weight": nn.Parameter(W, requires_grad=False)}
        unmerged = layer(x).flatten(1)
        base._parameters = {**others, "weight": nn.Parameter(merged, requires_grad=False)}
        after = base(x).flatten(1)
    finally:
        base._parameters = kept
    if torch.equal(after, unmerged):
        return 0.0  # rows of zeros too
    return float(((after - unmerged).norm(dim=1) / unmerged.norm(dim=1)).max())


def _input(layer: LoRALayer, dtype: torch.dtype) -> Tensor:
    """Random rows that the layer can be given, the same every time."""
    generator = torch.Generator().manual_seed(0)
    if layer.kind.feature_dim is None:
        return torch.randint(layer.in_features, (PROBE_ROWS, PROBE_TOKENS), generator=generator)
    if isinstance(layer.kind, Conv):
        conv = cast(nn.Conv2d, layer.base)
        sizes = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return torch.randn(PROBE_ROWS, conv.in_channels, *sizes, generator=generator).to(dtype)
    return torch.randn(PROBE_ROWS, layer.in_features, generator=generator).to(dtype)


def _in_rows(W: Tensor, planned: Planned) -> Iterator[Tensor]:
    if W.dim() == 0 or not W.numel():
        yield W
        return
    step = max(1, NUMBERS_AT_ONCE // max(1, W[0].numel()))
    for first in range(0, len(W), step):
        yield W[first : first + step]


def _cast(name: str, rows: Tensor, dtype: torch.dtype, found: Found) -> Tensor:
    """Rounded once. Raises MergeError for what is not finite."""
    if not rows.is_floating_point():
        return rows
    cast_rows = rows.detach().to(dtype)
    if not cast_rows.isfinite().all():
        shown = str(dtype).removeprefix("torch.")
        raise MergeError(f"{name} is not finite in {shown} once merged", "Use --dtype bf16 or fp32, or a lower scale")
    if dtype.itemsize < 4:
        wide = rows.float()
        found.square += float(wide.square().sum(dtype=torch.float64))
        found.cast_square += float((cast_rows.float() - wide).square().sum(dtype=torch.float64))
    return cast_rows
