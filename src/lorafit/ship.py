"""`merge` and `export`: a run becomes a model that needs no adapter, or files for other programs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lorafit.config import ExportConfig, MergeConfig
from lorafit.engine import precision
from lorafit.errors import AdapterError, ConfigError, did_you_mean, listed
from lorafit.export import merge as export_merge
from lorafit.export.exporters import EXPORTERS
from lorafit.export.request import Request
from lorafit.plan import machine
from lorafit.rundir import RunDir
from lorafit.units import format_bytes
from lorafit.use import find, open_target, read_spec


def merge(config: MergeConfig, console: Console) -> dict[str, Any]:
    """Add a run's update to its base and write a plain model. Returns what was written and how exactly.

    difference: how far merging moved the logits, relative to their norm; tolerance: what rounding explains.
    cast_difference: how far the cast to `dtype` moved them. Raises LorafitError for whatever the user can mend.
    """
    torch.set_num_threads(machine.physical_cores())
    output = Path(config.output)
    export_merge.check_output(output)
    before = _logits_as_trained(config, console) if config.into == "full" else None
    opened = open_target(
        config.run, None, config.scale, "fp32", config.trust_remote_code, console, full=config.into == "full"
    )
    if not opened.has_adapter:
        raise AdapterError(f"{config.run} is a model without an adapter", "Give the directory of `lorafit train -o`")
    merged = export_merge.merge_into_base(opened.model, opened.tokenizer)
    share = None if before is None else export_merge.logits_moved(before, opened.model, opened.tokenizer)
    if share is not None:
        console.print(
            f"into the full model: logits move by {share:.1e} of their norm against the rounded one of training",
            highlight=False,
        )
    cast = export_merge.save_merged(opened.model, opened.tokenizer, output, precision.DTYPES[config.dtype])
    moved = f", and by {cast.difference:.1e} in the cast to {config.dtype}" if cast.difference else ""
    console.print(
        f"merged {config.run} at scale {config.scale:g}: logits moved by {merged.difference:.1e} of their norm "
        f"(rounding explains {merged.tolerance:.1e}){moved}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(f"wrote {output}. Next:", highlight=False, markup=False, soft_wrap=True)
    for command in (f"lorafit eval {output} TEST.jsonl", f"lorafit chat {output}"):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
    return {
        "run": config.run,
        "base": opened.base,
        "output": config.output,
        "scale": config.scale,
        "dtype": config.dtype,
        "difference": merged.difference,
        "tolerance": merged.tolerance,
        "cast_difference": cast.difference,
        "into": config.into,
        "rounding_difference": share,
    }


def _logits_as_trained(config: MergeConfig, console: Console) -> Tensor:
    """Of the probes, with the adapter over the base as it was rounded in training. Raises ConfigError if it was not."""
    if find(config.run, None).storage not in ("nf4", "int8"):
        raise ConfigError(
            f"--into full is given, and the base of {config.run} was not rounded", "Leave it out: there is one base"
        )
    opened = open_target(config.run, None, config.scale, "fp32", config.trust_remote_code, console)
    return export_merge.probe_logits(opened.model, opened.tokenizer)


def export(config: ExportConfig, console: Console) -> dict[str, Any]:
    """Write a run for another program. Returns what was written. Raises LorafitError for whatever the user can mend."""
    torch.set_num_threads(machine.physical_cores())
    write = EXPORTERS.get(config.format)
    if write is None:
        hint = did_you_mean(config.format, EXPORTERS) or f"Known: {listed(EXPORTERS)}"
        raise ConfigError(f"--format {config.format!r} is unknown", hint)
    if Path(config.output).exists():
        raise ConfigError(f"{config.output} exists already", "Remove it, or choose another name with -o")
    found, run = find(config.run, None), RunDir(config.run)
    if found.adapter is None:
        raise AdapterError(f"{config.run} is a model without an adapter", "Give the directory of `lorafit train -o`")
    request = Request(
        config=config,
        output=Path(config.output),
        adapter=found.adapter,
        spec=read_spec(config.run, found),
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
