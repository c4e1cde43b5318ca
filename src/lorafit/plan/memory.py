"""An estimate of a run's peak memory, in parts, from shapes alone.

Counted: the runtime, frozen weights with what is packed for products, the adapter with its gradients and moments,
activations kept for the backward pass, a chunk of logits, and what a layer works in. The figures are those of a decoder
with gated MLPs run by the engine: attention keeps no scores, and what a norm or an activation gives is computed again
(engine/elementwise.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.model.spec import ModelSpec
from lorafit.plan.counts import block_weights
from lorafit.plan.storage import model_bytes
from lorafit.plan.trained import Trained
from lorafit.units import MIB, bytes_of, format_bytes

# Python, torch, transformers and their libraries, mapped, with a tokenizer: measured with VmHWM.
RUNTIME_BYTES = 450 * MIB
# In float32: value, gradient and two moments. In fp32 the activations' memory lies on the heap and is given to
# gradients too: measured.
ADAPTER_COPIES = {"fp32": 3.5, "bf16": 4.0}
# Of a frozen layer's weight, by precision: packed both ways round, or as stored.
BYTES_PER_WEIGHT = {"fp32": 8, "bf16": 2, "fp16": 2, "int8": 2}
LOGIT_ROWS = 256
# Rows of the output head that are decoded together, where it stays in blocks.
DECODED_TOKENS = 8192
# Of the rows on which int8 is measured, before the first step.
CALIBRATION_TOKENS = 128
# In float32, of own weights that are trained: gradient and two moments.
OWNED_COPIES = 3
# Of a head that is trained or adapted: logits, what softmax makes of them, and their gradient.
TRAINED_LOGITS = 3
# Of each row, beside what is in its arrays, while those are in memory: what reading it leaves on the heap; and of rows
# whose arrays are mapped files: what is known of the record, and its place in two epochs. Measured with four sets of
# 1,000 and 10,000 rows (230 to 310 bytes) and one of 100,000.
ROW_BYTES, MAPPED_ROW_BYTES = 300, 75
# Of each row, in the arrays: where its tokens end, how many there are of each kind, and where it came from.
FACTS_BYTES = 60
TOKEN_BYTES = 4
# Tokens of files from 8 MB on are on disk: about so many.
MOST_IN_MEMORY = 2 << 20
# What a layer works in while it is computed, measured against what is kept; kernels' code and buffers.
WORK = {"fp32": 0.26, "bf16": 0.13}
KERNEL_BYTES = 30 * MIB
# What is predicted must stay below this share of the limit: the prediction is a few percent off.
MARGIN = 0.95
# Below this many tokens a forward pass spends more on moving weights than on multiplying them.
LEAST_MICRO_TOKENS = 256


@dataclass(frozen=True)
class Split:
    """How a step is computed. micro_tokens: of one forward pass, at most. recompute: only layers' inputs are kept."""

    micro_tokens: int
    recompute: bool


def splits(micro_tokens: int) -> list[Split]:
    """The fastest first: smaller micro-batches, and only then recomputation, which costs a third of the step."""
    sizes = [micro_tokens]
    while sizes[-1] // 2 >= LEAST_MICRO_TOKENS:
        sizes.append(sizes[-1] // 2)
    return [Split(size, recompute) for recompute in (False, True) for size in sizes]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak, by part; `peak_bytes` is their sum."""

    parts: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def fits(self, limit: int) -> bool:
        """Whether the peak stays below `limit` bytes, with a margin for what the prediction is off by."""
        return self.peak_bytes <= MARGIN * limit

    def describe(self) -> str:
        """One line: the peak and its parts."""
        parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in self.parts.items() if count)
        return f"{format_bytes(self.peak_bytes)} ({parts})"


def estimate(
    spec: ModelSpec,
    trained: Trained,
    precision: str,
    tokens: int,
    supervised: int,
    recompute: bool,
    storage: str = "auto",
    data: int = 0,
) -> MemoryEstimate:
    """The peak of training with `tokens` in the largest micro-batch, `supervised` of them in the loss.

    precision: fp32, bf16 or int8. recompute: whether layers keep their input alone. storage: that of frozen weights:
    auto as they are computed with, keep as in the GGUF file, nf4, int8. data: bytes of the rows, see `data_bytes`.
    """
    dtype = "fp32" if precision == "fp32" else "bf16"
    activations = activation_bytes(spec, trained.per_token, dtype, tokens, recompute, trained.depth)
    if trained.runs_once:
        activations = 3 * activations // (spec.layers + 2)  # of the layers that are being computed: none is kept
    layer_weights = trained.frozen
    weights = layer_weights * BYTES_PER_WEIGHT[precision] + bytes_of(spec.parameters - layer_weights, dtype)
    if precision == "fp32":  # the second copy is packed when a gradient asks for it
        weights -= bytes_of(trained.unreached, dtype)
    if storage != "auto":
        weights = _stored_bytes(spec, storage, dtype)
    # In 16 bits the activations' memory is kept for the next step, and only workspace is free by then.
    free = round(((1 if dtype == "fp32" else 0) + WORK[dtype]) * activations) + KERNEL_BYTES
    adapter = _adapter_bytes(trained, dtype, free)
    if precision == "int8":
        # While it is calibrated the weights that it is made from are there, beside one of its two copies.
        few = activation_bytes(spec, trained.per_token, dtype, tokens, True, trained.depth)  # a row is never cut
        made = bytes_of(2 * trained.params, "fp32")
        before = layer_weights + made + round((1 + WORK[dtype]) * few)
        weights += max(0, before - adapter - round((1 + WORK[dtype]) * activations))
    own_head = bool(trained.labels or (trained.owned and not trained.frozen))
    logits = min(supervised, LOGIT_ROWS) * (trained.labels or spec.vocab) * (TRAINED_LOGITS if own_head else 1)
    return MemoryEstimate(
        {
            "runtime": RUNTIME_BYTES,
            "weights": weights,
            "adapter": adapter,
            "activations": activations,
            "logits": bytes_of(logits, dtype),
            "data": data,
            "evaluation": _evaluation_bytes(spec, trained, supervised, dtype) if trained.evaluated else 0,
            "workspace": round(WORK[dtype] * activations) + KERNEL_BYTES,
        }
    )


def _adapter_bytes(trained: Trained, dtype: str, free: int) -> int:
    """Its numbers with all that belongs to them while it is trained.

    free: what the backward pass has left when the first step keeps the values before it.
    """
    if trained.owned:
        copy = bytes_of(trained.owned, "fp32")
        return OWNED_COPIES * copy + max(0, copy - free)
    copy = bytes_of(trained.params, "fp32")
    copies = round(ADAPTER_COPIES[dtype] * copy) + bytes_of(trained.kept, "fp32")
    return copies if dtype == "fp32" else copies + max(0, copy - free) + trained.packed_bytes


def _evaluation_bytes(spec: ModelSpec, trained: Trained, supervised: int, dtype: str) -> int:
    """What was trained as it was at the best evaluation, and a whole chunk of logits where training has fewer."""
    more = max(0, LOGIT_ROWS - supervised) * (trained.labels or spec.vocab)
    return bytes_of(trained.params, "fp32") + bytes_of(more, dtype)


def data_bytes(rows: int, resident: int) -> int:
    """What training rows take in memory. resident: of their arrays, 0 where those are mapped files."""
    return rows * (ROW_BYTES if resident else MAPPED_ROW_BYTES) + resident


def resident_bytes(rows: int, tokens: int) -> int:
    """Of the arrays of so many rows, before they are there: those of many tokens are kept on disk and mapped."""
    return TOKEN_BYTES * tokens + FACTS_BYTES * rows if tokens <= MOST_IN_MEMORY else 0


def _stored_bytes(spec: ModelSpec, storage: str, dtype: str) -> int:
    """What is stored, and the weights of one layer, decoded: each group of linear layers has its place.

    A file that is kept is mapped as a whole; its head is decoded a part at a time. Else all but linear layers is as it
    is computed with.
    """
    layer_weights = sum(a * b for a, b in block_weights(spec).values())
    decoded = layer_weights // max(1, spec.layers)
    if storage == "keep":
        return spec.weight_bytes + bytes_of(decoded + min(DECODED_TOKENS, spec.vocab) * spec.hidden, dtype)
    linear = model_bytes(spec, storage) - bytes_of(spec.parameters - layer_weights, "bf16")
    return linear + bytes_of(spec.parameters - layer_weights + decoded, dtype)


def reserved_bytes(spec: ModelSpec, trained: Trained, precision: str) -> int:
    """What is sure to be needed beside the weights: while int8 is measured, its copies and the activations of that."""
    if precision != "int8":
        return 0
    copies = sum(a * b for a, b in block_weights(spec).values())
    few = activation_bytes(spec, trained.per_token, "bf16", CALIBRATION_TOKENS, True, trained.depth)
    return copies + round((1 + WORK["bf16"]) * few)


def activation_bytes(spec: ModelSpec, more: int, dtype: str, tokens: int, recompute: bool, depth: int) -> int:
    """What one micro-batch keeps for its backward pass, in so many layers (`depth`).

    Per token and layer: the inputs of two norms, rotated q and k, v, the attention's output, gate and up, `more`
    numbers of what is trained beside them, and a float32 for each head's sum and each norm. Two more layers' worth
    while one is differentiated.
    """
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    wide = 2 * spec.hidden + 2 * q + 2 * kv + 2 * spec.intermediate + more
    layer = bytes_of(wide, dtype) + 4 * (spec.heads + 2)
    kept = bytes_of(spec.hidden, dtype) if recompute else layer
    return tokens * (depth * kept + (3 if recompute else 2) * layer)
