"""The model card of a run: README.md with the Hugging Face front matter, from what run.json holds and nothing else."""

from __future__ import annotations

import json
from typing import Any

from lorafit.units import format_bytes, format_count, format_seconds, format_share

SETTINGS = {
    "model": "base model",
    "data": "data",
    "method": "method",
    "variant": "variant",
    "r": "r",
    "alpha": "alpha",
    "seed": "seed",
    "precision": "precision of the frozen base",
    "threads": "threads",
    "system": "system message of all rows",
    "pooling": "what of a row the head is given",
}


def render(result: dict[str, Any]) -> str:
    """The card as Markdown. result: the content of run.json; what it lacks, or has as None, is left out."""
    sections = [
        _front_matter(result),
        _title(result),
        _table("Settings", {label: result.get(key) for key, label in SETTINGS.items()}),
        _table("Measured", _measured(result)),
        _usage(result),
        _table("Made with", result.get("versions", {})),
        _table("Inputs (SHA-256)", {"model": result.get("model_sha256"), "data": result.get("data_sha256")}),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _title(result: dict[str, Any]) -> str:
    if result.get("labels"):
        what = f"{format_count(len(result['labels']))} labels by {result['method']} on {result['model']}"
        where = "What was trained, with its head of labels, is in `adapter/`, in lorafit's own form."
    else:
        what = f"{result['variant']} adapter for {result['model']}"
        where = "The adapter is in `adapter/`, in PEFT's format."
    return f"# {what}\n\nTrained on `{result['data']}` with lorafit. {where}"


def _front_matter(result: dict[str, Any]) -> str:
    tags = dict.fromkeys(["lorafit", "lora", result["method"], result["variant"]])
    lines = [
        "---",
        f"base_model: {json.dumps(result['model'], ensure_ascii=False)}",  # a JSON string is a YAML string
        f"library_name: {'lorafit' if result.get('labels') else 'peft'}",
        f"pipeline_tag: text-{'classification' if result.get('labels') else 'generation'}",
        "tags:",
        *[f"- {tag}" for tag in tags],
        "---",
    ]
    return "\n".join(lines)


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    """Figures with their units, by label."""
    formats: dict[str, tuple[str, Any]] = {
        "train_loss": ("training loss of the last step", "{:.4f}".format),
        "eval_loss": ("best held-out loss", "{:.4f}".format),
        "eval_accuracy": ("accuracy on held-out rows", "{:.4f}".format),
        "eval_macro_f1": ("macro-F1 on held-out rows", "{:.4f}".format),
        "best_step": ("step of the best held-out loss", format_count),
        "steps": ("optimizer steps", format_count),
        "tokens_seen": ("tokens seen", format_count),
        "tokens_supervised": ("of them supervised", format_count),
        "tokens_computed": ("tokens computed, padding included", format_count),
        "train_s": ("training time", format_seconds),
        "load_s": ("loading time", format_seconds),
        "peak_rss_bytes": ("peak memory", format_bytes),
        "predicted_peak_bytes": ("peak memory, predicted", format_bytes),
    }
    share = f"{format_count(result['trainable_params'])} of {format_count(result['total_params'])}"
    percent = format_share(result["trainable_params"], result["total_params"])
    figures = {label: form(result[key]) for key, (label, form) in formats.items() if result.get(key) is not None}
    figures["trainable parameters"] = f"{share} ({percent})"
    if result.get("skipped_steps"):
        figures["steps skipped, not finite"] = format_count(len(result["skipped_steps"]))
    if result.get("stopped_early"):
        figures["stopped early"] = "yes: the held-out loss no longer improved"
    return figures


def _usage(result: dict[str, Any]) -> str:
    if result.get("labels"):
        return """## Use

In this directory:

```bash
lorafit eval . TEST.jsonl     # loss, accuracy, F1 of each label and what is taken for what
```"""
    return f"""## Use

In this directory:

```bash
lorafit eval . TEST.jsonl     # loss and exact match on other rows
lorafit chat .                # a conversation; /scale 0 is the base model, /scale 1 this one
lorafit merge . -o DIR        # a plain Hugging Face model, without adapter
```

With PEFT (`BASE` is {result["model"]} as a Hugging Face directory or hub id):

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "adapter")
tokenizer = AutoTokenizer.from_pretrained("adapter")
```"""


def _table(title: str, rows: dict[str, Any]) -> str:
    """A section of two columns; rows without a value are left out, and a section without rows is empty."""
    lines = [f"| {label} | {_cell(value)} |" for label, value in rows.items() if value is not None]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines]) if lines else ""


def _cell(value: Any) -> str:
    """A value on one line of a table: `|` and line breaks would end the cell."""
    return str(value).replace("|", "\\|").replace("\n", "<br>")
