"""Which formats a run can be exported to, asked when it ends, so that its model card shows no command that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorafit.errors import AdapterError, LorafitError
from lorafit.export import gguf, modelfile, to_gguf_lora
from lorafit.lora.inject import lora_layers
from lorafit.lora.tokens import token_rows
from lorafit.methods import table
from lorafit.model.spec import ModelSpec

FORMATS = ("gguf", "gguf-lora", "ollama")


def refusals(model: Any, tokenizer: Any, spec: ModelSpec) -> dict[str, str]:
    """Format -> why it is refused, for those that are. model: with its adapter. Nothing is written."""

    def as_gguf() -> None:
        gguf.check_header(model, tokenizer, spec)

    def as_adapter() -> None:
        layers, rows = lora_layers(model), token_rows(model)
        variant = next((layer.variant_name for layer in layers.values() if not layer.variant.is_low_rank), "lora")
        to_gguf_lora.check_layers(spec, variant, bool(rows), list(layers))

    def as_ollama() -> None:
        as_gguf()
        modelfile.template_of(tokenizer)

    if why := table.why_not_merged(model):
        return dict.fromkeys(FORMATS, why)
    asked = {"gguf": as_gguf, "gguf-lora": as_adapter, "ollama": as_ollama}
    if not lora_layers(model):
        asked["gguf-lora"] = _no_lora
    found = {name: _refusal(check) for name, check in asked.items()}
    return {name: why for name, why in found.items() if why}


def _no_lora() -> None:
    raise AdapterError("what was trained is no LoRA adapter", "Export the merged model")


def _refusal(check: Callable[[], None]) -> str:
    try:
        check()
    except LorafitError as error:
        return error.what
    return ""
