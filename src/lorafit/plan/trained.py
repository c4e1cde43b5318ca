"""What a method adds to a run's memory, from shapes alone.

The numbers that are kept for each token are those that autograd keeps for what the method computes; how far the sums
are off is measured by benchmarks/plan_error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorafit.config import MethodConfig
from lorafit.model.spec import ModelSpec
from lorafit.plan.counts import block_weights, lora_params, method_params, within
from lorafit.plan.steps import untouched

# In 16 bits LoRA's factors are packed as well, both ways round, their rank filled up to so many.
RANK_STEP, PACKED_BYTES = 16, 4
# Starts that take a product out of W0, whose factors are kept, as what is saved at the end stands on W0 itself.
MOVING = ("pissa", "olora", "lora-ga")
# What is not run by the engine's own layers keeps more, in widths of the residual stream: what norms and sums give, and
# updates before they are added. Measured with MiniLM.
NORMS = 4


@dataclass(frozen=True)
class Trained:
    """params: that are trained. per_token: numbers kept for each token of each layer, beside those of the base's own.

    packed_bytes: of copies that products need, in 16 bits. owned: of the model's own weights, how many are trained.
    labels: of a head that tells them apart, 0 where the model writes text. runs_once: whether the model runs without a
    backward pass, for the features of a head alone. padded: whether rows stand side by side. evaluated: whether the
    best of several evaluations is kept. depth: how many layers keep something, those from the lowest on in which
    anything is trained. frozen: weights of the blocks' linear layers that are not trained themselves.
    unreached: those of them that no gradient goes through, below that layer. kept: numbers in float32 beside them.
    """

    params: int
    per_token: int
    packed_bytes: int = 0
    owned: int = 0
    labels: int = 0
    runs_once: bool = False
    padded: bool = False
    evaluated: bool = False
    depth: int = 0
    frozen: int = 0
    unreached: int = 0
    kept: int = 0


def of(spec: ModelSpec, config: MethodConfig, labels: int = 0, padded: bool = False) -> Trained:
    """What the method of `config` adds, on its usual layers in the blocks of --layers, and a head of so many labels.

    padded: whether the head reads more of a row than its last token, so that rows stand side by side. Raises
    TargetError for --layers that are not there.
    """
    below, weights = untouched(spec, config), _weights(spec, None)
    found = replace(
        _of(spec, config),
        depth=spec.layers if config.method == "head" else spec.layers - below,  # those, one at a time: `runs_once`
        frozen=weights - (_weights(spec, config.layers) if config.method == "full" else 0),
        unreached=_weights(spec, f"first:{below}") if below else 0,
    )
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
    params = method_params(spec, config)
    if config.method == "lora":
        own = within(spec, config.layers)
        return Trained(
            params, _of_low_rank(spec, config), _packed(own, config), kept=_kept_factors(own, config, params)
        )
    if config.method == "full":
        # Norms, activations and gated products keep what they give, as theirs is no computation that we replace.
        return Trained(params, 4 * spec.intermediate, owned=params)
    return Trained(params, _kept(spec, config))


def _weights(spec: ModelSpec, layers: str | None) -> int:
    """Of the linear layers of these blocks."""
    return sum(a * b for a, b in block_weights(within(spec, layers)).values())


def _of_low_rank(spec: ModelSpec, config: MethodConfig) -> int:
    """Seven r-wide products in each layer; DoRA keeps what o and down give, which nothing else does."""
    beside = 2 * spec.hidden if config.variant == "dora" else 0
    return 7 * config.r + beside


def _kept_factors(spec: ModelSpec, config: MethodConfig, params: int) -> int:
    """Numbers of factors beside those that are trained: as they were at the start, or frozen; VeRA's scaled as well."""
    beside = {"vera": 2 * lora_params(spec, config.r), "lora-fa": lora_params(spec, config.r) - params}
    return beside.get(config.variant, params if config.init in MOVING else 0)


def _packed(spec: ModelSpec, config: MethodConfig) -> int:
    return PACKED_BYTES * lora_params(spec, -(-config.r // RANK_STEP) * RANK_STEP)


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
