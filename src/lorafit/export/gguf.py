"""GGUF files for llama.cpp: an adapter to be laid over a model, and a merged model in one of several types.

Names, the order of query and key rows, and what else llama.cpp's converter changes are those of `model/gguf_names.py`
and `model/gguf_tensors.py`, the other way round. The package gguf writes the file and quantizes the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from lorafit import files
from lorafit.errors import AdapterError, ModelError, listed
from lorafit.export import k_quants
from lorafit.export.gguf_chat import CHAT_KEYS, write_chat
from lorafit.export.gguf_header import write_header
from lorafit.lora.inject import lora_layers
from lorafit.lora.layer import LoRALayer
from lorafit.lora.tokens import token_rows
from lorafit.model import gguf_header
from lorafit.model.gguf_names import NOT_PARAMETERS, gguf_name, hf_name
from lorafit.model.spec import ModelSpec

Array = np.ndarray[Any, Any]

# transformers' model_type -> llama.cpp's architecture, where its converter changes no more than what is known here.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
}
# Of matrices in blocks. Q4 leaves embeddings and head in Q8_0: llama.cpp's own quantizer gives them more bits as well.
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
EMBEDDING, OUTPUT = OUTER = ("token_embd.weight", "output.weight")
ALPHA = 1.0


def architecture_of(spec: ModelSpec) -> str:
    """llama.cpp's name. Raises ModelError for a family that is not written."""
    found = ARCHITECTURES.get(spec.architecture)
    if found is None:
        raise ModelError(
            f"{spec.name} is a {spec.architecture}, which is not written as GGUF here",
            f"Written are {listed(ARCHITECTURES)}; merge it, and convert it with llama.cpp",
        )
    return found


def change(architecture: str, name: str, heads: int, kv_heads: int) -> Callable[[Tensor], Tensor]:
    """What llama.cpp's converter does to the rows of a tensor, by its GGUF name."""
    if architecture == "llama" and ".attn_q." in name:
        return partial(_permute, heads=heads)
    if architecture == "llama" and ".attn_k." in name:
        return partial(_permute, heads=kv_heads)
    return lambda tensor: tensor


def _permute(tensor: Tensor, heads: int) -> Tensor:
    """tensor: (rows, ...). Rows of a head from two halves to pairs side by side. Source: `permute` in llama.cpp."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


# --- an adapter -----------------------------------------------------------------------------------------------------


def write_adapter(model: nn.Module, spec: ModelSpec, path: Path) -> int:
    """The model's adapter as a GGUF LoRA file in float32. Returns how many layers it has.

    Every layer's own scaling is in its B, so that llama.cpp's scale of 1 is ours. Raises AdapterError for what such a
    file cannot hold, ModelError for a family that is not known.
    """
    import gguf

    architecture, layers = architecture_of(spec), lora_layers(model)
    if token_rows(model):
        raise AdapterError(
            "the adapter has trained rows of single tokens, which a GGUF LoRA file cannot hold",
            "Merge it, and write the merged model",
        )
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors |= _factors(name, layer, architecture, spec)
    if not tensors:
        raise AdapterError("the model has no adapter to write", "Attach or load one first")

    def fill(file: Path) -> None:
        writer = gguf.GGUFWriter(file, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
        for key, tensor in tensors.items():
            writer.add_tensor(key, tensor.contiguous().numpy())
        _finish(writer)

    files.write_file_atomic(path, fill)
    return len(layers)


def _factors(name: str, layer: LoRALayer, architecture: str, spec: ModelSpec) -> dict[str, Tensor]:
    own = gguf_name(architecture, f"{name}.weight")
    if layer.variant_name != "lora" or own is None or layer.kind.feature_dim is None:
        what = f"is of variant {layer.variant_name}" if layer.variant_name != "lora" else "has no place in it"
        raise AdapterError(
            f"{name} {what}, so the adapter cannot be a GGUF LoRA file", "Merge it, and write the merged model"
        )
    A, B = (factor.detach().float().cpu() for factor in layer.factors())
    # llama.cpp multiplies with alpha / r, alpha being that of the file.
    B = B * (layer.scaling * layer.r / ALPHA)
    return {f"{own}.lora_a": A, f"{own}.lora_b": change(architecture, own, spec.heads, spec.kv_heads)(B)}


# --- a model --------------------------------------------------------------------------------------------------------


class Tensors(Protocol):
    """In which form each tensor is written."""

    file_type: int | None
    """llama.cpp's number for the whole; None for that of the file which was read."""

    def form(self, name: str, values: Callable[[], Array]) -> tuple[Array, str]:
        """The bytes or numbers to write, and the name of their type. values: (rows, width) or (width,) float32."""
        ...


class InOneType:
    """Matrices in the type asked for where their rows are whole blocks; vectors in float32.

    kind: one of TYPES or of the K types. layers: of the model. tied: whether its head is the embedding.
    """

    def __init__(self, kind: str, layers: int, tied: bool) -> None:
        self.kind, self.layers, self.tied = kind, layers, tied
        self.file_type: int | None = _file_type(kind)

    def form(self, name: str, values: Callable[[], Array]) -> tuple[Array, str]:
        """In that type."""
        numbers = values()
        own = self._type_of(name, numbers.shape)
        return k_quants.quantize(numbers, own) if own.endswith("_K") else quantized(numbers, own), own

    def _type_of(self, name: str, shape: tuple[int, ...]) -> str:
        """shape: (rows, width)."""
        if len(shape) < 2 or name in NOT_PARAMETERS:
            return "F32"
        if self.kind in ("f32", "f16", "bf16"):
            return self.kind.upper()
        if self.kind in k_quants.MIXES:
            outer = name == (EMBEDDING if self.tied else OUTPUT)
            own = k_quants.type_of(name, shape[-1], self.kind, self.layers, outer)
        else:
            own = "Q8_0" if name in OUTER and self.kind.startswith(("q4", "q5")) else self.kind.upper()
        return own if own.endswith("_K") or shape[-1] % 32 == 0 else "F16"


def write_like(
    state: Mapping[str, Tensor], spec: ModelSpec, path: Path, form: Tensors | str, tokenizer: Any | None = None
) -> dict[str, int]:
    """A model with the header of the GGUF file it was read from.

    state: parameters by transformers' names. form: of its tensors, or the type of its matrices. tokenizer: of the
    training, for what says how conversations are written; None leaves that as it is in the file. Returns how many
    tensors have each type. Raises ModelError where a tensor of the file has no parameter.
    """
    import gguf

    architecture_of(spec)
    read = gguf.GGUFReader(spec.path)
    architecture = str(read.fields["general.architecture"].contents())
    tensors = InOneType(form, spec.layers, spec.tied) if isinstance(form, str) else form
    counts: dict[str, int] = {}

    def fill(file: Path) -> None:
        writer = gguf.GGUFWriter(file, architecture)
        anew = ["general.architecture", *(() if tokenizer is None else CHAT_KEYS)]
        if tensors.file_type is not None:
            anew.append("general.file_type")
            writer.add_file_type(tensors.file_type)
        _copy_fields(read, writer, anew)
        if tokenizer is not None:
            write_chat(writer, tokenizer)
        for tensor in read.tensors:
            _add(writer, tensor.name, partial(_values, tensor, state, spec, architecture), tensors, counts)
        _finish(writer)

    files.write_file_atomic(path, fill)
    return counts


def write_model(
    model: Any,
    tokenizer: Any,
    spec: ModelSpec,
    path: Path,
    form: Tensors | str,
    licence: str | None = None,
    own_chat: bool = True,
) -> dict[str, int]:
    """A plain transformers model with its tokenizer. form: of its tensors, or the type of its matrices.

    Of a GGUF file that knows all tokens of the model the header is taken over, but for how conversations are written;
    own_chat: off, that too. licence: of the base, where it is known. Returns how many tensors have each type. Raises
    ModelError for what such a file cannot state.
    """
    import gguf

    if _header_fits(model, tokenizer, spec):
        return write_like(model.state_dict(), spec, path, form, tokenizer if own_chat else None)
    architecture, config = architecture_of(spec), model.config.get_text_config()
    tied, counts = is_tied(model), dict[str, int]()
    tensors = InOneType(form, spec.layers, tied) if isinstance(form, str) else form

    def fill(file: Path) -> None:
        writer = gguf.GGUFWriter(file, architecture)
        writer.add_name(Path(spec.name).name)
        if tensors.file_type is not None:
            writer.add_file_type(tensors.file_type)
        if licence:
            writer.add_license(licence)
        for name, more in write_header(writer, config, architecture, tokenizer).items():
            writer.add_tensor(name, more)
        for name, value in model.state_dict().items():
            own = gguf_name(architecture, name)
            if own == OUTPUT and tied:
                continue
            if own is None:
                raise ModelError(
                    f"{spec.name} has {name}, which has no name in a GGUF file", "Merge into a plain model"
                )
            _add(writer, own, partial(_converted, own, value, spec, architecture), tensors, counts)
        _finish(writer)

    files.write_file_atomic(path, fill)
    return counts


def check_header(model: Any, tokenizer: Any, spec: ModelSpec) -> None:
    """Raise ModelError, as `write_model` would, for a family or a tokenizer that cannot be stated. Writes nothing."""
    import gguf

    architecture = architecture_of(spec)
    if spec.kind != "gguf" or _new_tokens(spec, tokenizer):
        write_header(gguf.GGUFWriter(None, architecture), model.config.get_text_config(), architecture, tokenizer)


def is_tied(model: Any) -> bool:
    """Whether the output head is the embedding."""
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def _header_fits(model: Any, tokenizer: Any, spec: ModelSpec) -> bool:
    """Whether the model was read from a GGUF file whose header says what is to be said of it now."""
    rows = model.get_input_embeddings().weight.shape[0]
    same_size = spec.kind == "gguf" and spec.vocab == rows and len(tokenizer) <= rows
    return same_size and spec.tied == is_tied(model) and not _new_tokens(spec, tokenizer)


def _new_tokens(spec: ModelSpec, tokenizer: Any) -> bool:
    """Whether the tokenizer knows a token that its GGUF file does not name so."""
    known = gguf_header.read_header(spec.path).array("tokenizer.ggml.tokens")
    return any(
        number >= len(known) or known[number] != t.content for number, t in tokenizer.added_tokens_decoder.items()
    )


def _add(writer: Any, name: str, values: Callable[[], Array], tensors: Tensors, counts: dict[str, int]) -> None:
    """One tensor in the form that it is to have, counted."""
    import gguf

    data, own = tensors.form(name, values)
    counts[own] = counts.get(own, 0) + 1
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[own])


def quantized(values: Array, kind: str) -> Array:
    """Numbers in a type of llama.cpp's. Raises NotImplementedError for one that the package gguf does not write."""
    import gguf

    found: Array = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), gguf.GGMLQuantizationType[kind])
    return found


def _values(tensor: Any, state: Mapping[str, Tensor], spec: ModelSpec, architecture: str) -> Array:
    """The numbers of a tensor of the file, as they are now: (rows, width) or (width,) float32."""
    import gguf

    if tensor.name in NOT_PARAMETERS:
        kept: Array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return kept
    name = hf_name(architecture, tensor.name)
    if name is None or name not in state:
        raise ModelError(f"{spec.path} has {tensor.name}, and the model has no {name}", "Merge into a plain model")
    return _converted(tensor.name, state[name], spec, architecture)


def _converted(name: str, value: Tensor, spec: ModelSpec, architecture: str) -> Array:
    """A parameter as llama.cpp wants it under this name, in float32."""
    value = value.detach().float().cpu()
    if architecture == "gemma3" and name.endswith("norm.weight"):
        value = value + 1
    changed: Array = change(architecture, name, spec.heads, spec.kv_heads)(value).contiguous().numpy()
    return changed


def _copy_fields(read: Any, writer: Any, anew: Collection[str]) -> None:
    """The header of a file, but for what is said anew."""
    for name, field in read.fields.items():
        if not name.startswith("GGUF.") and name not in anew:
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)


def _file_type(kind: str) -> int:
    import gguf

    return int(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
