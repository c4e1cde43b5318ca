"""`merge` and `export`: a run becomes a model that needs no adapter, or files for other programs."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorafit import shipping
from lorafit.config import ExportConfig, MergeConfig
from lorafit.engine import precision
from lorafit.errors import AdapterError, ConfigError, did_you_mean, listed
from lorafit.export import classifier, gguf_same, saved
from lorafit.export import merge as export_merge
from lorafit.export.exporters import EXPORTERS
from lorafit.export.request import Request
from lorafit.methods.labels import Labels
from lorafit.opening import find, open_target, read_base
from lorafit.plan import machine
from lorafit.rundir import RunDir
from lorafit.shipping import Task
from lorafit.units import format_bytes


def merge(config: MergeConfig, console: Console) -> dict[str, Any]:
    """Add a run's update to its base and write a plain model. Returns what was written and how exactly.

    difference: how far merging moved the logits, relative to their norm; tolerance: what rounding explains.
    cast_difference: how far the cast to `dtype` moved them. Of a merge tensor by tensor see `shipping.stream`. Raises
    LorafitError for whatever the user can mend.
    """
    torch.set_num_threads(machine.usual_threads())
    found = find(config.run, None)
    spec = read_base(config.run, found)
    if found.adapter is None:
        raise AdapterError(f"{config.run} is a model without an adapter", "Give the directory of `lorafit train -o`")
    labels = saved.labels_of(found.adapter)
    if labels is not None:
        return _with_head(config, labels, console)
    shipping.check(config, found, spec)
    if why := shipping.why_stream(config, found, spec):
        loss = partial(_loss_of, config, shipping.loss_precision(spec) or "bf16", console) if config.data else None
        return shipping.stream(config, found, spec, why, loss, console)
    return _in_memory(config, console)


def _loss_of(config: MergeConfig, precision_name: str, console: Console, target: str) -> float:
    """On the rows of --data, of a model or of the run at its scale, which is loaded for it and let go again."""
    scale = config.scale if target == config.run else 1.0
    opened = open_target(target, None, scale, precision_name, config.trust_remote_code, console)
    task = Task.of(config, opened.tokenizer, console)
    assert task is not None, "asked for with rows alone"
    return task.loss(opened.model)


def _with_head(config: MergeConfig, labels: Labels, console: Console) -> dict[str, Any]:
    """A run with a head: body and head in transformers' class, or beside each other. See `export.classifier`."""
    for name in ("into", "stream", "data", "rows", "force"):
        if getattr(config, name) != MergeConfig.model_fields[name].default:
            raise ConfigError(f"--{name} is given, and {config.run} {labels.told} and writes no text", "Leave it out")
    opened = open_target(config.run, None, config.scale, "fp32", config.trust_remote_code, console, labelled=True)
    written = classifier.write(
        opened.model, opened.tokenizer, labels, Path(config.output), precision.DTYPES[config.dtype]
    )
    form = f"a {written.form} of transformers" if written.form else f"a body and its head apart, since {written.why}"
    lines = [
        f"merged {config.run} at scale {config.scale:g}: scores moved by {written.difference:.1e} of their norm "
        f"(rounding explains {written.tolerance:.1e})",
        f"wrote {config.output}, {form}; the code that reads it is in its README.md",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    told = {"run": config.run, "base": opened.base, "output": config.output, "scale": config.scale}
    return told | {"dtype": config.dtype, "into": config.into, "way": "labels", "task": labels.task} | asdict(written)


def _in_memory(config: MergeConfig, console: Console) -> dict[str, Any]:
    """Base + adapter -> loss, logits -> sum in float32, checked -> cast or rounded -> written -> loss."""
    opened = _open(config, console)
    task = Task.of(config, opened.tokenizer, console)
    losses = {"trained": task.loss(opened.model)} if task else {}
    share = None
    if config.into == "full":
        before = export_merge.probe_logits(opened.model, opened.tokenizer)
        del opened
        opened = _open(config, console, full=True)
        share = export_merge.logits_moved(before, opened.model, opened.tokenizer)
    changed = gguf_same.changed_names(opened.model, opened.spec)
    training = export_merge.update_moved(opened.model, opened.tokenizer) if config.into == "same" else None
    merged = export_merge.merge_into_base(opened.model, opened.tokenizer, config.force)
    if task:
        losses["merged"] = task.loss(opened.model)
    found: dict[str, Any] = {
        "run": config.run,
        "base": opened.base,
        "output": config.output,
        "scale": config.scale,
        "into": config.into,
        "way": "memory",
        "difference": merged.difference,
        "tolerance": merged.tolerance,
        "explained": merged.explained,
        "rounding_difference": share,
    }
    if training is not None:
        found |= shipping.write_same(config, opened, changed, training, task, losses)
    else:
        cast = export_merge.save_merged(
            opened.model, opened.tokenizer, Path(config.output), precision.DTYPES[config.dtype]
        )
        if task and cast.difference:
            losses["written"] = task.loss(opened.model.float())
        found |= {"dtype": config.dtype, "cast_difference": cast.difference}
    found |= {"data": config.data, "losses": losses or None}
    shipping.print_merged(found, console)
    return found


def _open(config: MergeConfig, console: Console, full: bool = False) -> Any:
    return open_target(config.run, None, config.scale, "fp32", config.trust_remote_code, console, full=full)


def export(config: ExportConfig, console: Console) -> dict[str, Any]:
    """Write a run for another program. Returns what was written. Raises LorafitError for whatever the user can mend."""
    torch.set_num_threads(machine.usual_threads())
    write = EXPORTERS.get(config.format)
    if write is None:
        hint = did_you_mean(config.format, EXPORTERS) or f"Known: {listed(EXPORTERS)}"
        raise ConfigError(f"--format {config.format!r} is unknown", hint)
    if Path(config.output).exists():
        raise ConfigError(f"{config.output} exists already", "Remove it, or choose another name with -o")
    found, run = find(config.run, None), RunDir(config.run)
    if found.adapter is None:
        raise AdapterError(f"{config.run} is a model without an adapter", "Give the directory of `lorafit train -o`")
    labels = saved.labels_of(found.adapter)
    if labels is not None:
        raise ConfigError(
            f"{config.run} {labels.told} and writes no text, and --format {config.format} is for models that do",
            f"Write it for transformers by `lorafit merge {config.run} -o DIR`",
        )
    request = Request(
        config=config,
        output=Path(config.output),
        adapter=found.adapter,
        spec=read_base(config.run, found),
        result=run.read_result() if run.exists else {},
        open=partial(open_target, config.run, None, config.scale, "fp32", config.trust_remote_code, console),
        say=partial(console.print, highlight=False, markup=False, soft_wrap=True),
    )
    written = write(request)
    request.say(f"wrote {config.output} ({format_bytes(_size(request.output))}). Next:")
    for command in written.pop("next"):
        request.say(f"  {command}")
    return {"run": config.run, "base": found.base, "output": config.output, "format": config.format, **written}


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
