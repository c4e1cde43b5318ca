"""What `lorafit export --format` knows: a new one is a file with a function, and a line here.

An exporter takes a `Request`, writes its output whole or not at all, and returns what it wrote as a JSON object, with
the commands to type under `next`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorafit.export import to_gguf, to_gguf_lora, to_ollama, to_peft
from lorafit.export.request import Request

EXPORTERS: dict[str, Callable[[Request], dict[str, Any]]] = {
    "gguf": to_gguf.write,
    "gguf-lora": to_gguf_lora.write,
    "ollama": to_ollama.write,
    "peft": to_peft.write,
}
