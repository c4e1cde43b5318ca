"""`eval` and `chat`, each as one straight line.

target -> base model + adapter -> rows -> measures; -> a conversation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorafit.config import ChatConfig, EvalConfig
from lorafit.data.formats import read_examples
from lorafit.data.load import locate
from lorafit.data.rows import Row
from lorafit.data.template import use_template
from lorafit.engine.engine import prepare
from lorafit.errors import ConfigError
from lorafit.export import saved
from lorafit.infer import answers as infer_answers
from lorafit.infer import chat as infer_chat
from lorafit.infer import evaluate as infer_evaluate
from lorafit.infer.label_rows import evaluate_labels
from lorafit.infer.show_labels import print_labels, print_numbers
from lorafit.opening import find, open_target
from lorafit.plan import machine
from lorafit.units import format_count, format_seconds

if TYPE_CHECKING:
    pass


# --- eval -----------------------------------------------------------------------------------------------------------


def evaluate(config: EvalConfig, console: Console) -> dict[str, Any]:
    """Measure a run or a model on rows. Returns the JSON object; perplexity is None where it overflows.

    Raises LorafitError for whatever the user can mend.
    """
    torch.set_num_threads(config.threads or machine.usual_threads())
    rows = list(islice(locate(config.data).unseen().rows(), config.rows))
    labelled = _tells_labels(config)
    examples = [] if labelled and not config.answers else read_examples(rows, config.format, config.rename)
    if config.answers:
        infer_answers.check(Path(config.answers), examples, config.generate or labelled)
    opened = open_target(
        config.target,
        config.adapter,
        config.scale,
        config.precision,
        config.trust_remote_code,
        console,
        config.base_storage,
        labelled=labelled,
        r=config.r,
    )
    what = {"target": config.target, "base": opened.base, "data": config.data, "adapter": config.adapter}
    how = {"scale": config.scale if opened.has_adapter else None, "precision": opened.precision}
    how |= {"base_storage": config.base_storage, "r": config.r}
    if opened.labels:
        found, told = evaluate_labels(opened.model, opened.tokenizer, opened.labels, rows, config, console)
        _write_answers(config, rows, infer_answers.of_head(examples, opened.labels.names, found), console)
        return what | how | told
    if config.template:
        use_template(opened.tokenizer, config.template)
    result = infer_evaluate.evaluate(
        prepare(opened.model, share_prefix=True),
        opened.tokenizer,
        examples,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        generate=config.generate,
        samples=len(examples) if config.answers else config.samples,
        seq_len=config.seq_len,
        micro_tokens=config.seq_len,  # a forward pass is never larger than for the longest row that is allowed
        console=console,
    )
    _write_answers(config, rows, result.samples, console)
    # JSON has no infinity.
    finite = {"perplexity": result.perplexity if math.isfinite(result.perplexity) else None}
    return (
        what
        | how
        | asdict(result)
        | finite
        | {"samples": [asdict(sample) for sample in result.samples[: config.samples]]}
    )


def _write_answers(
    config: EvalConfig, rows: list[Row], answered: Sequence[infer_evaluate.Sample], console: Console
) -> None:
    if config.answers:
        infer_answers.write(Path(config.answers), rows, answered)
        console.print(f"wrote {config.answers}", highlight=False, markup=False, soft_wrap=True)


def _tells_labels(config: EvalConfig) -> bool:
    """Whether the target has a head of labels. Raises ConfigError for settings of text that it would leave unread."""
    found = find(config.target, config.adapter)
    if found.adapter is None or saved.labels_of(found.adapter) is None:
        return False
    for name in ("template", "max_new_tokens", "r"):
        value = getattr(config, name)
        if value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} is given, and {config.target} tells labels apart and writes no text",
                "Leave it out",
            )
    return True


# How what a head tells is shown, by its task.
TELLS = {"classify": print_labels, "tag": print_labels, "regress": print_numbers}
MEANINGS = {
    "loss": "nats per token with a loss",
    "perplexity": "e^loss",
    "exact_match": "answers that are the expected reply",
    "accuracy": "rows answered right",
    "valid_json": "answers that are a JSON object",
}
SHOWN_CHARS = 400  # of each text of a sample; --json gives all of it


def print_evaluation(report: dict[str, Any], console: Console) -> None:
    """What `evaluate` returned, for people: a table of the measures, what was cut, and the first rows."""
    if report.get("task") in TELLS:
        return TELLS[report["task"]](report, console)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, meaning in MEANINGS.items():
        if name in ("loss", "perplexity"):
            table.add_row(name, "above 1e308" if report[name] is None else f"{report[name]:.4g}", meaning)
        elif report[name] is not None:
            table.add_row(name, f"{100 * report[name]:.1f}%", meaning)
    console.print(table)
    scale = "" if report["scale"] is None else f" at scale {report['scale']:g}"
    scale += "" if report["r"] is None else f", its adapter of rank {report['r']}"
    rows, tokens = format_count(report["rows"]), format_count(report["tokens_supervised"])
    line = (
        f"{report['target']}{scale} ({report['precision']}) on {rows} rows of {report['data']}, "
        f"{tokens} tokens with a loss: {format_seconds(report['seconds'])}"
    )
    console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    for count, what in (
        (report["cut_rows"], "rows were cut at --seq-len"),
        (report["cut_answers"], "answers were cut at --max-new-tokens or the model's context"),
    ):
        if count:
            console.print(f"{format_count(count)} {what}", style="yellow", highlight=False)
    _print_samples(report["samples"], rows, console)


def _print_samples(samples: list[dict[str, Any]], rows: str, console: Console) -> None:
    if samples:
        console.print(f"\nThe first {len(samples)} of {rows} rows:", highlight=False)
    for sample in samples:
        mark, style = ("right", "green") if sample["right"] else ("wrong", "red")
        console.print(Text(f"\n{mark}", style))
        for name in ("prompt", "expected", "got"):
            text = sample[name] if len(sample[name]) <= SHOWN_CHARS else sample[name][:SHOWN_CHARS] + "..."
            console.print(Text(f"{name:>9}  ", "dim") + Text(text, style if name == "got" else ""))


# --- chat -----------------------------------------------------------------------------------------------------------


def chat(config: ChatConfig, console: Console, stdin: TextIO, stdout: TextIO) -> None:
    """Talk to a run or a model; see `infer.chat`. Raises LorafitError for whatever the user can mend."""
    torch.set_num_threads(config.threads or machine.usual_threads())
    opened = open_target(
        config.target, config.adapter, config.scale, config.precision, config.trust_remote_code, console
    )
    session = infer_chat.Session(
        model=opened.model,
        tokenizer=opened.tokenizer,
        has_adapter=opened.has_adapter,
        scale=config.scale,
        system=opened.system if config.system is None else config.system,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    infer_chat.chat(session, stdin, stdout, console)
