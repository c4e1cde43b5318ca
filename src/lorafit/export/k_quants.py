"""llama.cpp's K types: blocks of 256 numbers, several bits wide, chosen tensor by tensor.

The package gguf reads them and does not write them. Blocks are made by ggml's own `ggml_quantize_chunk`, out of the
library inside the wheel xllamacpp; which tensor gets which type follows llama.cpp's quantizer (src/llama-quant.cpp,
`llama_tensor_get_type`) for models without experts and without an importance matrix.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from lorafit.errors import ConfigError

MIXES = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K"}  # --type -> of most matrices; some are Q6_K
BETTER = "Q6_K"
WITHOUT_WHOLE_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where rows are no multiple of 256
BLOCK = 256
SENSITIVE = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")
CHUNK_ROWS = 1024


def check(kind: str) -> None:
    """Raise ConfigError for a K type where nothing that writes it is installed."""
    if kind in MIXES:
        _library()


def type_of(name: str, width: int, kind: str, layers: int, is_head: bool) -> str:
    """GGUF's name of the type of a matrix. width: of its rows. is_head: whether logits are made with it."""
    own = MIXES[kind]
    found = SENSITIVE.fullmatch(name)
    if is_head or (found and _has_more_bits(int(found[1]), layers)):
        own = BETTER
    return own if width % BLOCK == 0 else WITHOUT_WHOLE_BLOCKS[own]


def _has_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between. Source: llama.cpp's `use_more_bits`."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def quantize(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """values: (rows, width) float32. name: of a K type. Returns (rows, bytes of a row) uint8."""
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    source = np.ascontiguousarray(values, np.float32)
    rows, width = source.shape
    target = np.empty((rows, width // block * block_bytes), np.uint8)
    library = _library()

    def fill(first: int) -> None:
        count = min(CHUNK_ROWS, rows - first)
        library.ggml_quantize_chunk(
            int(kind), source[first:].ctypes.data, target[first:].ctypes.data, 0, count, width, None
        )

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # the call lets go of Python's lock
        list(threads.map(fill, range(0, rows, CHUNK_ROWS)))
    return target


@cache
def _library() -> Any:
    found = importlib.util.find_spec("xllamacpp")
    try:
        import xllamacpp.xllamacpp as extension

        library = ctypes.CDLL(extension.__file__)
        function = library.ggml_quantize_chunk
    except (ImportError, OSError, AttributeError) as error:
        what = f"and xllamacpp here has none ({error})" if found else "and xllamacpp is not installed"
        raise ConfigError(
            f"K types are written by ggml's library, {what}",
            "Install it: pip install 'lorafit[llamacpp]'. Or write --type f16, and then `llama-quantize F16.gguf "
            "OUT.gguf Q4_K_M` with llama.cpp",
        ) from None
    function.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return library
