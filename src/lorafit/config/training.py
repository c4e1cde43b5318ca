"""Settings of a training run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lorafit.config.base import Frozen, Names, PatternFloats, PatternInts, Patterns, Texts
from lorafit.errors import ConfigError, did_you_mean, listed


class LoRAConfig(Frozen):
    """What is adapted, and how: dW = scaling * B A on each target. Source: Hu et al. 2021, eq. 3."""

    r: int = Field(16, ge=1)
    """Rank of the update: how many directions each layer may change in."""
    alpha: float = Field(32.0, gt=0)
    """Numerator of the scaling alpha / r. Default: 2 r."""
    variant: str = "lora"
    """The form of the update: lora, dora, lora-fa, vera."""
    targets: Patterns = "all-linear"
    """Layers to adapt: all-linear (all but the output head), names, globs, re:REGEX; several with commas."""
    layers: str | None = None
    """Which blocks: last:K, first:K or 0-3,7. Default: all."""
    rank_pattern: PatternInts = Field(default_factory=dict)
    """Other ranks for some targets: q_proj=8,*.mlp.*=4."""
    alpha_pattern: PatternFloats = Field(default_factory=dict)
    """Other alphas for some targets: q_proj=16."""
    scaling_rule: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """How alpha becomes the scaling; alpha/sqrt(r) is rsLoRA (Kalajdzievski 2023)."""
    init: str = "gaussian"
    """How A starts: gaussian (standard deviation 1/r) or kaiming; B at 0. From the data: eva, lora-ga; from the
    weights: pissa, olora; over nf4 or int8: loftq, qera."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's input that is dropped while training."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds A, dropout, the order of rows and the split of --eval 10%."""

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_r(cls, values: Any) -> Any:
        """Where alpha is not given it is 2 r, so that scaling is 2 at every rank."""
        if isinstance(values, dict) and values.get("alpha") is None and str(values.get("r", "")).isdigit():
            return {**values, "alpha": 2.0 * int(values["r"])}
        return values


# What --method takes, each with its variants, the first one by default.
METHOD_VARIANTS = {
    "lora": ("lora", "dora", "lora-fa", "vera"),
    "adapter": ("pfeiffer", "houlsby", "parallel", "compacter"),
    "prefix": ("p-tuning-v2", "reparametrised"),
    "prompt": ("prompt",),
    "ia3": ("ia3",),
    "bitfit": ("bitfit",),
    "full": ("full",),
    "head": ("head",),
}
# What --base-storage rounds frozen weights to; the others change no number.
ROUNDED = ("nf4", "int8")
# The peak learning rate where none is given: what is far from the weights, or small in number, wants a larger one.
RATES = {
    "lora": 2e-3, "adapter": 2e-3, "prefix": 1e-2, "prompt": 3e-2, "ia3": 1e-2, "bitfit": 1e-2, "full": 1e-4,
    "lora:vera": 2e-2, "head": 1.5e-3, "full:--layers": 1e-3,
}  # fmt: skip
# The same on encoders, where it differs: docs/design/learning-rate.md.
ENCODER_RATES = {"lora": 5e-4}

# Epochs where no number is given: a head alone is cheap to train, as the model is run once for all of them.
EPOCHS = {"head": 10}


def usual_rate(method: str, variant: str | None = None, is_encoder: bool = False, in_part: bool = False) -> float:
    """The peak learning rate where none is given. is_encoder: of the model, such as BERT. in_part: of some blocks."""
    of_kind = {**RATES, **ENCODER_RATES} if is_encoder else RATES
    of_part = of_kind.get(f"{method}:--layers") if in_part else None
    return of_part or of_kind.get(f"{method}:{variant}") or of_kind[method]


class MethodConfig(LoRAConfig):
    """What is trained, by whichever method."""

    method: str = "lora"
    """What is trained: lora, adapter, prefix, prompt, ia3, bitfit, full; head for the head of labels alone."""
    variant: str = "lora"
    """The form of it. lora: lora, dora, lora-fa, vera. adapter: pfeiffer, houlsby, parallel, compacter. prefix:
    p-tuning-v2, reparametrised. Default: the first."""
    bottleneck: int = Field(64, ge=1)
    """Width of an adapter's inner layer."""
    virtual_tokens: int = Field(20, ge=1)
    """How many tokens prefix and prompt put in front of every row."""
    prompt_text: str | None = None
    """What the virtual tokens of prefix and prompt start as. Default: tokens of the rows, drawn by --seed."""

    @property
    def lead_tokens(self) -> int:
        """Virtual tokens in front of every row."""
        return self.virtual_tokens if self.method in ("prefix", "prompt") else 0

    @model_validator(mode="before")
    @classmethod
    def _variant_follows_method(cls, values: Any) -> Any:
        """Where no variant is given it is the method's first; one of another method is refused."""
        if not isinstance(values, dict):
            return values
        method = values.get("method") or "lora"
        known = METHOD_VARIANTS.get(method)
        if known is None:
            raise ConfigError(
                f"--method {method!r} is unknown",
                did_you_mean(str(method), METHOD_VARIANTS) or f"Known: {listed(METHOD_VARIANTS, 20)}",
            )
        variant = values.get("variant") or known[0]
        if variant not in known:
            raise ConfigError(
                f"--variant {variant!r} is none of --method {method}; there are {listed(known)}",
                did_you_mean(str(variant), known) or "Choose one of them",
            )
        return {**values, "variant": variant}


class RowsConfig(Frozen):
    """How rows are read and written out."""

    format: str | None = None
    """The rows' format: messages, sharegpt, prompt/completion, alpaca, text/label, text/score, tokens/tags, text.
    Default: known by their columns."""
    rename: Names = Field(default_factory=dict)
    """Columns under other names: question=prompt,answer=completion."""
    template: str | None = None
    """A file with a chat template in the place of the model's own, or chatml or alpaca for a model that has none."""
    seq_len: int = Field(2048, ge=2)
    """Longest row in tokens: text rows are split at it, chat rows are cut and counted."""


class TrainConfig(MethodConfig, RowsConfig):
    """One training run."""

    model: str
    """A Hugging Face directory, a .gguf file, a hub id, or an installed model package (smollm2-135m)."""
    data: str
    """Rows: a .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt file, a directory of such, or a hub id."""
    output: str
    """The run directory to write."""
    eval: str | None = None
    """Rows to evaluate on while training: as DATA, or a share of it such as 10%. Default: DATA's own valid file."""
    eval_every: int | None = Field(None, ge=1)
    """Evaluate every N steps. Default: at the end of each epoch."""
    patience: int | None = Field(None, ge=1)
    """Stop after N evaluations without a better loss. Default: never."""
    task: Literal["auto", "generate", "classify", "regress", "tag"] = "auto"
    """Write text, or train a head that tells labels apart, predicts a number, or tags words. auto: labels where the
    rows have text and label, numbers where the label has a point, tags where they have tokens and tags."""
    pooling: Literal["auto", "last", "mean", "cls"] = "auto"
    """What of a row the head of labels is given: its last token, the mean of all, or the first. auto: the last token
    of a decoder that is trained itself, else the mean."""
    layer: int | None = Field(None, ge=0)
    """The layer whose output a head alone is given: 0 the embeddings, 1 the first. Default: the last."""
    probe: bool = False
    """Try a head on every layer first, by the held-out rows, and go on with the best layer (--method head)."""
    epochs: int = Field(1, ge=1)
    """How often each row is seen. Default: 1; 10 for a head alone, where the model is run once for all."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after N optimizer steps, whatever --epochs says."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step."""
    shuffle: bool = True
    """Every epoch in an order of its own, by the seed. Off: in the order of DATA, as for a curriculum."""
    micro_tokens: int = Field(1024, ge=1)
    """Most tokens of a forward pass: a step is split to stay below; the result is the same."""
    skip_bad: bool = False
    """Leave out rows that cannot be used, and say how many. Off: the first one stops the run."""
    loss_on: Literal["replies", "last", "all"] = "replies"
    """Which tokens have a loss: every reply, the last reply of each row, or all tokens."""
    add_tokens: Texts = Field(default_factory=list)
    """Texts that become one token each, with embeddings that are trained: '<call>,</call>'."""
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] | None = None
    """Peak learning rate of AdamW; auto: found by a race over the first steps. Default: the usual one of the method in
    short runs; take less for long ones."""
    head_lr: float | None = Field(None, gt=0)
    """Peak rate of a head of labels that is trained beside something else. Default: that of a head alone."""
    lora_plus: float = Field(1.0, ge=1)
    """LoRA+: B learns at so many times the rate of A; 1 for the same, 16 is what its authors take."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rate goes on after the warm-up: linear and cosine fall to 0 at the last step."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of all steps in which the rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay, on the adapter."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm; a larger gradient is scaled down to it."""
    rank_schedule: Literal["none", "halving", "adalora"] = "none"
    """halving: after training the update is halved, trained on for a few steps, halved again, down to rank 1, in 1.4
    times the time; each rank is measured and kept, for `lorafit eval --r` and `lorafit shrink`. adalora: layers begin
    with --r-start, and the least important directions of all of them are taken away until their mean rank is --r
    (Zhang et al. 2023)."""
    r_start: int | None = Field(None, ge=1)
    """Rank that adalora begins with. Default: half as much again as --r."""
    rank_hold: float = Field(0.1, ge=0, lt=1)
    """Share of all steps before adalora takes anything away."""
    rank_settle: float = Field(0.3, ge=0, lt=1)
    """Share of all steps after adalora has taken the last."""
    gate_rate: float = Field(100.0, gt=0)
    """Under adalora, what the rate of the gates is multiplied by: they alone say how far to go."""
    orthogonality: float = Field(0.1, ge=0)
    """Under adalora, the weight of what keeps directions at right angles."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    """Type of the products with frozen weights: auto measures which is fastest here. The adapter is always fp32."""
    base_storage: Literal["auto", "keep", "nf4", "int8"] = "auto"
    """How frozen weights lie in memory: auto as they are computed with; keep in a GGUF file's blocks; nf4 or int8, as
    bitsandbytes has them, for a Hugging Face model. All but auto are decoded for each use: less memory, more time."""
    feature_cache: str = "2GiB"
    """Largest file of frozen layers' activations, kept while a run of several epochs lasts; 0MiB for none."""
    save_every: int | None = Field(None, ge=1)
    """Write a checkpoint every N steps. Default: once a minute, and when an epoch or the run ends."""
    memory: str | None = None
    """Stay below this, such as 2GiB, by splitting steps and recomputing layers. Default: what the machine has free."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. Default: OMP_NUM_THREADS, or one per physical core."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""

    @model_validator(mode="before")
    @classmethod
    def _epochs_follow_method(cls, values: Any) -> Any:
        """Where no number of epochs is given it is the usual one of the method."""
        if not isinstance(values, dict) or values.get("epochs") is not None:
            return values
        return {**values, "epochs": EPOCHS.get(values.get("method") or "lora", 1)}

    @property
    def peak_rate(self) -> float:
        """The learning rate: `lr`, or the usual one of a model that writes text. A run on an encoder sets `lr`."""
        usual = usual_rate(self.method, self.variant, in_part=self.layers is not None)
        return self.lr if isinstance(self.lr, float) else usual

    @property
    def head_rate(self) -> float:
        """The learning rate of the head of labels."""
        return self.peak_rate if self.method == "head" else self.head_lr or RATES["head"]

    @property
    def order_seed(self) -> int | None:
        """The seed of the order of rows; None where they keep their own."""
        return self.seed if self.shuffle else None
