"""Settings of what looks at rows, models and runs, and uses them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lorafit.config.base import Frozen, Names, Texts
from lorafit.config.training import EPOCHS, RowsConfig


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
    r: int | None = Field(None, ge=1)
    """Use the adapter of this rank, of a run that leaves several (--rank-schedule halving). Default: its own."""
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
    answers: str | None = None
    """Write the answer to every row to this file: JSON Lines of prompt, expected, answer, right, and the row itself."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the frozen base."""
    base_storage: Literal["auto", "keep", "nf4", "int8"] = "auto"
    """Evaluate with frozen weights that stay in fewer bits, as for train. Default: as the run was trained."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. Default: OMP_NUM_THREADS, or one per physical core."""
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
    method: str = "lora"
    """Which method the detailed table is of, as for train; all of them stand side by side in another."""
    variant: str | None = None
    """The form of it, as for train. Default: the method's first."""
    layers: str | None = None
    """Which blocks it trains, as for train: last:K, first:K or 0-3,7. Default: all."""
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
    """How often each row is seen. Default: 1; 10 for a head alone, as for train."""
    memory: str | None = None
    """Stay below this, such as 2GiB. Default: what the machine has free."""
    watts: float | None = Field(None, gt=0)
    """Power of the machine while it trains, to predict the energy of the run."""
    price: float | None = Field(None, gt=0)
    """Price of a kWh, to predict its cost."""
    gpu: str | None = None
    """A GPU to compare with, by its datasheet, such as l4 or rtx-4090."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. Default: OMP_NUM_THREADS, or one per physical core."""
    html: str | None = None
    """Write the plan as a page to this file, with a picture of each run's memory."""
    calibrate: bool = False
    """Measure first how fast this machine trains, in about half a minute; kept for later plans."""

    @model_validator(mode="before")
    @classmethod
    def _epochs_follow_method(cls, values: Any) -> Any:
        """Where no number is given it is the usual one of the method."""
        if not isinstance(values, dict) or values.get("epochs") is not None:
            return values
        return {**values, "epochs": EPOCHS.get(values.get("method") or "lora", 1)}


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
    """CPU threads. Default: OMP_NUM_THREADS, or one per physical core."""
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
    """CPU threads. Default: OMP_NUM_THREADS, or one per physical core."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class TrialsConfig(RowsConfig):
    """What commands that make many runs have in common."""

    model: str
    """A model, as for train."""
    data: str
    """Rows, as for train. Its own valid and test files are used where it has such."""
    output: str
    """The directory to write."""
    eval: str | None = None
    """Rows that are not trained on."""
    epochs: int = Field(1, ge=1)
    """How often each row is seen."""
    max_steps: int | None = Field(None, ge=1)
    """Steps of a run, whatever --epochs says."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step."""
    loss_on: Literal["replies", "last", "all"] = "replies"
    """Which tokens have a loss, as for train."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    """Type of the products with frozen weights, as for train."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The first seed; also of the split of rows and of whatever is drawn."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. Default: OMP_NUM_THREADS, or one per physical core."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class CompareConfig(TrialsConfig):
    """One comparison of methods."""

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
    task: Literal["auto", "generate", "classify", "regress", "tag"] = "auto"
    """What the methods learn, as for train: to write text, to tell labels apart, to predict a number, to tag words."""
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
    ray: str | None = None
    """Run trials at the same time on a Ray cluster: auto, HOST:PORT, or local for one on this machine alone."""


class RankConfig(TrialsConfig):
    """One search of the rank."""

    output: str
    """The directory to write: rank.json, report.html, and the runs."""
    max_r: int = Field(64, ge=2)
    """The largest rank that is tried; less where the narrowest layer holds less."""
    eval: str | None = None
    """Rows the ranks are judged by: as DATA, or a share of it such as 20%. Default: DATA's own valid file, else 20%,
    but no more than 200 rows."""
    epochs: int = Field(3, ge=1)
    """How often each row is seen, at most: training stops when the held-out loss has risen for an epoch."""
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Rate of the one training; auto: found by a race of rates over its first steps. What is brought to rank r learns
    at a rate that goes with its square root, over r, afterwards."""
    verify: bool = False
    """Train the recommended rank and its neighbours by themselves too, each at the best of a few rates, and ranks
    that differ by layer: says what the advice has cost. Takes about a dozen runs."""


class ReportConfig(Frozen):
    """One report."""

    directory: str
    """A run directory, or that of a comparison, a search of the rank or a look at the scale."""
    output: str | None = None
    """The page to write. Default: report.html in the directory."""
    samples: int = Field(3, ge=0)
    """Rows of a run that base and tuned model answer; 0 needs no model."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the frozen base for these answers."""
    threads: int | None = Field(None, ge=1)
    """CPU threads for these answers. Default: OMP_NUM_THREADS, or one per physical core."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
