"""What an exporter is given: a run, what it is to become, and a way to load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lorafit.config import ExportConfig
from lorafit.errors import AdapterError, ConfigError
from lorafit.export import saved
from lorafit.model.spec import ModelSpec


class Opened(Protocol):
    """The base with the adapter attached at the scale asked for, and the tokenizer of the training."""

    @property
    def model(self) -> Any:
        """A transformers model in float32."""

    @property
    def tokenizer(self) -> Any:
        """As it was saved with the adapter."""


@dataclass(frozen=True)
class Request:
    """One export. Exporters refuse what they can before they call `open`, which loads the model.

    adapter: its directory. spec: of the base. result: the content of run.json, empty for an adapter
    that is no run's. say: prints one line for the user.
    """

    config: ExportConfig
    output: Path
    adapter: Path
    spec: ModelSpec
    result: Mapping[str, Any]
    open: Callable[[], Opened]
    say: Callable[[str], None]

    def refuse_given(self, names: tuple[str, ...], why: str) -> None:
        """Raise ConfigError for a setting that was given and does nothing for this format."""
        given = sorted(self.config.model_fields_set & set(names))
        if given:
            flag = "--" + given[0].replace("_", "-")
            raise ConfigError(f"{flag} is given with --format {self.config.format}", why)

    def need_lora(self) -> None:
        """Raise AdapterError for a run of another method."""
        method = saved.method_of(self.adapter)
        if method != "lora":
            raise AdapterError(
                f"--format {self.config.format} is given, and this run was trained by --method {method}",
                "It writes LoRA adapters; the merged model is written by --format gguf, or by lorafit merge",
            )
