"""What a target means, and what is opened for it: a run, a model, or a model and an adapter.

target -> base model, from its headers -> loaded as in training -> the adapter, at its scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from transformers import AutoTokenizer

from lorafit.config import ROUNDED
from lorafit.engine import precision
from lorafit.errors import AdapterError, ConfigError, ModelError, listed
from lorafit.export import saved
from lorafit.methods import table
from lorafit.methods.labels import Labels, put_head
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.rundir import RunDir, run_of_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# The adapter's tokenizer, with the chat template it was trained with, wins over the model's.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Opened:
    """A model that is ready to run, its adapter attached at the scale asked for.

    system: the system message that all training rows began with, if they did. base: the model's name as it was given
    or as the run knows it. precision: what it computes in. labels: what its head tells apart, None
    where it writes text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: model_spec.ModelSpec
    system: str | None
    base: str
    has_adapter: bool
    precision: str
    labels: Labels | None = None


@dataclass(frozen=True)
class Found:
    """What a target means, before anything large is read. What only a run knows is None elsewhere."""

    base: str
    adapter: Path | None
    system: str | None = None
    precision: str | None = None
    storage: str = "auto"
    model_sha256: str | None = None


def open_target(
    target: str,
    adapter: str | None,
    scale: float,
    precision_name: str,
    trust_remote_code: bool,
    console: Console,
    storage: str = "auto",
    full: bool = False,
    labelled: bool = False,
    r: int | None = None,
) -> Opened:
    """Load a run, a model, or a model and an adapter, and set the scale. Says on `console` what it opened.

    target: a run directory, a model as for training, or an adapter directory that names its base. adapter: a directory
    in PEFT's format, for a model alone. precision_name: `auto` takes what a run was trained in, so that its figures can
    be compared; for anything else it measures. storage: where it is not `auto`, frozen weights stay so in memory. The
    base of a run is rounded as in training in any case, and `auto` decodes it at once: the same numbers, faster. full:
    but not even that; the base is as it was before training rounded it. labelled: whether one that tells labels apart
    will do as well. r: take the adapter of that rank, of a run that leaves several; by default its own.
    Raises ConfigError for a scale that is not finite or scales nothing, or another storage than the run's, RunDirError
    for an unfinished run, AdapterError for an adapter that does not belong to the model, ModelError.
    """
    if not math.isfinite(scale):
        raise ConfigError(f"--scale must be a finite number, got {scale}", "0 is the base model, 1 the tuned one")
    found = find(target, adapter)
    if r is not None:
        found = replace(found, adapter=_of_rank(target, found, r))
    if full:
        found = replace(found, storage="auto")
    labels = saved.labels_of(found.adapter) if found.adapter is not None else None
    if labels and not labelled:
        raise ConfigError(
            f"{target} {labels.told} and writes no text",
            f"Use it by `lorafit eval {target} DATA`; `lorafit merge {target} -o DIR` writes it for transformers",
        )
    if found.adapter is None and scale != 1:
        raise ConfigError(
            f"--scale {scale:g} scales an adapter, and {target} is a model without one",
            "Give a run directory, or an adapter with --adapter DIR",
        )
    if storage != "auto" and found.model_sha256 is not None and storage != found.storage:
        raise ConfigError(
            f"{target} was trained on a base stored as {found.storage}, and --base-storage {storage} is given",
            "Leave it out: the adapter belongs to the base it was trained on",
        )
    spec = read_base(target, found)
    check_same_model(target, found, spec)
    loaded, chosen = load_base(found, spec, precision_name, trust_remote_code, storage, features=labels is not None)
    if labels:
        loaded = replace(loaded, model=cast("PreTrainedModel", put_head(loaded.model, labels, seed=0)))
        loaded.model.requires_grad_(False)
    tokenizer = loaded.tokenizer
    if found.adapter is not None:
        saved.load(loaded.model, found.adapter)
        table.of(loaded.model).set_scale(loaded.model, scale)
        tokenizer = tokenizer_of(found.adapter, loaded.model, loaded.tokenizer)
    decoded = storage == "auto"
    what = f"{found.base} with the adapter in {found.adapter} at scale {scale:g}" if found.adapter else found.base
    rounded = f", rounded to {found.storage} as in training" if found.storage in ROUNDED else ""
    rounded += "" if decoded else f", weights kept as {storage}"
    console.print(f"opened {what} in {chosen}{rounded}", style="dim", highlight=False, markup=False, soft_wrap=True)
    return Opened(
        model=loaded.model,
        tokenizer=tokenizer,
        spec=spec,
        system=found.system,
        base=found.base,
        has_adapter=found.adapter is not None,
        precision=chosen,
        labels=labels,
    )


def find(target: str, adapter: str | None) -> Found:
    """What `target` is. Raises ConfigError if it has an adapter of its own and another one is given."""
    run, path = RunDir(target), Path(target)
    is_adapter = saved.is_saved(path)
    if adapter is not None:
        if run.exists or is_adapter:
            raise ConfigError(
                f"{target} has an adapter already, and --adapter {adapter} is a second one",
                "Give a model as the target, or leave --adapter out",
            )
        return Found(target, Path(adapter))
    if run.exists:
        return _of_run(run, run.adapter)
    if not is_adapter:
        return Found(target, None)
    owner = run_of_rank(path)
    return _of_run(owner, path) if owner else Found(_base_of(path), path)


def _of_run(run: RunDir, adapter: Path) -> Found:
    result = run.read_result()
    return Found(
        base=result["model"],
        adapter=adapter,
        system=result.get("system"),
        precision=result.get("precision"),
        storage=result.get("base_storage", "auto"),
        model_sha256=result.get("model_sha256"),
    )


def _of_rank(target: str, found: Found, r: int) -> Path:
    """The run's adapter of that rank. Raises ConfigError where there is none."""
    run = RunDir(target)
    if path := run.adapter_of(r):
        return path
    if found.adapter is None:
        raise ConfigError(
            f"--r {r} is given, and {target} is a model without an adapter", "Leave it out, or give a run"
        )
    given, ranks = f"--r {r} is given, and {target}", [one["r"] for one in run.by_rank()]
    shrink = f"lorafit shrink {target if run.exists else found.adapter} --r {r} -o DIR"
    if not ranks:
        raise ConfigError(f"{given} leaves no other ranks", f"Make an adapter of a lower rank: {shrink}")
    do = f"Give one of these, or make it: {shrink}" if r < ranks[-1] else "Give one of these"
    raise ConfigError(f"{given} has adapters of rank {listed(map(str, ranks))}", do)


def read_base(target: str, found: Found) -> model_spec.ModelSpec:
    """The model that a target stands on, from its headers. Raises ModelError."""
    with _naming_the_way(target, found):
        return model_spec.read(found.base)


def load_base(
    found: Found,
    spec: model_spec.ModelSpec,
    precision_name: str,
    trust_remote_code: bool,
    storage: str = "auto",
    features: bool = False,
) -> tuple[model_load.Loaded, str]:
    """The base alone, frozen, and what it computes in; rounded, stored and chosen as `open_target` says."""
    trained_in = None if found.precision == "fp16" and not precision.has_fp16() else found.precision
    chosen = trained_in if trained_in and precision_name == "auto" else precision.choose(precision_name)
    chosen = "bf16" if chosen == "int8" else chosen  # int8 is calibrated on training rows, and made from bf16 weights
    kept = found.storage if storage == "auto" else storage
    loaded = model_load.load(
        spec, precision.DTYPES[chosen], trust_remote_code, kept, decoded=storage == "auto", features=features
    )
    loaded.model.requires_grad_(False)
    return loaded, chosen


def _base_of(adapter: Path) -> str:
    base = saved.base_of(adapter)
    if not base:
        raise AdapterError(
            f"{adapter} is an adapter that does not name its base model", f"Give it: MODEL --adapter {adapter}"
        )
    return base


@contextmanager
def _naming_the_way(target: str, found: Found) -> Iterator[None]:
    """A base model that the user did not type himself is named as such where it cannot be found. Raises ModelError."""
    try:
        yield
    except ModelError as error:
        if found.base == target:
            raise
        raise ModelError(
            f"the base model of {target} cannot be read: {error.what}",
            f"Give it and the adapter: MODEL --adapter {found.adapter}",
        ) from error


def check_same_model(target: str, found: Found, spec: model_spec.ModelSpec) -> None:
    """The base must hold the bytes that the run was trained on. Raises AdapterError."""
    if found.model_sha256 is not None and model_spec.sha256(spec) != found.model_sha256:
        raise AdapterError(
            f"{found.base} is not the model that {target} was trained on: its SHA-256 differs from the one in run.json",
            f"Put the original back, or try the adapter on this one: {found.base} --adapter {found.adapter}",
        )


def tokenizer_of(adapter: Path, model: PreTrainedModel, models_own: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the adapter, else the model's. Raises AdapterError for a damaged or too large one."""
    if not all((adapter / name).is_file() for name in TOKENIZER_FILES):
        return models_own
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(adapter, local_files_only=True)
    except Exception as error:  # tokenizers raises a plain Exception for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AdapterError(
            f"the tokenizer in {adapter} cannot be read: {reason}",
            f"Copy the adapter again, or remove {' and '.join(TOKENIZER_FILES)} to use the model's own",
        ) from error
    embeddings: Any = model.get_input_embeddings()
    known = embeddings.weight.shape[0]
    if len(tokenizer) > known:
        raise AdapterError(
            f"the tokenizer in {adapter} has {len(tokenizer)} tokens, the model knows {known}",
            "Is it the adapter of another model?",
        )
    return tokenizer
