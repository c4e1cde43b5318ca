"""What a model's parameters are, and how many of them each method trains: arithmetic on shapes, without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from lorafit.model.spec import OUTPUT_WEIGHTS, ModelSpec

PARTS = ("embeddings", "attention", "mlp", "norms", "head", "other")
# By the first of these that a parameter's name holds; `\b` does not part words at an underscore.
PART_NAMES = (
    ("norms", re.compile(r"norm|(?:^|\.)ln_|layer_norm|LayerNorm", re.IGNORECASE)),
    ("head", re.compile(r"^(?:lm_head|embed_out|output|score|classifier|cls)\.")),
    ("embeddings", re.compile(r"embed|wte|wpe|token_embd")),
    ("attention", re.compile(r"attn|attention|[qkvo]_proj|query|key|value")),
    ("mlp", re.compile(r"mlp|ffn|experts|fc|dense|intermediate|output|feed_forward")),
)
BLOCK = re.compile(r"(?:^|\.)\d+\.")
BYTES_FP32 = 4


def by_part(spec: ModelSpec) -> dict[str, int]:
    """Parameters of each of PARTS; a head that is tied to the embeddings is counted with them, once."""
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in spec.tensors.items():
        if not (spec.tied and name in OUTPUT_WEIGHTS):
            counts[part_of(name)] += prod(shape)
    return counts


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return next((part for part, pattern in PART_NAMES if pattern.search(name)), "other")


def block_weights(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the two-dimensional weights of the blocks, as they are stored: what LoRA adapts by default."""
    return {
        name: (shape[0], shape[1])
        for name, shape in spec.tensors.items()
        if len(shape) == 2 and BLOCK.search(name) and part_of(name) in ("attention", "mlp", "other")
    }


# --- what each method trains ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainable:
    """How many parameters a method trains. file_bytes: of what is saved, None where that is a whole model.

    impossible: why the model cannot be trained so, where that is so. remark: what else is to be known.
    """

    method: str
    params: int
    file_bytes: int | None
    impossible: str | None = None
    remark: str | None = None


def lora_params(spec: ModelSpec, r: int) -> int:
    """A and B of every adapted weight: r (in + out). Source: Hu et al. 2021, eq. 3."""
    return sum(r * (rows + columns) for rows, columns in block_weights(spec).values())


def dora_params(spec: ModelSpec, r: int) -> int:
    """LoRA's, and a length for each output. Source: Liu et al. 2024, DoRA, eq. 5."""
    return lora_params(spec, r) + sum(out for out, _ in matrices(spec).values())


# Variant -> its count at a rank; the names are those of the registry of variants.
VARIANT_PARAMS: dict[str, Callable[[ModelSpec, int], int]] = {"lora": lora_params, "dora": dora_params}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


BOTTLENECK, PREFIX_TOKENS, CLASSES = 64, 20, 2


def adapter_params(spec: ModelSpec, width: int, per_block: int) -> int:
    """Bottlenecks behind sublayers: 2 d m + m + d each. Source: Houlsby et al. 2019, section 2.1: two a block.

    Pfeiffer et al. 2021 (AdapterFusion) have one, behind the MLP.
    """
    return spec.layers * per_block * (2 * spec.hidden * width + width + spec.hidden)


def prefix_params(spec: ModelSpec, tokens: int) -> int:
    """Keys and values of so many tokens in every layer. Source: Li and Liang 2021, section 4.2."""
    return spec.layers * 2 * tokens * spec.kv_heads * spec.head_dim


def ia3_params(spec: ModelSpec) -> int:
    """A factor for each key, value and intermediate activation. Source: Liu et al. 2022, (IA)3, section 3.3."""
    return spec.layers * (2 * spec.kv_heads * spec.head_dim + spec.intermediate)


def _others(spec: ModelSpec) -> list[Trainable]:
    """Methods beside LoRA that are counted, to be compared; their files are the numbers alone."""
    counts = {
        f"head, {CLASSES} classes": CLASSES * (spec.hidden + 1),
        f"adapter (Houlsby), width {BOTTLENECK}": adapter_params(spec, BOTTLENECK, per_block=2),
        f"adapter (Pfeiffer), width {BOTTLENECK}": adapter_params(spec, BOTTLENECK, per_block=1),
        f"prefix of {PREFIX_TOKENS} tokens": prefix_params(spec, PREFIX_TOKENS),
        f"prompt of {PREFIX_TOKENS} tokens": PREFIX_TOKENS * spec.hidden,
        "(IA)3": ia3_params(spec),
    }
    return [
        Trainable(name, count, BYTES_FP32 * count, remark="to compare: not trained here yet")
        for name, count in counts.items()
    ]


def trainable(spec: ModelSpec) -> list[Trainable]:
    """Every method that can be counted, with LoRA at each of RANKS."""
    found = [Trainable("full", spec.parameters, None), *_others(spec)]
    for variant in VARIANT_PARAMS:
        found += [_lora_row(spec, variant, r) for r in RANKS]
    return found


def _lora_row(spec: ModelSpec, variant: str, r: int) -> Trainable:
    small = {name: min(shape) for name, shape in block_weights(spec).items() if min(shape) < r}
    name = f"{variant}, r = {r}"
    if small:
        least = min(small.values())
        return Trainable(name, 0, 0, f"{len(small)} of its layers hold a rank of at most {least}")
    return Trainable(name, VARIANT_PARAMS[variant](spec, r), adapter_file_bytes(spec, variant, r))


def matrices(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(out, in) of each of `block_weights`; GPT-2 stores its own the other way round."""
    weights = block_weights(spec)
    if spec.architecture != "gpt2":
        return weights
    return {name: (columns, rows) for name, (rows, columns) in weights.items()}


def adapter_file_bytes(spec: ModelSpec, variant: str, r: int) -> int:
    """Bytes of adapter_model.safetensors: eight of length, a table in JSON that is filled up to eight, the numbers."""
    tensors: dict[str, tuple[int, ...]] = {}
    for name, (out, into) in matrices(spec).items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{key}.lora_A.weight": (r, into), f"{key}.lora_B.weight": (out, r)}
        if variant == "dora":
            tensors[f"{key}.lora_magnitude_vector"] = (out,)
    return 8 + -(-len(_table(tensors)) // 8) * 8 + BYTES_FP32 * sum(map(prod, tensors.values()))


def _table(tensors: Mapping[str, tuple[int, ...]]) -> str:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + BYTES_FP32 * prod(tensors[name])
        table[name] = {"dtype": "F32", "shape": list(tensors[name]), "data_offsets": [begin, end]}
    return json.dumps(table, separators=(",", ":"))
