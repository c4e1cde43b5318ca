"""What a model's parameters are, and how many of them each method trains: arithmetic on shapes, without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from lorafit.config import METHOD_VARIANTS, MethodConfig
from lorafit.lora.blocks import wanted_blocks
from lorafit.model.spec import OUTPUT_WEIGHTS, ModelSpec
from lorafit.model.sublayers import ATTENTION_ENDS, FUSED, KEYS_AND_VALUES, MLP_ENDS, SEPARATE, is_one_of

PARTS = ("embeddings", "attention", "mlp", "norms", "head", "other")
# By the first of these that a parameter's name holds; `\b` does not part words at an underscore.
PART_NAMES = (
    ("norms", re.compile(r"norm|(?:^|\.)ln_|layer_norm|LayerNorm", re.IGNORECASE)),
    ("head", re.compile(r"^(?:lm_head|embed_out|output|score|classifier|cls)\.")),
    ("embeddings", re.compile(r"embed|wte|wpe|token_embd")),
    ("attention", re.compile(r"attn|attention|[qkvo]_proj|query|key|value")),
    ("mlp", re.compile(r"mlp|ffn|experts|fc|dense|intermediate|output|feed_forward")),
)
BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
BYTES_FP32 = 4
# What reads hidden states: an output head, or what encoders have there.
BEHIND = re.compile(r"(?:^|\.)(?:pooler|cls|lm_head|embed_out|classifier|score|vocab_\w+)\.|^output\.")


def by_part(spec: ModelSpec) -> dict[str, int]:
    """Parameters of each of PARTS; a head that is tied to the embeddings is counted with them, once."""
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in spec.tensors.items():
        if not (spec.tied and name in OUTPUT_WEIGHTS):
            counts[part_of(name)] += prod(shape)
    return counts


@cache
def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return next((part for part, pattern in PART_NAMES if pattern.search(name)), "other")


@cache
def block_of(name: str) -> int | None:
    """The number of the block that a parameter lies in."""
    found = BLOCK.search(name)
    return int(found[1]) if found else None


def block_weights(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the two-dimensional weights of the blocks, as they are stored: what LoRA adapts by default."""
    return {
        name: (shape[0], shape[1])
        for name, shape in spec.tensors.items()
        if len(shape) == 2 and block_of(name) is not None and part_of(name) in ("attention", "mlp", "other")
    }


def chosen_blocks(spec: ModelSpec, layers: str | None) -> set[int]:
    """The numbers of the blocks that --layers names, all without. Raises TargetError for what is out of range."""
    count = spec.layers or 1 + max((block_of(name) or 0 for name in spec.tensors), default=0)
    return set(range(count)) if layers is None else wanted_blocks(layers, count, count)


def within(spec: ModelSpec, layers: str | None) -> ModelSpec:
    """The model as if it had the blocks alone that --layers names, and nothing beside them; itself without."""
    if layers is None:
        return spec
    chosen = chosen_blocks(spec, layers)
    own = {name: shape for name, shape in spec.tensors.items() if block_of(name) in chosen}
    return replace(spec, tensors=own, parameters=sum(map(prod, own.values())))


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


def frozen_a_params(spec: ModelSpec, r: int) -> int:
    """B alone: r out. Source: Zhang et al. 2023, LoRA-FA, section 3.1."""
    return sum(r * out for out, _ in matrices(spec).values())


def vera_params(spec: ModelSpec, r: int) -> int:
    """Two vectors: r + out. Source: Kopiczko et al. 2024, VeRA, section 3.2."""
    return sum(r + out for out, _ in matrices(spec).values())


# Variant -> its count at a rank; the names are those of the registry of variants.
VARIANT_PARAMS: dict[str, Callable[[ModelSpec, int], int]] = {
    "lora": lora_params,
    "dora": dora_params,
    "lora-fa": frozen_a_params,
    "vera": vera_params,
}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LABELS = 2
COMPACTER_PARTS = 4


def ends(spec: ModelSpec, usual: Sequence[str]) -> list[tuple[int, int]]:
    """(out, in) of the linear layers of these names."""
    return [shape for name, shape in matrices(spec).items() if is_one_of(name.removesuffix(".weight"), usual)]


def adapter_params(spec: ModelSpec, width: int, variant: str) -> int:
    """Bottlenecks of `width` behind sublayers: 2 d m + m + d each. Source: Houlsby et al. 2019, section 2.1.

    Compacter's have 2 (d + m) for their products' factors, and n^3 twice for all. Source: Karimi Mahabadi et al. 2021,
    section 4.2.
    """
    places = [*ATTENTION_ENDS, *MLP_ENDS] if variant in ("houlsby", "compacter") else MLP_ENDS
    each = [out for out, _ in ends(spec, places)]
    if variant == "compacter":
        return sum(3 * (d + width) for d in each) + 2 * COMPACTER_PARTS**3
    return sum(2 * d * width + width + d for d in each)


def prefix_params(spec: ModelSpec, tokens: int, variant: str) -> int:
    """Keys and values of so many tokens in every layer. Source: Li and Liang 2021, sections 4.2 and 4.3."""
    separate = [out for out, _ in ends(spec, SEPARATE)]
    widths = separate or [2 * spec.kv_heads * spec.head_dim] * len(ends(spec, FUSED))
    if variant == "p-tuning-v2":
        return tokens * sum(widths)
    network = tokens * spec.hidden + spec.hidden * (spec.hidden + 1)
    return network + sum(width * (spec.hidden + 1) for width in widths)


def ia3_params(spec: ModelSpec) -> int:
    """A factor for each key, value and intermediate activation. Source: Liu et al. 2022, (IA)3, section 3.3."""
    return sum(out for out, _ in ends(spec, KEYS_AND_VALUES)) + sum(into for _, into in ends(spec, MLP_ENDS))


def bitfit_params(spec: ModelSpec) -> int:
    """The biases there are; in a model without, one for every output. Source: Ben Zaken et al. 2022, section 3."""
    linear = {name.removesuffix("weight") for name in block_weights(spec)}
    norms = {name.removesuffix("weight") for name, shape in spec.tensors.items() if len(shape) == 1}
    own = [
        shape[0]
        for name, shape in spec.tensors.items()
        if name.removesuffix("bias") in linear | norms and name.endswith("bias")
    ]
    return sum(own) or sum(out for out, _ in matrices(spec).values())


def head_params(spec: ModelSpec, labels: int, has_bias: bool = True) -> int:
    """A row of weights and perhaps a bias for each label."""
    return labels * (spec.hidden + has_bias)


def body_params(spec: ModelSpec) -> int:
    """What gives hidden states: all but an output head of its own, and what encoders have behind theirs."""
    own = {name: shape for name, shape in spec.tensors.items() if not BEHIND.search(name)}
    return sum(map(prod, own.values()))


def method_params(spec: ModelSpec, config: MethodConfig, labels: int = 0, has_bias: bool = True) -> int:
    """What a method trains with these settings, on its usual layers in the blocks of --layers.

    labels: of a head beside it. has_bias: whether that has one.
    """
    if config.layers is not None:
        own = method_params(within(spec, config.layers), config.model_copy(update={"layers": None}))
        return own + head_params(spec, labels, has_bias) if labels else own
    if labels:
        own = body_params(spec) if config.method == "full" else method_params(spec, config)
        return own + head_params(spec, labels, has_bias)
    counts: dict[str, Callable[[], int]] = {
        "lora": lambda: VARIANT_PARAMS[config.variant](spec, config.r),
        "adapter": lambda: adapter_params(spec, config.bottleneck, config.variant),
        "prefix": lambda: prefix_params(spec, config.virtual_tokens, config.variant),
        "prompt": lambda: config.virtual_tokens * spec.hidden,
        "ia3": lambda: ia3_params(spec),
        "bitfit": lambda: bitfit_params(spec),
        "full": lambda: spec.parameters,
        "head": lambda: 0,
    }
    return counts[config.method]()


def _others(spec: ModelSpec, labels: int) -> list[Trainable]:
    """Methods beside LoRA, at their default widths, and a head of so many labels."""
    found = [
        Trainable(f"head, {labels} labels", count := head_params(spec, labels), BYTES_FP32 * count,
                  remark="for rows with text and label")
    ]  # fmt: skip
    for method, variants in METHOD_VARIANTS.items():
        for variant in variants if method not in ("lora", "full", "head") else ():
            config = MethodConfig(method=method, variant=variant)
            count = method_params(spec, config)
            saved = BYTES_FP32 * method_params(spec, MethodConfig(method=method))  # a network is dropped at the end
            file = saved if method == "prefix" else BYTES_FP32 * count
            found.append(Trainable(_name(method, variant), count, file, why_not(spec, config)))
    return found


def why_not(spec: ModelSpec, config: MethodConfig) -> str | None:
    """Why the model cannot be trained so: an encoder, or a rank that layers cannot hold."""
    small = [min(shape) for shape in block_weights(spec).values() if config.method == "lora" and min(shape) < config.r]
    if small:
        return f"{len(small)} of its layers hold a rank of at most {min(small)}"
    if not spec.writes_text and config.method in ("prefix", "prompt"):
        return "an encoder would read its tokens as part of the row"
    if not spec.writes_text and config.variant == "parallel" and not any(".mlp." in name for name in spec.tensors):
        return "no module is the whole MLP"
    return None


def _name(method: str, variant: str) -> str:
    own = "" if variant == method else f" ({variant})"
    width = {"adapter": f", width {MethodConfig().bottleneck}"}
    tokens = f" of {MethodConfig().virtual_tokens} tokens" if method in ("prefix", "prompt") else ""
    return f"{method}{own}{width.get(method, '')}{tokens}"


def trainable(spec: ModelSpec, labels: int = LABELS) -> list[Trainable]:
    """Every method that can be counted, with LoRA at each of RANKS. labels: that a head alone would tell apart."""
    found = [Trainable("full", spec.parameters, None), *_others(spec, labels)]
    for variant in VARIANT_PARAMS:
        found += [_lora_row(spec, variant, r) for r in RANKS]
    return found


def _lora_row(spec: ModelSpec, variant: str, r: int) -> Trainable:
    name, reason = f"{variant}, r = {r}", why_not(spec, MethodConfig(variant=variant, r=r))
    if reason:
        return Trainable(name, 0, 0, reason)
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
