"""What a child process does where rows have labels: measure a head row by row, and what needs no training."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lorafit.config import CompareConfig, TrainConfig
from lorafit.data.example import Completion, Example, Labelled
from lorafit.data.labels import Names, labelled, reader_of, tagged, value_of
from lorafit.data.load import locate
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded, led, starts_of
from lorafit.engine.engine import Engine
from lorafit.export import saved
from lorafit.infer.label_rows import MICRO_TOKENS, encode_labelled
from lorafit.infer.labels import LabelsMeasured, measure_scores, scores_of
from lorafit.methods import table
from lorafit.methods.labels import ATTRIBUTE, Labels, Pooled, engine_of, label_head
from lorafit.methods.virtual import lead_of
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec
from lorafit.opening import Opened, find, load_base
from lorafit.train.labelled import find_labels, precision_of

TIMED_REPEATS = 9
# Rows of text that ask the base for a label, as one who has no head would.
ASKED = "{text}\nLabel:"
Record = dict[str, Any]


def labels_of(config: CompareConfig, train: str) -> Names | None:
    """What the training rows are labelled with; None where the model is to write text. Raises DataError."""
    settings = {"model": config.model, "data": train, "output": "", "format": config.format, "rename": config.rename}
    return find_labels(TrainConfig(**settings, task=config.task), locate(train).train())


def look(config: CompareConfig, names: Names, test: str) -> Record:
    """As `measure.look`: the precision that all are measured in, and what the rows ask for. Raises LorafitError.

    Reads the test rows: a label among them that no training row has is told before anything runs.
    """
    spec = model_spec.read(config.model)
    is_encoder = model_load.is_encoder(spec)
    tokenizer = model_load.load_tokenizer(spec, config.trust_remote_code)
    labels = Labels(**{**asdict(names), "pooling": "last"})
    encode_labelled(locate(test).train().rows(), tokenizer, labels, config, whole=is_encoder)
    settings = {"model": config.model, "data": test, "output": "", "precision": config.precision}
    chosen = precision_of(TrainConfig(**settings), is_encoder)
    return {
        "longest_reply": None,
        "precision": "bf16" if chosen == "int8" else chosen,
        "labels": {"task": names.task, "several": names.several, "writes_text": not is_encoder},
    }


def measured(opened: Opened, config: CompareConfig, sides: dict[str, str], timed: bool) -> Record:
    """As `measure.measure`, of a run with a head of labels, without what is to be kept."""
    assert opened.labels is not None
    engine = engine_of(opened.model, share_prefix=True)
    found: Record = {"sides": {}, "latency_s": None}
    for name, path in sides.items():
        whole, rows = isinstance(opened.model, Pooled), locate(path).train().rows()
        encoded = encode_labelled(rows, opened.tokenizer, opened.labels, config, whole).set.encoded
        found["sides"][name] = _side(engine, encoded, opened.labels)
        if name == "test" and timed:
            found["latency_s"] = _latency(engine, encoded)
    engine.close()
    return found


def _side(engine: Engine, rows: Sequence[Encoded], labels: Labels) -> Record:
    head = label_head(engine.model)
    assert head is not None  # its rows have labels
    scores, targets = scores_of(engine, rows, MICRO_TOKENS, lambda count: None)
    starts = starts_of(rows)
    found = measure_scores(head, scores, targets, labels, starts)
    nats = np.add.reduceat(head.nll(scores.double(), targets).numpy(), starts[:-1])
    side: Record = {"nats": nats.tolist(), "tokens": np.diff(starts).tolist(), "right": None, "macro_f1": None}
    if isinstance(found, LabelsMeasured):
        right = np.ones(len(targets), dtype=np.int64)
        right[[one.row for one in found.wrong]] = 0
        right = np.add.reduceat(right, starts[:-1])
        side |= {"right": right.tolist(), "of": side["tokens"], "macro_f1": found.macro_f1}
    return side


@torch.no_grad()
def _latency(engine: Engine, rows: Sequence[Encoded]) -> Record:
    """Seconds of one row of middling length, as it is and, by turns, of the base without update and head."""
    given = led(rows, lead_of(engine.model))
    number = sorted(range(len(rows)), key=lambda row: len(rows[row].input_ids))[len(rows) // 2]
    (own,) = micro_batches(given, [number], MICRO_TOKENS, engine.packing)
    (bare,) = micro_batches(rows, [number], MICRO_TOKENS, engine.packing)
    method, head = table.of(engine.model), label_head(engine.model)
    assert head is not None
    scaled = getattr(engine.model, "_lorafit_method", "") != "head"
    times: dict[str, list[float]] = {"row": [], "base_row": []}
    for repeat in range(TIMED_REPEATS + 1):
        for name, scale, batch in (("row", 1.0, own), ("base_row", 0.0, bare)):
            if scaled:
                method.set_scale(engine.model, scale)
            started = time.perf_counter()
            features = engine.head_inputs(batch)
            if scale:
                head(features)
            if repeat:
                times[name].append(time.perf_counter() - started)
    if scaled:
        method.set_scale(engine.model, 1.0)
    return {name: statistics.median(some) for name, some in times.items()}


def text_model(opened: Opened, target: str, config: CompareConfig, precision: str) -> Opened | None:
    """A run's decoder with the head for text in its place again, to see what was forgotten.

    None for an encoder, and for a head alone, which leaves the model as it is.
    """
    found = find(target, None)
    assert found.adapter is not None
    if model_load.is_encoder(opened.spec) or saved.method_of(found.adapter) == "head":
        return None
    base = load_base(found, opened.spec, precision, config.trust_remote_code)[0].model
    head: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
    if base.config.tie_word_embeddings and saved.method_of(found.adapter) == "full":
        embedding: Any = opened.model.get_input_embeddings()
        head.weight = nn.Parameter(embedding.weight.detach(), requires_grad=False)
    opened.model.set_output_embeddings(head)  # type: ignore[no-untyped-call]
    delattr(opened.model, ATTRIBUTE)
    return replace(opened, labels=None)


# --- what needs no training -------------------------------------------------------------------------------------------


def constant(config: CompareConfig, names: Names, train: str, test: str) -> Record:
    """The floor of telling every row the same: the training rows' most frequent label or tag, or their mean number.

    Of labels the loss is that of their shares, as the certainty; where several may hold, of each by itself.
    """
    told, rows = (_told(path, config, names) for path in (train, test))
    if names.task == "regress":
        off = [((value - names.mean) / names.deviation) ** 2 for (value,) in rows]
        return {"nats": off, "tokens": [1] * len(off), "right": None, "told": f"{names.mean:.6g}"}
    counts = Counter(label for own in told for label in own)
    if names.several:
        shares = {name: (counts[name] + 1) / (len(told) + 2) for name in names.names}
        usual = {name for name, share in shares.items() if share > 0.5}
        nats = [-sum(math.log(shares[n] if n in own else 1 - shares[n]) for n in names.names) for own in rows]
        right, weights = [int(set(own) == usual) for own in rows], [1] * len(rows)
    else:
        usual = {max(names.names, key=lambda name: counts[name])}
        nats = [-sum(math.log(counts[label] / counts.total()) for label in own) for own in rows]
        right, weights = [sum(label in usual for label in own) for own in rows], [len(own) for own in rows]
    return {"nats": nats, "tokens": weights, "right": right, "of": weights, "told": ", ".join(sorted(usual))}


def _told(path: str, config: CompareConfig, names: Names) -> list[tuple[Any, ...]]:
    """Of each row its labels, its tags, or its number."""
    reader = reader_of(config.format, config.rename, names.task)
    examples = [reader.read(row) for row in locate(path).train().rows()]
    if names.task == "regress":
        return [(value_of(example),) for example in examples]
    return [tagged(one).tags if names.task == "tag" else labelled(one).labels for one in examples]


def as_text(example: Example) -> Example:
    """A text with a label as a prompt that asks for it, and the label as the answer."""
    if not isinstance(example, Labelled):
        return example
    return Completion(ASKED.format(text=example.text), f" {example.labels[0]}", example.origin)
