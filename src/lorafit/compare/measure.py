"""What a child process does for a comparison: measure one run, or the base, row by row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from lorafit.compare import labelled
from lorafit.compare.shots import with_examples
from lorafit.config import CompareConfig, EvalConfig
from lorafit.data.example import Example
from lorafit.data.mask import encode_all, expected_reply, prompt_ids
from lorafit.engine.engine import Engine, prepare
from lorafit.infer.evaluate import answers, is_right, row_losses
from lorafit.infer.generate import context_tokens, unended
from lorafit.methods import table
from lorafit.opening import Opened
from lorafit.trials.measuring import KEEP_TOKENS, examples_of, losses_of, open_model, text_to_keep

# Tokens and repeats by which a speed is measured, after one that is not counted.
TIMED_TOKENS, TIMED_REPEATS = 12, 5
ANSWERED_TOGETHER = int(EvalConfig.model_fields["batch_size"].default)


def look(config: CompareConfig, train: str, test: str, console: Console) -> dict[str, Any]:
    """How long the test rows' replies are: {"longest_reply": tokens}, None for running text and rows with labels.

    Of those also what `labelled.look` says. Raises LorafitError.
    """
    names = labelled.labels_of(config, train)
    if names is not None:
        return labelled.look(config, names, test)
    opened = open_model(config.model, config, config.precision, console)
    replies = [reply for example in examples_of(test, config) if (reply := expected_reply(example)) is not None]
    if not replies:
        return {"longest_reply": None, "precision": opened.precision}
    ids = opened.tokenizer(replies, add_special_tokens=False)["input_ids"]
    return {"longest_reply": max(map(len, ids)), "precision": opened.precision}


def losses(target: str, config: CompareConfig, precision: str, data: str, console: Console) -> dict[str, Any]:
    """The loss of each row of `data` alone. Raises LorafitError."""
    opened = open_model(target, config, precision, console)
    if opened.labels is not None:
        side: dict[str, Any] = labelled.measured(opened, config, {"valid": data}, timed=False)["sides"]["valid"]
        return side
    return losses_of(prepare(opened.model, share_prefix=True), opened, examples_of(data, config), config)


def measure(
    target: str,
    config: CompareConfig,
    precision: str,
    sides: dict[str, str],
    keep: str,
    generate: bool,
    timed: bool,
    console: Console,
) -> dict[str, Any]:
    """A run or the base, on the rows of every side by their names, and on what is to be kept. Raises LorafitError.

    Returns sides: of each the rows' nats, tokens and, of the test rows where `generate`, whether they were answered
    right; keep: the same of the text to be kept, None where no text is written; latency_s, None unless `timed`.
    """
    opened = open_model(target, config, precision, console)
    if opened.labels is not None:
        found = labelled.measured(opened, config, sides, timed)
        text = labelled.text_model(opened, target, config, precision)
        return found | {"keep": _keep(prepare(text.model, share_prefix=True), text, keep) if text else None}
    engine = prepare(opened.model, share_prefix=True)
    found = {"sides": {}, "keep": _keep(engine, opened, keep)}
    for name, path in sides.items():
        examples = examples_of(path, config)
        found["sides"][name] = losses_of(engine, opened, examples, config)
        if name == "test":
            found["sides"][name]["right"] = _right(opened, examples) if generate else None
            found["latency_s"] = _latency(opened, examples) if timed else None
    return found


def constant(config: CompareConfig, train: str, test: str, console: Console) -> dict[str, Any]:
    """What telling every row the same reaches on the test rows. Raises LorafitError."""
    names = labelled.labels_of(config, train)
    assert names is not None  # it is asked for rows with labels alone
    return labelled.constant(config, names, train, test)


def few_shot(
    config: CompareConfig, precision: str, train: str, test: str, generate: bool, console: Console
) -> dict[str, Any]:
    """The base with examples in its prompt, on the test rows, as `measure`. shots: how many fitted, 0 where none can.

    Where rows have labels it is asked for them as text; its loss is then that of a row's label, as a head's is. Raises
    LorafitError.
    """
    opened = open_model(config.model, config, precision, console)
    given, drawn = examples_of(test, config), [labelled.as_text(one) for one in examples_of(train, config)]
    examples = [labelled.as_text(one) for one in given]
    room = min(config.seq_len, context_tokens(opened.model) or config.seq_len)
    # Under `all` what the examples say would have a loss too.
    for shots in range(config.shots if config.loss_on != "all" else 0, 0, -1):
        longer = with_examples(examples, drawn, shots, config.seed, opened.tokenizer.chat_template is not None)
        if longer is None:
            break
        encoded = encode_all(longer, opened.tokenizer, config.seq_len, config.loss_on)
        if encoded.longest < room and not encoded.cut_rows:
            engine = prepare(opened.model, share_prefix=True)
            found = losses_of(engine, opened, longer, config)
            if examples != given:
                found["tokens"] = [1] * len(examples)
            right = _right(opened, longer) if generate else None
            return {"shots": shots, **found, "right": right, "latency_s": _latency(opened, longer)}
    return {"shots": 0}


def _right(opened: Opened, examples: Sequence[Example]) -> list[bool] | None:
    """Which rows are answered right; None where rows have no reply."""
    replies = [reply for example in examples if (reply := expected_reply(example)) is not None]
    if len(replies) < len(examples):
        return None
    got = answers(opened.model, opened.tokenizer, examples, replies, ANSWERED_TOGETHER, None, lambda: None)
    return [is_right(one, reply) for one, reply in zip(got, replies, strict=True)]


def _keep(engine: Engine, opened: Opened, keep: str) -> dict[str, Any]:
    """Loss on what was known before."""
    engine.model.eval()
    nats, tokens = row_losses(engine, text_to_keep(keep, opened).encoded, KEEP_TOKENS)
    return {"nats": nats.tolist(), "tokens": tokens.tolist()}


@torch.no_grad()
def _latency(opened: Opened, examples: Sequence[Example]) -> dict[str, float]:
    """Seconds to the first token and for each further one, of the model as it is and, by turns, of its base.

    One prompt of middling length at a time; medians of TIMED_REPEATS. By turns, so that what else the machine does
    meets both. A model without an adapter is its own base.
    """
    prompts = sorted((_prompt(example, opened) for example in examples), key=len)
    prompt = prompts[len(prompts) // 2]
    scales = (1.0, 0.0) if opened.has_adapter else (1.0,)
    times: dict[float, list[tuple[float, float]]] = {scale: [] for scale in scales}
    for repeat in range(TIMED_REPEATS + 1):
        for scale in scales:
            if opened.has_adapter:
                table.of(opened.model).set_scale(opened.model, scale)
            timed = _timed(partial(unended, opened.model, prompt, TIMED_TOKENS))
            if repeat:
                times[scale].append(timed)
    if opened.has_adapter:
        table.of(opened.model).set_scale(opened.model, 1.0)
    own, base = times[1.0], times.get(0.0, times[1.0])
    names = ("first_token", "per_token")
    found = {name: statistics.median(one[at] for one in own) for at, name in enumerate(names)}
    return found | {f"base_{name}": statistics.median(one[at] for one in base) for at, name in enumerate(names)}


def _timed(tokens: Any) -> tuple[float, float]:
    started = time.perf_counter()
    at = [time.perf_counter() - started for _ in tokens()]
    return at[0], (at[-1] - at[0]) / max(1, len(at) - 1)


def _prompt(example: Example, opened: Opened) -> list[int]:
    if expected_reply(example) is not None:
        return prompt_ids(example, opened.tokenizer)
    ids = encode_all([example], opened.tokenizer, KEEP_TOKENS).encoded[0].input_ids
    return [int(token) for token in ids[: max(1, len(ids) // 2)]]
