"""The part of the Python API that needs a config or a file: attach, save and load, for any `nn.Module`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lorafit.config import LoRAConfig
from lorafit.export import peft
from lorafit.methods import lora
from lorafit.methods.method import Attached


def attach(model: nn.Module, config: LoRAConfig) -> Attached:
    """Freeze `model` and add an update to each of the config's targets, in place. Its outputs do not change.

    Returns what was done: counts and notes. Raises TargetError, RankError or ConfigError; nothing is changed then.
    Source: Hu et al. 2021, eq. 3.
    """
    return lora.attach(model, config)


def save(model: nn.Module, directory: Path | str, config: LoRAConfig) -> None:
    """Write the adapter in PEFT's format, all of it or nothing. Raises RunDirError, AdapterError."""
    peft.save(model, Path(directory), config, base="", tokenizer=None)


def load(model: nn.Module, directory: Path | str) -> LoRAConfig:
    """Attach the adapter in `directory`, ours or PEFT's, to a plain `model`; returns its settings.

    Raises AdapterError, naming the tensor or key, if it does not fit the model in every detail.
    """
    return peft.load(model, Path(directory))
