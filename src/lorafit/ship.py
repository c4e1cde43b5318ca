"""`merge` and `export`: a run becomes a model that needs no adapter, or a file for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lorafit.config import ExportConfig, MergeConfig
from lorafit.engine import precision
from lorafit.errors import AdapterError, ConfigError
from lorafit.export import gguf as export_gguf
from lorafit.export import merge as export_merge
from lorafit.plan import machine
from lorafit.units import format_bytes
from lorafit.use import find, open_target


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
    """Write a GGUF file. Returns what was written. Raises LorafitError for whatever the user can mend."""
    torch.set_num_threads(machine.physical_cores())
    output = Path(config.output)
    if config.what == "adapter" and config.scale != 1:
        raise ConfigError("--scale is given with --what adapter", "llama.cpp takes the scale where the adapter is used")
    if output.is_dir():
        raise ConfigError(f"{output} is a directory", "Give the name of a file, such as tuned.gguf")
    if output.exists():
        raise ConfigError(f"{output} exists already", "Remove it, or choose another name with -o")
    opened = open_target(config.run, None, config.scale, "fp32", config.trust_remote_code, console)
    if not opened.has_adapter:
        raise AdapterError(f"{config.run} is a model without an adapter", "Give the directory of `lorafit train -o`")
    found: dict[str, Any] = {"run": config.run, "base": opened.base, "output": config.output, "what": config.what}
    if config.what == "adapter":
        found["layers"] = export_gguf.write_adapter(opened.model, opened.spec, output)
        command = f"llama-cli -m BASE.gguf --lora {output}"
    else:
        merged = export_merge.merge_into_base(opened.model, opened.tokenizer)
        found |= {"type": config.type, "scale": config.scale, "difference": merged.difference}
        found["tensors"] = export_gguf.write_model(opened.model, opened.tokenizer, opened.spec, output, config.type)
        command = f"llama-cli -m {output}"
    size = format_bytes(output.stat().st_size)
    console.print(f"wrote {output} ({size}). Next:\n  {command}", highlight=False, markup=False, soft_wrap=True)
    return found
