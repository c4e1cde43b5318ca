"""`export --format peft`: the adapter, its tokenizer and the model card as one directory, such as a hub takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lorafit import files
from lorafit.export import card, peft
from lorafit.export.peft_tensors import read_tensors
from lorafit.export.request import Request


def write(request: Request) -> dict[str, Any]:
    """Copies what the run holds, once it was read and found whole; no model is loaded. Raises LorafitError."""
    request.refuse_given(("type", "num_ctx"), "PEFT's adapters are written in float32, as they were trained")
    request.refuse_given(("scale",), "PEFT takes the scale where the adapter is used: model.set_scale")
    request.need_lora()
    peft.read_config(request.adapter)
    read_tensors(request.adapter / peft.WEIGHTS_NAME)
    names = sorted(file.name for file in request.adapter.iterdir() if file.is_file())

    def fill(temporary: Path) -> None:
        for name in names:
            shutil.copyfile(request.adapter / name, temporary / name)
        if request.result:
            (temporary / "README.md").write_text(card.render(dict(request.result), adapter="."), encoding="utf-8")

    files.write_dir_atomic(request.output, fill)
    if not request.result:
        request.say(f"{request.config.run} is an adapter without a run: there is nothing to write a model card from")
    return {
        "files": sorted({*names, *(["README.md"] if request.result else [])}),
        "next": [f"lorafit chat {request.output}"],
    }
