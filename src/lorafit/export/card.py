"""The model card of a run: README.md with the Hugging Face front matter, from what run.json holds and nothing else."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from lorafit.config import ROUNDED
from lorafit.units import format_bytes, format_count, format_seconds, format_share

SETTINGS = {
    "model": "base model",
    "base_license": "licence of the base",
    "data": "data",
    "method": "method",
    "variant": "variant",
    "r": "r",
    "alpha": "alpha",
    "seed": "seed",
    "precision": "precision of the frozen base",
    "base_storage": "storage of the frozen base",
    "threads": "threads",
    "system": "system message of all rows",
    "pooling": "what of a row the head is given",
    "layer": "of which layer",
}

TRAINING = {
    "targets": "targets",
    "lr": "learning rate",
    "head_lr": "learning rate of the head",
    "schedule": "schedule",
    "epochs": "epochs",
    "max_steps": "most steps",
    "batch_size": "rows a step",
    "dropout": "dropout",
    "init": "init",
    "scaling_rule": "scaling",
}


# Names of the hub, by task.
PIPELINES = {"generate": "text-generation", "tag": "token-classification"}


def render(result: dict[str, Any], adapter: str = "adapter") -> str:
    """The card as Markdown. result: the content of run.json; what it lacks, or has as None, is left out.

    adapter: its directory, as seen from where the card lies.
    """
    where = "beside this file" if adapter == "." else f"in `{adapter}/`"
    form = "PEFT's format" if result["method"] == "lora" and not result.get("labels") else "lorafit's own format"
    told = f"Trained on `{result['data']}` with lorafit. The adapter is {where}, in {form}."
    if not result.get("base_license"):
        told += " The files of the base model state no licence; look for it where the model came from."
    sections = [
        _front_matter(result),
        _title(result),
        told,
        _table("Settings", _settings(result)),
        _table("Measured", _measured(result)),
        _table("Held-out loss by rank", _by_rank(result)),
        _usage(result, adapter),
        _table("Made with", result.get("versions", {})),
        _table("Inputs (SHA-256)", {"model": result.get("model_sha256"), "data": result.get("data_sha256")}),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _settings(result: dict[str, Any]) -> dict[str, Any]:
    chosen = result.get("settings", {})
    shown = {label: result.get(key) for key, label in SETTINGS.items()}
    return shown | {label: chosen.get(key) for key, label in TRAINING.items()}


def _title(result: dict[str, Any]) -> str:
    if result.get("labels"):
        count, task = format_count(len(result["labels"])), result.get("task")
        what = "Numbers" if task == "regress" else f"{count} {'tags' if task == 'tag' else 'labels'}"
        return f"# {what} by {result['method']} on {result['model']}"
    return f"# {result['variant']} adapter for {result['model']}"


def _front_matter(result: dict[str, Any]) -> str:
    tags = dict.fromkeys(["lorafit", "lora", result["method"], result["variant"]])
    licence = result.get("base_license")
    lines = [
        "---",
        *([f"license: {json.dumps(licence, ensure_ascii=False)}"] if licence else []),
        f"base_model: {json.dumps(result['model'], ensure_ascii=False)}",  # a JSON string is a YAML string
        f"library_name: {'lorafit' if result.get('labels') else 'peft'}",
        f"pipeline_tag: {PIPELINES.get(result.get('task', 'generate'), 'text-classification')}",
        "tags:",
        *[f"- {tag}" for tag in tags],
        "---",
    ]
    return "\n".join(lines)


def _spread(ranks: dict[str, int]) -> str:
    each = ranks.values()
    return f"{min(each)} to {max(each)}, {sum(each) / len(each):g} in the mean"


def _by_rank(result: dict[str, Any]) -> dict[str, Any]:
    """Of a run that leaves an adapter of each rank."""
    found = result.get("by_rank") or []
    return {f"rank {one['r']}": f"{one['loss']:.4f}" for one in found if one["loss"] is not None}


def _measured(result: dict[str, Any]) -> dict[str, Any]:
    """Figures with their units, by label."""
    formats: dict[str, tuple[str, Any]] = {
        "train_loss": ("training loss of the last step", "{:.4f}".format),
        "eval_loss": ("best held-out loss", "{:.4f}".format),
        "eval_accuracy": ("accuracy on held-out rows", "{:.4f}".format),
        "eval_macro_f1": ("macro-F1 on held-out rows", "{:.4f}".format),
        "eval_entity_f1": ("F1 of entities on held-out rows", "{:.4f}".format),
        "eval_mae": ("mean absolute error on held-out rows", "{:.4g}".format),
        "eval_r2": ("R2 on held-out rows", "{:.4f}".format),
        "best_step": ("step of the best held-out loss", format_count),
        "steps": ("optimizer steps", format_count),
        "tokens_seen": ("tokens seen", format_count),
        "tokens_supervised": ("of them supervised", format_count),
        "tokens_computed": ("tokens computed, padding included", format_count),
        "ranks": ("ranks of the layers", _spread),
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


def _usage(result: dict[str, Any], adapter: str) -> str:
    """How to load it in four programs; the commands run in the card's directory as they stand.

    PEFT reads what `lora` trains; other methods are in a format of lorafit's own.
    """
    if result.get("labels"):
        return f"## Use\n\nIn this directory:\n\n{_eval(result)}"
    parts = ["## Use", "All commands are for this directory.", _in_lorafit(result)]
    parts += [_in_peft(result, adapter)] if result["method"] == "lora" else []
    parts += [_in_llama_cpp(result), _in_ollama(result)] if "not_exported" in result else []
    return "\n\n".join(parts)


def _eval(result: dict[str, Any]) -> str:
    rows = shlex.quote(result.get("eval_data") or result["data"])
    told = "" if result.get("eval_data") else ", here of the training's rows"
    errors, labels = "errors and correlations", "loss, accuracy, F1 of each label and what is taken for what"
    shown = errors if result.get("task") == "regress" else labels
    merge = "" if result.get("not_merged") else "lorafit merge . -o merged  # for transformers, without lorafit\n"
    return f"""```bash
lorafit eval . {rows}  # {shown}{told}
{merge}```"""


def _in_lorafit(result: dict[str, Any]) -> str:
    rows = shlex.quote(result.get("eval_data") or result["data"])
    told = "" if result.get("eval_data") else "  # the rows of the training: give others"
    merge = "lorafit merge . -o merged  # a plain Hugging Face model, without adapter\n"
    why = result.get("not_merged")
    return f"""### lorafit

```bash
lorafit eval . {rows} --rows 100{told}
lorafit chat .  # /scale 0 is the base model, /scale 1 this one
{"" if why else merge}```""" + (f"\n\nIt cannot be merged: {why}." if why else "")


def _in_peft(result: dict[str, Any], adapter: str) -> str:
    path = Path(result.get("base_path") or result["model"])
    if result.get("base_kind") == "gguf":
        named = f"{json.dumps(str(path.parent))}, gguf_file={json.dumps(path.name)}"
    else:
        named = json.dumps(result["model"])
    room = ""
    if result.get("added_tokens"):
        room = "rows = max(len(tokenizer), base.get_input_embeddings().num_embeddings)\n"
        room += "base.resize_token_embeddings(rows, mean_resizing=False)\n"
    rounded = ""
    if result.get("base_storage") in ROUNDED:
        rounded = (
            f"\n\nIt was trained on a base rounded to {result['base_storage']}; this loads the base as it was before."
        )
    return f"""### PEFT

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{adapter}")
base = AutoModelForCausalLM.from_pretrained({named})
{room}model = PeftModel.from_pretrained(base, "{adapter}")
```{rounded}"""


def _in_llama_cpp(result: dict[str, Any]) -> str:
    refused = result["not_exported"]
    if "gguf" in refused:
        return f"### llama.cpp\n\nNot as it is: {refused['gguf']}."
    merged = "lorafit export . -o tuned.gguf --type q8_0\nllama-cli -m tuned.gguf"
    if "gguf-lora" in refused:
        return f"### llama.cpp\n\n```bash\n{merged}\n```\n\nMerged only: {refused['gguf-lora']}."
    is_gguf = result.get("base_kind") == "gguf"
    base = shlex.quote(str(result["base_path"])) if is_gguf else "base.gguf"
    written = "" if is_gguf else "lorafit export . -o base.gguf --type q8_0 --scale 0  # the base model\n"
    return f"""### llama.cpp

```bash
{merged}
```

Or the adapter alone, over the base at any scale:

```bash
{written}lorafit export . --format gguf-lora -o adapter.gguf
llama-cli -m {base} --lora-scaled adapter.gguf:0.5
```"""


def _in_ollama(result: dict[str, Any]) -> str:
    refused = result["not_exported"]
    if "ollama" in refused:
        return f"### Ollama\n\nNot as it is: {refused['ollama']}."
    return """### Ollama

```bash
lorafit export . --format ollama -o ollama
ollama create tuned -f ollama/Modelfile
ollama run tuned
```"""


def _table(title: str, rows: dict[str, Any]) -> str:
    """A section of two columns; rows without a value are left out, and a section without rows is empty."""
    lines = [f"| {label} | {_cell(value)} |" for label, value in rows.items() if value is not None]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines]) if lines else ""


def _cell(value: Any) -> str:
    """A value on one line of a table: `|` and line breaks would end the cell."""
    return str(value).replace("|", "\\|").replace("\n", "<br>")
