"""What a run has trained, in its directory: LoRA in PEFT's format, other methods as their tensors and settings."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafit import files
from lorafit.config import LoRAConfig, MethodConfig
from lorafit.errors import AdapterError, ConfigError
from lorafit.export import peft
from lorafit.lora import inject
from lorafit.methods import full, table
from lorafit.methods.labels import Labels, label_head

CONFIG_NAME, WEIGHTS_NAME = "method.json", "method.safetensors"


def is_saved(directory: Path) -> bool:
    """Whether a directory holds what some method has trained, and is no model."""
    names = (peft.CONFIG_NAME, CONFIG_NAME)
    return any((directory / name).is_file() for name in names) and not (directory / "config.json").is_file()


def save(
    model: nn.Module,
    directory: Path,
    config: MethodConfig,
    base: str,
    tokenizer: Any | None,
    labels: Labels | None = None,
) -> None:
    """Write what was trained to `directory`, all of it or nothing. base: where the model is found.

    tokenizer: saved beside it, with its chat template, unless None. labels: of the model's head, if it has one: then
    LoRA is written in our own form too, as PEFT has no place for what the head reads. Raises AdapterError, RunDirError.
    """
    if config.method == "lora" and labels is None:
        return peft.save(model, directory, config, base, tokenizer)
    config, tensors = _lasting(model, config)
    settings = {name: getattr(config, name) for name in MethodConfig.model_fields}

    def fill(temporary: Path) -> None:
        told = {"labels": dataclasses.asdict(labels)} if labels is not None else {}
        files.write_json(temporary / CONFIG_NAME, {"base": base, "settings": settings} | told)
        save_file(tensors, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)

    files.write_dir_atomic(directory, fill)


def _lasting(model: nn.Module, config: MethodConfig) -> tuple[MethodConfig, dict[str, Tensor]]:
    """The settings and tensors of what was trained, as an update of the base that its files have.

    A start that took something out of W0 is subtracted from the factors again, which then have twice the rank.
    """
    tensors = table.of(model).state(model)
    layers = inject.owners(model) if config.method == "lora" else {}
    ranks, alphas = dict[str, int](), dict[str, float]()
    for name, layer in layers.items():
        if layer.started_at is not None:
            A, B, _ = layer.lasting_factors()
            tensors |= {f"{name}.lora_A": A.detach().contiguous(), f"{name}.lora_B": B.detach().contiguous()}
            exact = f"re:{re.escape(name)}"
            ranks[exact], alphas[exact] = layer.lasting_rank(config.scaling_rule)
    if not ranks:
        return config, tensors
    others = {f"re:{re.escape(name)}": layer for name, layer in layers.items() if layer.started_at is None}
    ranks |= {exact: layer.r for exact, layer in others.items()}
    alphas |= {exact: layer.alpha for exact, layer in others.items()}
    return config.model_copy(update={"rank_pattern": ranks, "alpha_pattern": alphas}), tensors


def load(model: nn.Module, directory: Path) -> LoRAConfig:
    """Attach what is in `directory` to a plain model, strictly. Returns its settings.

    Raises AdapterError, naming the tensor or key, if it does not fit the model in every detail.
    """
    if not (directory / CONFIG_NAME).is_file():
        return peft.load(model, directory)
    _, config, labels = _read(directory)
    if labels is not None and label_head(model) is None:
        raise AdapterError(
            f"{directory} holds a head of {len(labels.names)} labels, and the model has none", "Use `lorafit eval`"
        )
    try:
        tensors = load_file(directory / WEIGHTS_NAME)
    except Exception as error:  # safetensors raises its own for damage, OSError where there is no file
        raise AdapterError(f"{directory / WEIGHTS_NAME} cannot be read: {error}", "Copy the run again") from None
    table.attach(model, config)
    if config.method == "full":
        full.keep_before(model)
    table.of(model).load_state(model, tensors)
    return config


def settings_of(directory: Path) -> MethodConfig | None:
    """The settings of what is in `directory`, where it is in our own form; None in PEFT's. Raises AdapterError."""
    return _read(directory)[1] if (directory / CONFIG_NAME).is_file() else None


def method_of(directory: Path) -> str:
    """The method that trained what is in `directory`. Raises AdapterError."""
    settings = settings_of(directory)
    return "lora" if settings is None else settings.method


def base_of(directory: Path) -> str | None:
    """The model that what is in `directory` belongs to, where it says so. Raises AdapterError."""
    if (directory / CONFIG_NAME).is_file():
        return _read(directory)[0]
    return peft.read_config(directory).base


def labels_of(directory: Path) -> Labels | None:
    """What the head in `directory` tells apart; None where there is no head. Raises AdapterError."""
    return _read(directory)[2] if (directory / CONFIG_NAME).is_file() else None


def _read(directory: Path) -> tuple[str | None, MethodConfig, Labels | None]:
    path = directory / CONFIG_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        told = found.get("labels")
        labels = None if told is None else Labels(**{**told, "names": tuple(map(str, told["names"]))})
        return found.get("base") or None, MethodConfig.model_validate(found["settings"]), labels
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ConfigError, ValidationError) as error:
        raise AdapterError(f"{path} cannot be read: {str(error).splitlines()[0]}", "Copy the run again") from None
