"""How large a model is in each type that weights are stored in: bits per weight, tensor by tensor.

GGUF types: blocks and their bytes from the package gguf; which tensor gets which type as llama.cpp's quantize chooses
(`llama_tensor_get_type` in src/llama-quant.cpp), which is not the same for all of a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lorafit.model.spec import OUTPUT_WEIGHTS, ModelSpec
from lorafit.plan.counts import block_weights, part_of

SUPERBLOCK = 256
# Where a row is no multiple of 256 numbers, a K type gives way to one of blocks of 32.
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
GGUF_FILES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0")
# Types whose blocks can stay as they are while the model is trained: those of `quant.codecs`, which needs torch.
BLOCK_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
NF4_BLOCK, NF4_GROUP = 64, 256  # weights that share an 8-bit scale, scales that share a float32
PLAIN = {"fp32": 32, "bf16": 16, "fp16": 16}
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Size:
    """A model in one type of storage. bits: per parameter, over all of them."""

    name: str
    nbytes: int
    bits: float


def sizes(spec: ModelSpec) -> list[Size]:
    """The model in every type: those of torch, those of bitsandbytes, those of GGUF files."""
    names = [*PLAIN, "int8", "nf4", *(f"GGUF {name}" for name in GGUF_FILES)]
    return [Size(name, size := model_bytes(spec, name), 8 * size / spec.parameters) for name in names]


def model_bytes(spec: ModelSpec, name: str) -> int:
    """Bytes of all weights, a tied head once. name: `fp32`, `bf16`, `fp16`, `int8`, `nf4` or `GGUF Q4_K_M`."""
    bytes_of = _gguf(spec, name.removeprefix("GGUF ")) if name.startswith("GGUF ") else _torch(spec, name)
    tensors = spec.tensors.items()
    return sum(bytes_of(key, shape) for key, shape in tensors if not (spec.tied and key in OUTPUT_WEIGHTS))


def _torch(spec: ModelSpec, name: str) -> Callable[[str, tuple[int, ...]], int]:
    """int8 and nf4 as bitsandbytes stores them: linear layers of the blocks, all else in 16 bits."""
    linear = block_weights(spec)

    def size(key: str, shape: tuple[int, ...]) -> int:
        count = prod(shape)
        if name in PLAIN:
            return count * PLAIN[name] // 8
        if key not in linear:
            return 2 * count
        if name == "int8":  # and a float32 for each row. Source: Dettmers et al. 2022, LLM.int8()
            return count + 4 * shape[0]
        blocks = -(-count // NF4_BLOCK)  # Source: Dettmers et al. 2023, QLoRA, section 3: double quantization
        return -(-count // 2) + blocks + 4 * -(-blocks // NF4_GROUP)

    return size


def _gguf(spec: ModelSpec, file_type: str) -> Callable[[str, tuple[int, ...]], int]:
    def size(key: str, shape: tuple[int, ...]) -> int:
        block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[gguf_type(spec, file_type, key, shape)]]
        return prod(shape) // block * nbytes

    return size


def gguf_type(spec: ModelSpec, file_type: str, name: str, shape: tuple[int, ...]) -> str:
    """The type of one tensor in a file of `file_type`."""
    if len(shape) < 2 or part_of(name) == "norms":
        return "F32"
    if file_type in ("F16", "F32", "BF16"):
        return file_type
    wanted = file_type.removesuffix("_M")
    is_output = name in OUTPUT_WEIGHTS or (spec.tied and part_of(name) == "embeddings")
    if (is_output and wanted != "Q8_0") or (file_type.endswith("_K_M") and _gets_more_bits(spec, name)):
        wanted = "Q6_K"
    if wanted.endswith("_K") and shape[-1] % SUPERBLOCK:
        wanted = FALLBACKS[wanted]
    return wanted if shape[-1] % 32 == 0 else "F16"


def _gets_more_bits(spec: ModelSpec, name: str) -> bool:
    """attn_v and ffn_down of the first and last eighth of the layers, and of every third between."""
    found = LAYER.search(name)
    if found is None or not re.search(r"v_proj|attn_v|down_proj|ffn_down", name):
        return False
    layer, eighth = int(found[1]), spec.layers // 8
    return layer < eighth or layer >= 7 * spec.layers // 8 or (layer - eighth) % 3 == 2
