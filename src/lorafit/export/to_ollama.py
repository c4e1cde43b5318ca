"""`export --format ollama`: a directory with the merged model and its Modelfile, for `ollama create`.

Merged, and not an adapter over one of Ollama's own models: those are not the weights that were trained on, and Ollama
no longer makes models with ADAPTER (since its version 0.34.1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafit import files
from lorafit.export import gguf, gguf_limits, modelfile
from lorafit.export.request import Opened, Request
from lorafit.export.to_gguf import check, write_merged

MODEL, MODELFILE = "model.gguf", "Modelfile"


def write(request: Request) -> dict[str, Any]:
    """Returns what `to_gguf` does, with stops and context. Raises LorafitError."""
    check(request)
    opened = request.open()
    template = modelfile.template_of(opened.tokenizer)  # before the model is merged, which takes longer
    described = _describe(request, opened, template)
    written: dict[str, Any] = {}

    def fill(temporary: Path) -> None:
        written.update(write_merged(request, opened, temporary / MODEL))
        (temporary / MODELFILE).write_text(described.render(), encoding="utf-8")

    files.write_dir_atomic(request.output, fill)
    for note in template.notes:
        request.say(note)
    name = request.output.name.lower()
    commands = [f"ollama create {name} -f {request.output / MODELFILE}", f"ollama run {name}"]
    facts = {
        "stops": described.stops,
        "num_ctx": described.num_ctx,
        "notes": template.notes,
        "system": described.system,
    }
    return written | facts | {"next": commands}


def _describe(request: Request, opened: Opened, template: modelfile.Template) -> modelfile.Modelfile:
    system = request.result.get("system")
    lost = modelfile.dropped(system) if system else []
    if system and (lost or not template.takes_system):
        why = f"has {', '.join(lost)}, which a Modelfile drops" if lost else "has no place in the chat template"
        request.say(f"the system message of the training rows {why}: send it with each request")
        system = None
    longest = gguf_limits.context_length(opened.model.config.get_text_config(), gguf.architecture_of(request.spec))
    return modelfile.Modelfile(
        model=MODEL,
        template=template.text,
        stops=modelfile.stops_of(opened.tokenizer),
        num_ctx=min(request.config.num_ctx, longest),
        system=system,
        licence=request.result.get("base_license"),
    )
