"""A few rows as the base model answers them and as the tuned one does, from one load: scale 0 against scale 1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from rich.console import Console

from lorafit.config import ReportConfig, RowsConfig
from lorafit.data.example import Example, Plain
from lorafit.data.labels import reader_of
from lorafit.data.load import Source, locate
from lorafit.data.mask import expected_reply, prompt_ids
from lorafit.data.rows import Row
from lorafit.errors import ConfigError, DataError
from lorafit.infer.answers import of_head
from lorafit.infer.evaluate import question
from lorafit.infer.generate import answer, decode
from lorafit.infer.label_rows import MICRO_TOKENS, encode_labelled
from lorafit.infer.labels import measure
from lorafit.methods import table
from lorafit.methods.labels import Labels, Pooled, engine_of
from lorafit.opening import Opened, open_target
from lorafit.rundir import RunDir

# Rows to choose from, evenly: the first ones of a file are often alike.
LOOKED_AT = 1000
# Running text is given so many tokens, at most, and goes on for as many; an answer goes on for a few more than is
# expected, so that it is seen where it does not end.
TEXT_TOKENS, BEYOND = 48, 16
NAMES = ("prompt", "expected", "base", "tuned")
BEFORE = "base (scale 0)"
HEAD_BEFORE = "the base's features under the trained head (scale 0)"


def answers_of(run: RunDir, config: ReportConfig, log: Console) -> dict[str, Any]:
    """told: where the rows are from; before: what the base's answers are; rows: prompt, expected, base, tuned of each.

    Raises LorafitError: the model is gone or another one, the rows are gone.
    """
    settings, result = run.read_config(), run.read_result()
    source, told = _source(result)
    rows, examples = _spread(source, settings, result.get("task", "generate"), config.samples)
    labelled = result.get("task", "generate") != "generate"
    if labelled and result["method"] == "head":
        raise ConfigError(
            "a head alone was trained, and the base without it tells no labels apart", "Use `lorafit eval`"
        )
    opened = open_target(str(run.path), None, 1.0, config.precision, config.trust_remote_code, log, labelled=labelled)
    if opened.labels:
        return {
            "told": told,
            "before": HEAD_BEFORE,
            "rows": _labels(opened, opened.labels, rows, examples, settings),
        }
    return {"told": told, "before": BEFORE, "rows": _replies(opened, examples)}


def _source(result: dict[str, Any]) -> tuple[Source, str]:
    """Rows that were not trained on, where there are any."""
    if result.get("eval_data"):
        return locate(result["eval_data"]).unseen(), f"Rows of {result['eval_data']}, which was held out."
    located = locate(result["data"])
    for side in ("test", "valid"):
        if side in located.sides:
            return located.sides[side], f"Rows of the {side} file of {result['data']}, which was not trained on."
    return located.train(), f"Rows of {result['data']}, which was trained on."


def _spread(source: Source, settings: dict[str, Any], task: str, count: int) -> tuple[list[Row], list[Example]]:
    """Rows that lie evenly among the first ones, and what they hold. Those that cannot be used are passed over."""
    reader, usable, reason = reader_of(settings.get("format"), settings.get("rename", {}), task), [], "it is empty"
    for row in islice(source.rows(), LOOKED_AT):
        try:
            usable.append((row, reader.read(row)))
        except DataError as error:
            reason = error.what
    if not usable:
        raise DataError(f"no row of {source.name} can be used: {reason}", "Is it the file that was given?")
    count = min(count, len(usable))
    chosen = [usable[n * len(usable) // count] for n in range(count)]
    return [row for row, _ in chosen], [example for _, example in chosen]


def _replies(opened: Opened, examples: Sequence[Example]) -> list[dict[str, str]]:
    prompts, shown, expected = [], [], []
    for example in examples:
        ids, prompt, reply = _parts(example, opened)
        prompts.append(ids)
        shown.append(prompt)
        expected.append(reply)
    longest = max(len(ids) for ids in opened.tokenizer(expected, add_special_tokens=False)["input_ids"])
    texts = {}
    for scale in (0.0, 1.0):
        table.of(opened.model).set_scale(opened.model, scale)
        got = answer(
            opened.model, opened.tokenizer, prompts, batch_size=len(prompts), max_new_tokens=longest + BEYOND,
            temperature=0.0, seed=0, on_answer=lambda: None,
        )  # fmt: skip
        texts[scale] = [one.text for one in got]
    return [dict(zip(NAMES, row, strict=True)) for row in zip(shown, expected, texts[0.0], texts[1.0], strict=True)]


def _parts(example: Example, opened: Opened) -> tuple[list[int], str, str]:
    """Token ids of the prompt, and prompt and reply as text. Running text is cut in two."""
    if not isinstance(example, Plain):
        return prompt_ids(example, opened.tokenizer), question(example), expected_reply(example) or ""
    ids = opened.tokenizer(example.text, add_special_tokens=False)["input_ids"][: 2 * TEXT_TOKENS]
    half = max(1, len(ids) // 2)
    return ids[:half], decode(opened.tokenizer, ids[:half]), decode(opened.tokenizer, ids[half:])


def _labels(
    opened: Opened, labels: Labels, rows: Sequence[Row], examples: Sequence[Example], settings: dict[str, Any]
) -> list[dict[str, str]]:
    """What the head says of each row."""
    reading = RowsConfig(**{name: settings[name] for name in RowsConfig.model_fields if name in settings})
    encoded = encode_labelled(rows, opened.tokenizer, labels, reading, isinstance(opened.model, Pooled)).set.encoded
    engine, said = engine_of(opened.model, share_prefix=True), []
    for scale in (0.0, 1.0):
        table.of(opened.model).set_scale(opened.model, scale)
        found = measure(engine, encoded, labels, MICRO_TOKENS, lambda rows: None)
        said.append(of_head(examples, labels.names, found))
    return [
        dict(zip(NAMES, (before.prompt, before.expected, before.got, after.got), strict=True))
        for before, after in zip(*said, strict=True)
    ]
