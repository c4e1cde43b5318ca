"""Every setting of every command, with its default, its bounds and its help text; the only place with defaults.

The docstring of a field is its `--help`. A config is frozen: what a run used is what was resolved before it started.
Sources of a value, later ones winning: default, `--config FILE.toml`, flag.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lorafit.errors import ConfigError, did_you_mean, listed
from lorafit.units import GIB, MIB


def _comma_list(value: Any) -> Any:
    """`a,b` from a command line -> `[a, b]`; one name stays a string."""
    if isinstance(value, str) and "," in value and not value.startswith("re:"):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _comma_pairs(value: Any) -> Any:
    """`q_proj=8,*.mlp.*=4` from a command line -> a dict."""
    if not isinstance(value, str):
        return value
    pairs = [part.rpartition("=") for part in value.split(",") if part.strip()]
    if any(not pattern.strip() for pattern, _, _ in pairs):
        raise ValueError("expected NAME=VALUE, several separated by commas")
    return {pattern.strip(): number.strip() for pattern, _, number in pairs}


def _comma_texts(value: Any) -> Any:
    """`<a>,<b>` from a command line -> `[<a>, <b>]`, always a list."""
    return value.split(",") if isinstance(value, str) else value


Patterns = Annotated[str | list[str], BeforeValidator(_comma_list)]
PatternInts = Annotated[dict[str, int], BeforeValidator(_comma_pairs)]
PatternFloats = Annotated[dict[str, float], BeforeValidator(_comma_pairs)]
Names = Annotated[dict[str, str], BeforeValidator(_comma_pairs)]
Texts = Annotated[list[str], BeforeValidator(_comma_texts)]
Numbers = Annotated[list[float], BeforeValidator(_comma_texts)]


class Frozen(BaseModel):
    """Immutable, no unknown fields, no NaN; docstrings below fields become their descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def parse_bytes(text: str, flag: str) -> int:
    """Bytes of `2GiB`, `1500MiB`, `4GB` or `500MB`. Raises ConfigError, which names the flag."""
    for unit, size in {"GiB": GIB, "MiB": MIB, "GB": 10**9, "MB": 10**6}.items():
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdigit():
            return round(float(number) * size)
    raise ConfigError(f"{flag} {text!r} is not a size", "Give one such as 2GiB, 1500MiB or 4GB")


def parse_seconds(text: str, flag: str) -> float:
    """Seconds of `90s`, `20m`, `2h` or `1h30m`. Raises ConfigError, which names the flag."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.replace(" ", ""))
    seconds = (
        sum(int(part or 0) * size for part, size in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    )
    if not seconds:
        raise ConfigError(f"{flag} {text!r} is not a time", "Give one such as 20m, 90s or 1h30m")
    return float(seconds)


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
# The peak learning rate where none is given: what is far from the weights, or small in number, wants a larger one.
RATES = {
    "lora": 2e-3, "adapter": 2e-3, "prefix": 1e-2, "prompt": 3e-2, "ia3": 1e-2, "bitfit": 1e-2, "full": 1e-4,
    "lora:vera": 2e-2, "head": 5e-3,
}  # fmt: skip

# Epochs where no number is given: a head alone is cheap to train, as the model is run once for all of them.
EPOCHS = {"head": 10}


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
    """The rows' format: messages, sharegpt, prompt/completion, alpaca, text/label, text. Default: known by their
    columns."""
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
    task: Literal["auto", "generate", "classify"] = "auto"
    """Write text, or tell labels apart by a head that is trained. auto: labels where the rows have text and label."""
    pooling: Literal["auto", "last", "mean", "cls"] = "auto"
    """What of a row the head of labels is given: its last token, the mean of all, or the first. auto: the last token
    of a decoder that is trained itself, else the mean."""
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
    lr: float = Field(RATES["lora"], gt=0)
    """Peak learning rate of AdamW. The default suits short runs of the method; take less for long ones."""
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
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
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
    """CPU threads. Default: one per physical core."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""

    @model_validator(mode="before")
    @classmethod
    def _rate_follows_method(cls, values: Any) -> Any:
        """Where no rate and no number of epochs is given they are the usual ones of the method."""
        if not isinstance(values, dict):
            return values
        method = values.get("method") or "lora"
        rate = RATES.get(f"{method}:{values.get('variant')}") or RATES.get(method, RATES["lora"])
        usual = {"lr": rate, "epochs": EPOCHS.get(method, 1)}
        return {**values, **{name: value for name, value in usual.items() if values.get(name) is None}}

    @property
    def order_seed(self) -> int | None:
        """The seed of the order of rows; None where they keep their own."""
        return self.seed if self.shuffle else None


class EvalConfig(RowsConfig):
    """One evaluation."""

    target: str
    """A run directory, or a model as for train."""
    data: str
    """Rows, as for train; of a directory its test file."""
    adapter: str | None = None
    """An adapter directory in PEFT's format, on top of a model."""
    scale: float = 1.0
    """Multiplies the update: 0 is the base, 1 the tuned model, above 1 emphasises."""
    rows: int | None = Field(None, ge=1)
    """Only the first N rows."""
    batch_size: int = Field(32, ge=1)
    """Rows that are evaluated together."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer. Default: the longest expected answer and 16 tokens more."""
    generate: bool = True
    """Let the model answer, for exact match; off: loss alone."""
    samples: int = Field(3, ge=0)
    """How many rows are shown: prompt, expected, got."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the frozen base."""
    base_storage: Literal["auto", "keep", "nf4", "int8"] = "auto"
    """Evaluate with frozen weights that stay in fewer bits, as for train. Default: as the run was trained."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. Default: one per physical core."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class DataConfig(RowsConfig):
    """One look at data."""

    data: str
    """Rows, as for train."""
    model: str
    """The model they are meant for: its tokenizer and chat template, as for train."""
    against: str | None = None
    """Rows that must not be among them, such as the test set."""
    loss_on: Literal["replies", "last", "all"] = "replies"
    """Which tokens have a loss, as in training."""
    add_tokens: Texts = Field(default_factory=list)
    """Texts that become one token each, as in training."""
    skip_bad: bool = False
    """Count rows that cannot be used, instead of stopping at the first."""
    samples: int = Field(2, ge=0)
    """How many rows are shown in full, with what has a loss."""
    html: str | None = None
    """Write the whole report as a page to this file."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class PlanConfig(Frozen):
    """One plan."""

    model: str
    """A model as for train; a directory with its config.json alone will do."""
    data: str | None = None
    """Rows as for train: some of them are looked at. Without, all rows are taken to be of --seq-len tokens."""
    format: str | None = None
    """The format of DATA's rows, as for train."""
    rename: Names = Field(default_factory=dict)
    """DATA's columns under other names, as for train."""
    template: str | None = None
    """Another chat template, as for train."""
    loss_on: Literal["replies", "last", "all"] = "replies"
    """Which tokens of a conversation have a loss, as for train."""
    r: int = Field(16, ge=1)
    """Rank of the update."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step."""
    seq_len: int | None = Field(None, ge=2)
    """Tokens of every row, 512 by default; with DATA of its longest, as for train."""
    loss_share: float | None = Field(None, gt=0, le=1)
    """Share of the tokens that have a loss, all by default; with DATA it is counted."""
    rows: int | None = Field(None, ge=1)
    """Rows of an epoch, to predict how long the whole run takes; with DATA they are counted."""
    epochs: int = Field(1, ge=1)
    """How often each row is seen."""
    memory: str | None = None
    """Stay below this, such as 2GiB. Default: what the machine has free."""
    watts: float | None = Field(None, gt=0)
    """Power of the machine while it trains, to predict the energy of the run."""
    price: float | None = Field(None, gt=0)
    """Price of a kWh, to predict its cost."""
    gpu: str | None = None
    """A GPU to compare with, by its datasheet, such as l4 or rtx-4090."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. Default: one per physical core."""
    html: str | None = None
    """Write the plan as a page to this file, with a picture of each run's memory."""
    calibrate: bool = False
    """Measure first how fast this machine trains, in about half a minute; kept for later plans."""


class ChatConfig(Frozen):
    """One conversation."""

    target: str
    """A run directory, or a model as for train."""
    adapter: str | None = None
    """An adapter directory in PEFT's format, on top of a model."""
    scale: float = 1.0
    """Multiplies the update: 0 is the base, 1 the tuned model, above 1 emphasises."""
    system: str | None = None
    """The system message. Default: the training data's, where all its rows had the same; else the template's own."""
    temperature: float = Field(0.0, ge=0)
    """0 takes the likeliest token each time; higher is more varied."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest answer, in tokens."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds the sampling when temperature is above 0."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the frozen base."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. Default: one per physical core."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class ServeConfig(Frozen):
    """One server."""

    runs: list[str] = Field(min_length=1)
    """Run directories (or models, adapter directories) of one base model, each as PATH or NAME=PATH."""
    host: str = "127.0.0.1"
    """The address to listen on. Any that others can reach needs a token."""
    port: int = Field(8000, ge=0, le=65535)
    """The port to listen on; 0 takes a free one."""
    token_file: str | None = None
    """A file with the token that every request must bring. Default: the environment's LORAFIT_TOKEN, if it is set."""
    backend: Literal["auto", "llama.cpp", "transformers"] = "auto"
    """What computes: auto is llama.cpp where it can hold the base and every adapter, else transformers."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "q8_0"
    """Type of the GGUF file that llama.cpp gets of a Hugging Face base; a GGUF base stays as it is."""
    scale: float = 1.0
    """Multiplies the update where a request has no `scale`: 0 is the base, 1 the tuned model."""
    max_scale: float = Field(4.0, ge=0)
    """Largest scale that a request may ask for, above and below 0."""
    temperature: float = Field(0.0, ge=0, le=2)
    """Where a request has none: 0 takes the likeliest token each time; higher is more varied."""
    max_new_tokens: int = Field(1024, ge=1)
    """Longest answer, in tokens; a request may ask for less."""
    context: int | None = Field(None, ge=16)
    """Most tokens of a prompt and its answer. Default: what the model can read, at most 4096."""
    parallel: int = Field(2, ge=1, le=64)
    """Requests that are answered at the same time (by transformers one)."""
    queue: int = Field(16, ge=0)
    """Requests that may wait for their turn; more are refused."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest time of a request, waiting included."""
    grace_s: float = Field(5.0, ge=0)
    """How long answers that are under way may go on when the server is told to stop."""
    max_body: str = "1MiB"
    """Largest request."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the frozen base, for transformers."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. Default: one per physical core."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class MergeConfig(Frozen):
    """One merge."""

    run: str
    """A run directory, or an adapter directory in PEFT's format that names its base."""
    output: str
    """The directory to write, a plain Hugging Face model; with --into same a .gguf file."""
    scale: float = 1.0
    """Multiplies the update before it is added."""
    into: Literal["trained", "full", "same"] = "trained"
    """Into the base as training saw it, decoded; for nf4 or int8 into the full model, as it was before it was rounded;
    or, for a GGUF file, into the same types of the same file, rounded again."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the merged weights: the sum is taken in fp32 and cast once."""
    data: str | None = None
    """Rows, as for eval, on which the loss is measured before, after merging, and after the cast or rounding."""
    rows: int | None = Field(None, ge=1)
    """Only the first N of them."""
    seq_len: int = Field(2048, ge=2)
    """Longest of them in tokens."""
    stream: bool = False
    """Merge a Hugging Face model tensor by tensor, in little memory, to be resumed by the same command if it is
    interrupted. Default: where the model would not fit into the memory that is free."""
    force: bool = False
    """Write the result even where it is further off than is explained."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class ExportConfig(Frozen):
    """One export."""

    run: str
    """A run directory, or an adapter directory in PEFT's format that names its base."""
    output: str
    """The file to write (gguf, gguf-lora), or the directory (ollama, peft)."""
    format: str = "gguf"
    """gguf: the merged model; gguf-lora: the adapter alone, for llama.cpp; ollama: the model and a Modelfile; peft."""
    type: Literal[
        "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q5_k_m", "q4_k_m"
    ] = "q8_0"  # fmt: skip
    """Type of a merged model's matrices."""
    scale: float = 1.0
    """Multiplies the update before it is added to a model."""
    num_ctx: int = Field(4096, ge=1)
    """Tokens that Ollama keeps in view; never more than the model can."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class CombineConfig(Frozen):
    """One sum of adapters."""

    adapters: list[str] = Field(min_length=1)
    """Run directories, or adapter directories in PEFT's format, of one base model."""
    output: str
    """The adapter directory to write."""
    weights: Numbers | None = None
    """What each counts: 0.7,0.3; a negative one is taken away. Default: all the same, of a sum of 1."""
    how: Literal["cat", "svd", "linear", "ties", "dare", "magnitude-prune"] = "cat"
    """cat is the exact sum, of a rank that is the sum of ranks; svd the nearest of rank --r; others add up factors."""
    density: float = Field(1.0, gt=0, le=1)
    """Share of the numbers that ties, dare and magnitude-prune keep."""
    r: int | None = Field(None, ge=1)
    """Rank of the result, for svd. Default: the largest of theirs."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds what dare drops."""


class ShrinkConfig(Frozen):
    """One adapter of a lower rank."""

    run: str
    """A run directory, or an adapter directory in PEFT's format."""
    output: str
    """The adapter directory to write."""
    r: int = Field(ge=1)
    """The rank to bring it to; layers of a lower one stay as they are."""
    data: str | None = None
    """Rows, as for eval, on which the loss is measured before and after."""
    rows: int | None = Field(None, ge=1)
    """Only the first N of them."""


class ScaleConfig(Frozen):
    """One look at the scale of an update."""

    run: str
    """A run directory, or an adapter directory in PEFT's format that names its base."""
    task: str
    """Rows of what was learned, as for eval."""
    keep: str | None = None
    """Rows or text of what should not be forgotten."""
    output: str
    """The directory to write: scale.json and scale.svg."""
    scales: Numbers = Field(default_factory=lambda: [number / 4 for number in range(9)], min_length=1)
    """The scales to try. Default: 0 to 2 in steps of 0.25."""
    forgetting: float = Field(1.0, ge=0)
    """What a nat of loss on what is kept counts, against one on the task."""
    rows: int | None = Field(200, ge=1)
    """Only the first N rows of each."""
    seq_len: int = Field(2048, ge=2)
    """Longest row in tokens."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the frozen base."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. Default: one per physical core."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class CompareConfig(RowsConfig):
    """One comparison of methods."""

    model: str
    """A model, as for train."""
    data: str
    """Rows, as for train. Its own valid and test files are used where it has such."""
    output: str
    """The directory to write: compare.json, report.html, and the runs."""
    methods: Texts = Field(default_factory=lambda: ["lora", "adapter", "prefix", "ia3"], min_length=1)
    """What is compared, with a variant after a colon: lora,lora:dora,prefix. Default: lora,adapter,prefix,ia3."""
    seeds: int = Field(3, ge=1)
    """Runs of each method, with seeds of their own."""
    budget: str | None = None
    """Stop within this time, such as 20m or 1h30m: what is clearly worse is dropped first. Default: no limit."""
    eval: str | None = None
    """Test rows: as DATA, or a share of it such as 20%. Default: DATA's own test file, else 20%."""
    keep: str | None = None
    """Rows or text of what should not be forgotten. Default: a few paragraphs that come with lorafit."""
    metric: Literal["auto", "accuracy", "loss"] = "auto"
    """What decides: answers that are the expected reply, or the loss. auto: accuracy where replies are short."""
    shots: int = Field(4, ge=1)
    """Examples in the prompt of the base model, which the methods have to beat."""
    rate_trials: int = Field(5, ge=1)
    """Most learning rates that are tried for each method."""
    search_steps: int | None = Field(None, ge=1)
    """Steps of a trial of a learning rate. Default: half of a run's, but at least 20, or all where there are fewer."""
    r: int = Field(16, ge=1)
    """Rank of low-rank updates."""
    epochs: int = Field(1, ge=1)
    """How often each row is seen."""
    max_steps: int | None = Field(None, ge=1)
    """Steps of a run, whatever --epochs says."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step."""
    loss_on: Literal["replies", "last", "all"] = "replies"
    """Which tokens have a loss, as for train."""
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Type of the products with frozen weights, as for train."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The first seed; also of the split of rows and of the examples in the prompt."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. Default: one per physical core."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


C = TypeVar("C", bound=Frozen)


def read_toml(path: Path) -> dict[str, Any]:
    """A config file as a dict. Raises ConfigError if it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist", "Check the path given to --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(
            f"config file {path} cannot be read as TOML: {error}", "Correct it, or leave it out"
        ) from None


def build(cls: type[C], file: dict[str, Any], flags: dict[str, Any]) -> tuple[C, dict[str, str]]:
    """The config from a file's values and the flags that were given, and where each value came from.

    Returns the config and {field: "default" | "file" | "flag"}. Raises ConfigError: the field, what it got, the fix.
    """
    unknown = sorted(set(file) - set(cls.model_fields))
    if unknown:
        hint = did_you_mean(unknown[0], cls.model_fields) or f"Known: {listed(cls.model_fields, 40)}"
        raise ConfigError(f"the config file has an unknown setting {unknown[0]!r}", hint)
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        config = cls.model_validate({**file, **given})
    except ValidationError as error:
        raise _explain(error) from None
    source = {name: "flag" if name in given else "file" if name in file else "default" for name in cls.model_fields}
    return config, source


def _explain(error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False, include_context=False)[0]
    field = str(first["loc"][0]) if first["loc"] else "config"
    flag = "--" + field.replace("_", "-")
    if first["type"] == "missing":
        return ConfigError(f"{field} is missing", f"Give it on the command line or in the config file ({field} = ...)")
    reason = str(first["msg"]).removeprefix("Value error, ")
    return ConfigError(f"{flag}: {reason}, got {first['input']!r}", "See --help for what it takes")
