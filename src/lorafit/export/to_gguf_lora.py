"""`export --format gguf-lora`: the adapter alone, which llama.cpp lays over a GGUF file of the base at any scale."""

from __future__ import annotations

from typing import Any

from lorafit.errors import AdapterError
from lorafit.export import gguf, peft
from lorafit.export.peft_tensors import PREFIX
from lorafit.export.request import Request
from lorafit.model import gguf_header, safetensors_header
from lorafit.model.gguf_names import gguf_name
from lorafit.model.spec import ModelSpec

TEMPLATE = "tokenizer.chat_template"


def write(request: Request) -> dict[str, Any]:
    """Returns how many layers were written. Raises AdapterError, before the model is loaded, for what cannot be."""
    request.refuse_given(("type", "num_ctx"), "llama.cpp takes adapters in float32")
    request.refuse_given(("scale",), "llama.cpp takes the scale where the adapter is used: --lora-scaled FILE:0.5")
    request.need_lora()
    check(request)
    opened = request.open()
    layers = gguf.write_adapter(opened.model, request.spec, request.output)
    if request.spec.kind == "gguf" and _other_template(request.spec, opened.tokenizer.chat_template):
        where = request.adapter / "chat_template.jinja"
        request.say(f"trained with another chat template than the base's file has: --chat-template-file {where}")
    base = request.spec.path if request.spec.kind == "gguf" else "BASE.gguf"
    return {"layers": layers, "next": [f"llama-cli -m {base} --lora {request.output}"]}


def _other_template(spec: ModelSpec, trained: Any) -> bool:
    return isinstance(trained, str) and gguf_header.read_header(spec.path).metadata.get(TEMPLATE) != trained


def check(request: Request) -> None:
    """Refuse what llama.cpp has no place for in an adapter, by the headers of its files alone."""
    config = peft.read_config(request.adapter)
    header = safetensors_header.read_header(request.adapter / peft.WEIGHTS_NAME)
    parts = [key.removeprefix(PREFIX).partition(".lora_") for key in header]
    names = list(dict.fromkeys(name for name, found, _ in parts if found))
    check_layers(request.spec, config.variant, bool(config.tokens), names)


def check_layers(spec: ModelSpec, variant: str, has_tokens: bool, names: list[str]) -> None:
    """As `check`. names: of the adapted modules. has_tokens: whether single tokens have rows of their own."""
    architecture = gguf.architecture_of(spec)
    if variant != "lora":
        raise refusal(f"the adapter is of variant {variant}, which changes more than the product B A")
    if has_tokens:
        raise refusal("the adapter holds rows of single tokens, and llama.cpp takes their vocabulary from the base")
    for name in names:
        own = gguf_name(architecture, f"{name}.weight")
        if own is None:
            raise refusal(f"the adapter changes {name}, which has no name there")
        if own == gguf.EMBEDDING or (own == gguf.OUTPUT and spec.tied):
            raise refusal(f"the adapter changes {name}, the embedding or what is one weight with it")


def refusal(what: str) -> AdapterError:
    """The sentence that all of them share."""
    return AdapterError(f"{what}: a GGUF LoRA file cannot hold it", "Export the merged model: --format gguf")
