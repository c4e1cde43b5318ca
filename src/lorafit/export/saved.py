"""What a run has trained, in its directory: LoRA in PEFT's format, other methods as their tensors and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn

from lorafit import files
from lorafit.config import LoRAConfig, MethodConfig
from lorafit.errors import AdapterError, ConfigError
from lorafit.export import peft
from lorafit.methods import full, table

CONFIG_NAME, WEIGHTS_NAME = "method.json", "method.safetensors"


def is_saved(directory: Path) -> bool:
    """Whether a directory holds what some method has trained, and is no model."""
    names = (peft.CONFIG_NAME, CONFIG_NAME)
    return any((directory / name).is_file() for name in names) and not (directory / "config.json").is_file()


def save(model: nn.Module, directory: Path, config: MethodConfig, base: str, tokenizer: Any | None) -> None:
    """Write what was trained to `directory`, all of it or nothing. base: where the model is found.

    tokenizer: saved beside it, with its chat template, unless None. Raises AdapterError, RunDirError.
    """
    if config.method == "lora":
        return peft.save(model, directory, config, base, tokenizer)
    settings = {name: getattr(config, name) for name in MethodConfig.model_fields}
    weights = to_safetensors(table.of(model).state(model), metadata={"format": "pt"})

    def fill(temporary: Path) -> None:
        files.write_json(temporary / CONFIG_NAME, {"base": base, "settings": settings})
        (temporary / WEIGHTS_NAME).write_bytes(weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)

    files.write_dir_atomic(directory, fill)


def load(model: nn.Module, directory: Path) -> LoRAConfig:
    """Attach what is in `directory` to a plain model, strictly. Returns its settings.

    Raises AdapterError, naming the tensor or key, if it does not fit the model in every detail.
    """
    if not (directory / CONFIG_NAME).is_file():
        return peft.load(model, directory)
    _, config = _read(directory)
    method = table.METHODS[config.method]
    try:
        tensors = load_file(directory / WEIGHTS_NAME)
    except Exception as error:  # safetensors raises its own for damage, OSError where there is no file
        raise AdapterError(f"{directory / WEIGHTS_NAME} cannot be read: {error}", "Copy the run again") from None
    table.attach(model, config)
    if config.method == "full":
        full.keep_before(model)
    method.load_state(model, tensors)
    return config


def method_of(directory: Path) -> str:
    """The method that trained what is in `directory`. Raises AdapterError."""
    return _read(directory)[1].method if (directory / CONFIG_NAME).is_file() else "lora"


def base_of(directory: Path) -> str | None:
    """The model that what is in `directory` belongs to, where it says so. Raises AdapterError."""
    if (directory / CONFIG_NAME).is_file():
        return _read(directory)[0]
    return peft.read_config(directory).base


def _read(directory: Path) -> tuple[str | None, MethodConfig]:
    path = directory / CONFIG_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found.get("base") or None, MethodConfig.model_validate(found["settings"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ConfigError, ValidationError) as error:
        raise AdapterError(f"{path} cannot be read: {str(error).splitlines()[0]}", "Copy the run again") from None
