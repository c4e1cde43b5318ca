"""`export --format gguf`: the merged model as one file for llama.cpp and what is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafit.export import gguf, k_quants
from lorafit.export.gguf_chat import chat_remarks
from lorafit.export.gguf_limits import context_remark
from lorafit.export.merge import merge_into_base
from lorafit.export.request import Opened, Request


def write(request: Request) -> dict[str, Any]:
    """Returns the type, how exact the merge was, and how many tensors have each type. Raises LorafitError."""
    request.refuse_given(("num_ctx",), "It belongs to --format ollama; llama.cpp takes -c")
    check(request)
    opened = request.open()
    written = write_merged(request, opened, request.output)
    for remark in chat_remarks(opened.tokenizer):
        request.say(remark)
    return written | {"next": [f"llama-cli -m {request.output}"]}


def check(request: Request) -> None:
    """Refuse, before anything large is read, a family or a type that cannot be written."""
    gguf.architecture_of(request.spec)
    k_quants.check(request.config.type)


def write_merged(request: Request, opened: Opened, path: Path) -> dict[str, Any]:
    """Add the update to the base, and write it. The model is plain afterwards."""
    merged = merge_into_base(opened.model, opened.tokenizer)
    kind, licence = request.config.type, request.result.get("base_license")
    tensors = gguf.write_model(opened.model, opened.tokenizer, request.spec, path, kind, licence)
    remark = context_remark(opened.model.config, gguf.architecture_of(request.spec))
    if remark:
        request.say(remark)
    return {"type": kind, "scale": request.config.scale, "difference": merged.difference, "tensors": tensors}
