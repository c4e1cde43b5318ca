"""Settings of what becomes of a run: merged, exported, added up, shrunk, scaled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorafit.config.base import Frozen, Numbers


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
    """CPU threads. Default: OMP_NUM_THREADS, or one per physical core."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
