"""The parts of `merge`: what may be merged how, the loss on rows, the way tensor by tensor, what is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lorafit import files
from lorafit.config import ROUNDED, MergeConfig
from lorafit.data.formats import read_examples
from lorafit.data.load import locate
from lorafit.data.mask import EncodedSet, encode_all
from lorafit.engine import precision
from lorafit.errors import ConfigError, MergeError, listed
from lorafit.export import gguf as export_gguf
from lorafit.export import gguf_same, peft
from lorafit.export import merge as export_merge
from lorafit.export import stream as export_stream
from lorafit.export.peft_tensors import PREFIX
from lorafit.infer.evaluate import model_loss
from lorafit.lora.inject import set_scale
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.model.safetensors_header import read_header
from lorafit.opening import Found, Opened, check_same_model, tokenizer_of
from lorafit.plan import machine
from lorafit.units import format_bytes, format_count

# Weights in float32, and the originals of those that are merged, which are kept until the logits have been compared.
BYTES_A_PARAMETER = 8
FORCED = "that is more than rounding explains, and was written since --force says so"


# --- what may be merged how -----------------------------------------------------------------------------------------


def check(config: MergeConfig, found: Found, spec: model_spec.ModelSpec) -> None:
    """Raises LorafitError for settings that are at odds with each other or with the base, and for an output there."""
    if config.into == "full" and found.storage not in ROUNDED:
        raise ConfigError(
            f"--into full is given, and the base of {config.run} was not rounded", "Leave it out: there is one base"
        )
    if config.into == "same":
        _check_same(config, spec)
        check_file(Path(config.output))
    else:
        export_merge.check_output(Path(config.output))
    if config.data is not None:
        locate(config.data)  # that it is there
    elif config.rows is not None:
        raise ConfigError("--rows is given without --data", "Give the rows with --data FILE")


def _check_same(config: MergeConfig, spec: model_spec.ModelSpec) -> None:
    if spec.kind != "gguf":
        raise ConfigError(
            f"--into same is given, and {spec.name} is no GGUF file", "Leave it out, or write one with lorafit export"
        )
    if config.dtype != "fp32":
        raise ConfigError(
            f"--dtype {config.dtype} is given with --into same, which keeps the types of the file", "Leave one out"
        )
    if Path(config.output).suffix != ".gguf":
        raise ConfigError(f"--into same writes a file, and -o is {config.output}", "Give a name that ends in .gguf")


def check_file(output: Path) -> None:
    """Raises ConfigError if something stands where a file is to be written."""
    if output.is_dir():
        raise ConfigError(f"{output} is a directory", "Give the name of a file, such as tuned.gguf")
    if output.exists():
        raise ConfigError(f"{output} exists already", "Remove it, or choose another name with -o")


def why_stream(config: MergeConfig, found: Found, spec: model_spec.ModelSpec) -> str | None:
    """Why tensors are merged one by one, as the end of a sentence; None if the model is loaded. Raises ConfigError."""
    if config.stream and spec.kind == "gguf":
        raise ConfigError(
            f"--stream is given, and {spec.name} is a GGUF file", "It is for Hugging Face models: leave it out"
        )
    if found.adapter is not None and not (found.adapter / peft.CONFIG_NAME).is_file():
        if config.stream:
            raise ConfigError(f"--stream is given, and {config.run} is no run of --method lora", "Leave it out")
        return None
    needed, free = BYTES_A_PARAMETER * spec.parameters, machine.available_bytes()
    if spec.kind == "gguf" or not (config.stream or needed > free):
        return None
    why = "as --stream says"
    if not config.stream:
        why = f"since merging it in memory would take {format_bytes(needed)}, and {format_bytes(free)} are free"
    if config.data is not None and loss_precision(spec) is None:
        raise ConfigError(
            f"--data is given, and measuring a loss would take {format_bytes(2 * spec.parameters)}, with "
            f"{format_bytes(free)} free",
            "Leave it out: merging tensor by tensor needs little memory",
        )
    return why


def loss_precision(spec: model_spec.ModelSpec) -> str | None:
    """What a loss can be measured in: fp32 where the whole model fits so, else bf16; None where it fits in neither."""
    free = machine.available_bytes()
    return next((name for name, size in (("fp32", 4), ("bf16", 2)) if size * spec.parameters <= free), None)


# --- the loss on rows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Rows on which the loss is measured."""

    encoded: EncodedSet
    seq_len: int

    @classmethod
    def of(cls, config: MergeConfig, tokenizer: Any, console: Console) -> Task | None:
        """Those of --data, with the tokenizer and template of training; None without. Raises DataError."""
        if config.data is None:
            return None
        rows = islice(locate(config.data).unseen().rows(), config.rows)
        encoded = encode_all(read_examples(rows), tokenizer, config.seq_len)
        console.print(f"{config.data}: {encoded.summary}", highlight=False, markup=False, soft_wrap=True)
        return cls(encoded, config.seq_len)

    def loss(self, model: Any) -> float:
        """Nats per supervised token."""
        return model_loss(model, self.encoded.encoded, self.seq_len)


# --- the same GGUF types --------------------------------------------------------------------------------------------


def write_same(
    config: MergeConfig,
    opened: Opened,
    changed: set[str],
    training: float,
    task: Task | None,
    losses: dict[str, float],
) -> dict[str, Any]:
    """Write a merged model in the types of its GGUF file, read it back, and measure what rounding has changed.

    changed: parameters that merging changed. training: how far the update moves the logits. losses: to be added to.
    Raises MergeError, before the file has its name, where rounding moves them further than that, unless --force.
    """
    tensors = gguf_same.AsInFile(opened.spec, changed)
    before = export_merge.probe_logits(opened.model, opened.tokenizer)
    found: dict[str, Any] = {}

    def fill(file: Path) -> None:
        anew = _template_of_training(opened) is not None
        counts = export_gguf.write_model(opened.model, opened.tokenizer, opened.spec, file, tensors, own_chat=anew)
        written = model_load.load(replace(opened.spec, path=file, files=(file,)), torch.float32).model.requires_grad_(
            False
        )
        moved = export_merge.logits_moved(before, written, opened.tokenizer)
        if not moved <= training and not config.force:
            raise MergeError(
                f"rounding the merged weights again moves the logits by {moved:.1e} of their norm, and training moved "
                f"them by {training:.1e}",
                "Nothing was written. `lorafit export --type q8_0` rounds less; --force writes it all the same",
            )
        if task:
            losses["written"] = task.loss(written)
        found.update(
            {
                "update_difference": training,
                "requantization_difference": moved,
                "tensors": counts,
                "requantized": tensors.requantized,
                "copied": tensors.copied,
                "larger_types": [f"{name}: {own} -> {written}" for name, own, written in tensors.larger],
            }
        )

    files.write_file_atomic(Path(config.output), fill)
    return found


def _template_of_training(opened: Opened) -> str | None:
    """The chat template that the run was trained with, where it is not the file's own."""
    own = model_load.load_tokenizer(opened.spec).chat_template
    trained = opened.tokenizer.chat_template
    return trained if isinstance(trained, str) and trained != own else None


# --- tensor by tensor -----------------------------------------------------------------------------------------------


def stream(
    config: MergeConfig,
    found: Found,
    spec: model_spec.ModelSpec,
    why: str,
    loss: Callable[[str], float] | None,
    console: Console,
) -> dict[str, Any]:
    """Merge without loading the model. Returns what was written and how exactly.

    loss: of a run or a model by its name, on the rows of --data, which loads it; None without such rows.

    difference, tolerance: of the output of the adapted layer that is furthest off, merged against unmerged, and what
    rounding explains of it. weights_cast_difference: how far the cast changed the weights, relative to their norm.
    """
    assert found.adapter is not None
    check_same_model(config.run, found, spec)
    losses = {"trained": loss(config.run)} if loss else {}
    _say(f"merging {config.run} tensor by tensor, {why}", console)
    skeleton = model_load.load_skeleton(spec, config.trust_remote_code)
    if _has_ends(skeleton.model, found.adapter):
        skeleton.fill_ends()
    peft.load(skeleton.model, found.adapter)
    set_scale(skeleton.model, config.scale)
    tokenizer = tokenizer_of(found.adapter, skeleton.model, skeleton.tokenizer)
    storage = "auto" if config.into == "full" else found.storage
    job = export_stream.Job(
        skeleton, storage, precision.DTYPES[config.dtype], _identity(config, found, spec, storage), config.force
    )
    with _bar(console) as bar:
        line = bar.add_task("merged", total=None)
        done = export_stream.merge(
            job, tokenizer, spec.path, Path(config.output), lambda now, of: bar.update(line, completed=now, total=of)
        )
    if loss:
        losses["merged"] = loss(config.output)
    return _tell_streamed(config, spec, why, done, losses, console)


def _has_ends(model: Any, adapter: Path) -> bool:
    """Whether an adapter's file holds anything of the embedding or the output head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = tuple(f"{PREFIX}{name}." for name, module in model.named_modules() if module in ends)
    return any(key.startswith(names) for key in read_header(adapter / peft.WEIGHTS_NAME))


def _identity(config: MergeConfig, found: Found, spec: model_spec.ModelSpec, storage: str) -> dict[str, Any]:
    """All that decides what is written: a later attempt goes on with the same alone."""
    assert found.adapter is not None
    parts = [found.adapter / peft.CONFIG_NAME, found.adapter / peft.WEIGHTS_NAME]
    return {
        "base": found.model_sha256 or model_spec.sha256(spec),
        "adapter": files.sha256_all(parts),
        "scale": config.scale,
        "dtype": config.dtype,
        "storage": storage,
    }


def _tell_streamed(
    config: MergeConfig,
    spec: model_spec.ModelSpec,
    why: str,
    done: export_stream.Merged,
    losses: dict[str, float],
    console: Console,
) -> dict[str, Any]:
    seen = done.found
    if done.resumed:
        _say(f"{done.resumed} of {done.files} files were finished earlier, and are whole", console)
    for names, what in (
        (done.left_out, "left out, being tied to another that is written"),
        (done.unused, "that the model has not under their names are copied, without an update"),
    ):
        if names:
            _say(f"{len(names)} tensors {what}: {listed(names, 3)}", console)
    cast = f"; the cast to {config.dtype} changed weights by {seen.cast_difference:.1e} of their norm"
    _say(
        f"merged {format_count(seen.merged)} of {format_count(seen.tensors)} tensors at scale {config.scale:g}: the "
        f"output of {seen.worst or 'a layer'} moved most, by {seen.difference:.1e} of its norm (rounding explains "
        f"{seen.tolerance:.1e}){cast if seen.square else ''}",
        console,
    )
    if seen.difference > seen.tolerance:
        _say(FORCED, console)
    about = {"into": config.into, "data": config.data, "losses": losses or None}
    if losses:
        _say(_of_losses(about), console)
    _say_next(config.output, console)
    return about | {
        "run": config.run,
        "base": spec.name,
        "output": config.output,
        "scale": config.scale,
        "dtype": config.dtype,
        "way": "stream",
        "why": why,
        "tensors": seen.tensors,
        "merged": seen.merged,
        "files": done.files,
        "resumed_files": done.resumed,
        "bytes": done.nbytes,
        "difference": seen.difference,
        "tolerance": seen.tolerance,
        "worst": seen.worst,
        "weights_cast_difference": seen.cast_difference,
        "left_out": done.left_out,
        "unused": done.unused,
        "peak_rss_bytes": machine.peak_rss_bytes(),
    }


def _bar(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


# --- what is printed ------------------------------------------------------------------------------------------------


def print_merged(found: Mapping[str, Any], console: Console) -> None:
    """What a merge in memory has found, for people."""
    if found["rounding_difference"] is not None:
        _say(
            f"into the full model: logits move by {found['rounding_difference']:.1e} of their norm against the rounded "
            "one of training",
            console,
        )
    _say(
        f"merged {found['run']} at scale {found['scale']:g}: logits moved by {found['difference']:.1e} of their norm "
        f"(rounding explains {found['tolerance']:.1e}){_of_writing(found)}",
        console,
    )
    if not found["explained"]:
        _say(FORCED, console)
    if found.get("larger_types"):
        count = len(found["larger_types"])
        _say(
            f"{count} tensors are in the next larger type that can be written: {listed(found['larger_types'], 3)}",
            console,
        )
    if found["losses"]:
        _say(_of_losses(found), console)
    _say_next(found["output"], console)


def _of_writing(found: Mapping[str, Any]) -> str:
    if found["into"] == "same":
        kinds = ", ".join(f"{count} {kind}" for kind, count in found["tensors"].items())
        return (
            f", and by {found['requantization_difference']:.1e} in rounding {found['requantized']} tensors again; "
            f"training moved them by {found['update_difference']:.1e}. {found['copied']} tensors are the file's own "
            f"bytes ({kinds})"
        )
    return (
        f", and by {found['cast_difference']:.1e} in the cast to {found['dtype']}" if found["cast_difference"] else ""
    )


def _of_losses(found: Mapping[str, Any]) -> str:
    """Each loss, and what each step added to it."""
    losses = found["losses"]
    into = "merged into the full model" if found["into"] == "full" else "merged"
    parts = [f"{losses['trained']:.4f} as trained", _step(losses, "trained", "merged", into)]
    if "written" in losses:
        parts.append(_step(losses, "merged", "written", "rounded again" if found["into"] == "same" else found["dtype"]))
    return f"loss on {found['data']}: {', '.join(parts)}"


def _step(losses: Mapping[str, float], before: str, after: str, what: str) -> str:
    return f"{losses[after]:.4f} {what} ({losses[after] - losses[before]:+.1e})"


def _say_next(output: str, console: Console) -> None:
    _say(f"wrote {output}. Next:", console)
    for command in (f"lorafit eval {output} TEST.jsonl", f"lorafit chat {output}"):
        _say(f"  {command}", console)


def _say(line: str, console: Console) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
