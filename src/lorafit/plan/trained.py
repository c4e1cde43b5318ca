"""What a method adds to a run's memory, from shapes alone.

The numbers that are kept for each token are those that autograd keeps for what the method computes; how far the sums
are off is measured by benchmarks/plan_error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorafit.config import MethodConfig
from lorafit.model.spec import ModelSpec
from lorafit.plan.counts import block_weights, lora_params, matrices, method_params

# In 16 bits LoRA's factors are packed as well, both ways round, their rank filled up to so many.
RANK_STEP, PACKED_BYTES = 16, 4
# What is not run by the engine's own layers keeps more, in widths of the residual stream: what norms and sums give, and
# updates before they are added. Measured with MiniLM.
NORMS = 4


@dataclass(frozen=True)
class Trained:
    """params: that are trained. per_token: numbers kept for each token of each layer, beside those of the base's own.

    packed_bytes: of copies that products need, in 16 bits. owned: of the model's own weights, how many are trained.
    labels: of a head that tells them apart, 0 where the model writes text. runs_once: whether the model runs without a
    backward pass, for the features of a head alone. padded: whether rows stand side by side. evaluated: whether the
    best of several evaluations is kept.
    """

    params: int
    per_token: int
    packed_bytes: int = 0
    owned: int = 0
    labels: int = 0
    runs_once: bool = False
    padded: bool = False
    evaluated: bool = False


def lora(spec: ModelSpec, r: int, variant: str = "lora") -> Trained:
    """Seven r-wide products in each layer; DoRA keeps what every product gives, scaled and not."""
    filled = lora_params(spec, -(-r // RANK_STEP) * RANK_STEP)
    config = MethodConfig(r=r, variant=variant)
    beside = 4 * _outputs(spec) + _apart(spec) if variant == "dora" else 0
    return Trained(method_params(spec, config), 7 * r + beside, PACKED_BYTES * filled)


def of(spec: ModelSpec, config: MethodConfig, labels: int = 0, padded: bool = False) -> Trained:
    """What the method of `config` adds, on all of its usual layers, and a head of so many labels.

    padded: whether the head reads more of a row than its last token, so that rows stand side by side.
    """
    found = _of(spec, config)
    if not labels:
        return found
    params = method_params(spec, config, labels, has_bias=padded or config.method == "head")
    return replace(
        found,
        params=params,
        per_token=found.per_token + padded * NORMS * spec.hidden,
        owned=found.owned and params,
        labels=labels,
        runs_once=config.method == "head",
        padded=padded,
    )


def _of(spec: ModelSpec, config: MethodConfig) -> Trained:
    if config.method == "lora":
        return lora(spec, config.r, config.variant)
    params = method_params(spec, config)
    if config.method == "full":
        # Norms, activations and gated products keep what they give, as theirs is no computation that we replace.
        return Trained(params, 4 * spec.intermediate, owned=params)
    return Trained(params, _kept(spec, config))


def _kept(spec: ModelSpec, config: MethodConfig) -> int:
    """Numbers for each token of a layer with something in it, which no longer runs as one function."""
    kv = spec.kv_heads * spec.head_dim
    places = 2 if config.variant in ("houlsby", "compacter") else 1
    return {
        "adapter": _apart(spec) + places * (spec.hidden + 2 * config.bottleneck),
        "ia3": _apart(spec) + spec.intermediate + 2 * kv,
        "bitfit": _apart(spec) + 2 * kv,
        "prefix": _apart(spec),
        "prompt": 0,
        "head": 0,
    }[config.method]


def _apart(spec: ModelSpec) -> int:
    """What a layer keeps more where its parts run one by one: a sum of the residual stream."""
    return spec.hidden


def _outputs(spec: ModelSpec) -> int:
    """Of all linear layers of a block."""
    return sum(out for out, _ in matrices(spec).values()) // max(1, spec.layers)


def frozen_block_weights(spec: ModelSpec, trained: Trained) -> int:
    """Weights of the blocks that are not trained themselves."""
    return 0 if trained.owned else sum(a * b for a, b in block_weights(spec).values())
