"""What a child computes for commands of many runs: a run, and what a run or the base loses on each row."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from lorafit.config import TrainConfig, TrialsConfig
from lorafit.data.example import Example
from lorafit.data.formats import read_examples
from lorafit.data.load import locate
from lorafit.data.mask import EncodedSet, encode_all
from lorafit.data.template import use_template
from lorafit.engine.engine import Engine
from lorafit.infer.evaluate import by_row, row_losses
from lorafit.opening import Opened, open_target
from lorafit.plan import machine
from lorafit.run import Start
from lorafit.run import train as train_run

# Text to be kept is cut into pieces of so many tokens, so that a long one is not read at once.
KEEP_TOKENS = 512


def train(settings: dict[str, Any], console: Console) -> dict[str, Any]:
    """One run, or the rest of it. Returns run.json's content. Raises LorafitError."""
    return train_run(TrainConfig(**settings), {}, Start(True, False, time.time()), console)


def open_model(target: str, config: TrialsConfig, precision: str, console: Console) -> Opened:
    """A run or a model, in its settings. Raises LorafitError."""
    torch.set_num_threads(config.threads or machine.usual_threads())
    found = open_target(target, None, 1.0, precision, config.trust_remote_code, console, labelled=True)
    if config.template:
        use_template(found.tokenizer, config.template)
    return found


def examples_of(path: str, config: TrialsConfig) -> list[Example]:
    """The rows of a side. Raises DataError."""
    return read_examples(locate(path).train().rows(), config.format, config.rename)


def text_to_keep(path: str, model: Opened) -> EncodedSet:
    """What should not be forgotten. A long text is read in pieces. Raises DataError."""
    most = model.spec.most_tokens
    piece = min(KEEP_TOKENS, most // 2) if most else KEEP_TOKENS  # half is left for virtual tokens in front
    return encode_all(read_examples(locate(path).unseen().rows()), model.tokenizer, piece)


def losses_of(engine: Engine, model: Opened, examples: Sequence[Example], config: TrialsConfig) -> dict[str, Any]:
    """Nats and tokens of each row."""
    engine.model.eval()
    encoded = encode_all(examples, model.tokenizer, config.seq_len, config.loss_on)
    nats, tokens = row_losses(engine, encoded.encoded, config.seq_len)
    return by_row({"nats": nats, "tokens": tokens}, encoded.encoded)
