"""GGUF files for llama.cpp: an adapter to be laid over a model, and a merged model in one of several types.

Names, the order of query and key rows, and what else llama.cpp's converter changes are those of `model/gguf_names.py`
and `model/gguf_tensors.py`, the other way round. The package gguf writes the file and quantizes the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lorafit import files
from lorafit.errors import AdapterError, ModelError, listed
from lorafit.lora.inject import lora_layers
from lorafit.lora.layer import LoRALayer
from lorafit.model.gguf_names import NOT_PARAMETERS, gguf_name, hf_name
from lorafit.model.spec import ModelSpec

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
OUTER = ("token_embd.weight", "output.weight")
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


def write_like(state: Mapping[str, Tensor], spec: ModelSpec, path: Path, kind: str) -> dict[str, int]:
    """A model with the header of the GGUF file it was read from, its matrices in another type, norms in float32.

    state: parameters by transformers' names. kind: one of TYPES. Returns how many tensors have each type. Raises
    ModelError where a tensor of the file has no parameter.
    """
    import gguf

    architecture_of(spec)
    if spec.kind != "gguf":
        raise ModelError(
            f"{spec.name} is no GGUF file, whose header a merged model takes over",
            "Export --what adapter, or merge it and convert the result with llama.cpp",
        )
    read = gguf.GGUFReader(spec.path)
    _check_vocabulary(read, state)
    architecture = str(read.fields["general.architecture"].contents())
    counts: dict[str, int] = {}

    def fill(file: Path) -> None:
        writer = gguf.GGUFWriter(file, architecture)
        _copy_fields(read, writer, kind)
        for tensor in read.tensors:
            values, own = _values(tensor, state, spec, architecture), _type_of(tensor.name, tensor.shape, kind)
            wanted = gguf.GGMLQuantizationType[own]
            counts[own] = counts.get(own, 0) + 1
            if own == "F32":
                writer.add_tensor(tensor.name, values.astype(np.float32))
            else:
                writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
        _finish(writer)

    files.write_file_atomic(path, fill)
    return counts


def _check_vocabulary(read: Any, state: Mapping[str, Tensor]) -> None:
    """Raise ModelError where the model knows tokens that the file's tokenizer does not."""
    known, rows = len(read.fields["tokenizer.ggml.tokens"].data), len(state["model.embed_tokens.weight"])
    if known != rows:
        raise ModelError(
            f"the model has {rows:,} tokens and the tokenizer of its GGUF file {known:,}",
            "Merge it into a plain model: added tokens are not written to a GGUF header here",
        )


def _values(tensor: Any, state: Mapping[str, Tensor], spec: ModelSpec, architecture: str) -> np.ndarray[Any, Any]:
    """The numbers of a tensor of the file, as they are now: (rows, width) or (width,) float32."""
    import gguf

    if tensor.name in NOT_PARAMETERS:
        kept: np.ndarray[Any, Any] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return kept
    name = hf_name(architecture, tensor.name)
    if name is None or name not in state:
        raise ModelError(f"{spec.path} has {tensor.name}, and the model has no {name}", "Merge into a plain model")
    value = state[name].detach().float().cpu()
    if architecture == "gemma3" and tensor.name.endswith("norm.weight"):
        value = value + 1
    return change(architecture, tensor.name, spec.heads, spec.kv_heads)(value).contiguous().numpy()


def _type_of(name: str, shape: Any, kind: str) -> str:
    """Matrices in the type asked for where their rows are whole blocks; vectors in float32. shape: width first."""
    if len(shape) < 2:
        return "F32"
    if kind in ("f32", "f16", "bf16"):
        return kind.upper()
    own = "Q8_0" if name in OUTER and kind.startswith(("q4", "q5")) else kind.upper()
    return own if int(shape[0]) % 32 == 0 else "F16"


def _copy_fields(read: Any, writer: Any, kind: str) -> None:
    import gguf

    for name, field in read.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    names = {"f32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[names.get(kind, f"MOSTLY_{kind.upper()}")])


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
