"""How good a model is on rows: its loss on supervised tokens, and whether its own answers are the expected ones."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorafit.data.example import Chat, Completion, Example
from lorafit.data.mask import encode_all, expected_reply, prompt_ids
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded, led
from lorafit.engine.batch import Batch
from lorafit.engine.engine import Engine, prepare
from lorafit.errors import NumericsError
from lorafit.infer.generate import Answer, answer
from lorafit.methods.virtual import lead_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TOKENS_BEYOND_EXPECTED = 16  # room for an answer that goes on where it should have ended


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as it went. prompt: the last message before the reply. right: as exact_match counts; None of a number."""

    prompt: str
    expected: str
    got: str
    right: bool | None


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What an evaluation measured.

    loss: nats per supervised token, the mean over all of them. perplexity: exp(loss), infinite where that overflows.
    exact_match: share of rows whose answer is the expected last reply, whitespace around both left out. accuracy: share
    of rows whose answer is right; for rows with a reply, right means an exact match. valid_json: share of answers that
    are a JSON object, where every expected reply is one. These three are None where nothing was generated: running
    text, or generate=False.
    rows: evaluated. tokens_supervised: tokens with a loss. cut_rows: rows that lost their end to seq_len.
    cut_answers: answers that a limit ended, not the model. samples: the first rows, in order.
    """

    loss: float
    perplexity: float
    exact_match: float | None
    accuracy: float | None
    valid_json: float | None
    rows: int
    tokens_supervised: int
    cut_rows: int
    cut_answers: int
    seconds: float
    samples: tuple[Sample, ...]


def evaluate(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int | None,
    generate: bool,
    samples: int,
    seq_len: int,
    micro_tokens: int,
    console: Console,
) -> EvalResult:
    """Measure the engine's model on `examples`, in eval mode and greedily; `console` shows a bar if it is a terminal.

    batch_size: most rows that answer together. max_new_tokens: of an answer; None: the longest expected reply's tokens
    and 16 more. generate: whether the model answers at all. samples: how many of the first rows are kept to be shown.
    seq_len: most tokens of a row, as in training; the prompt of an answer is never cut.
    micro_tokens: most tokens of a forward pass that measures the loss. Raises DataError for rows that do not fit the
    model, NumericsError for a loss or logits that are not finite.
    """
    started = time.perf_counter()
    engine.model.eval()
    encoded = encode_all(examples, tokenizer, seq_len)
    replies = [reply for example in examples if (reply := expected_reply(example)) is not None] if generate else []
    with progress_bar(console) as bar:
        loss = mean_loss(engine, encoded.encoded, micro_tokens, counter(bar, "loss", encoded.pieces))
        count = counter(bar, "answers", len(replies))
        model, most = engine.model, max_new_tokens
        got = answers(model, tokenizer, examples, replies, batch_size, most, lambda: count(1)) if replies else []
    right = [is_right(one, reply) for one, reply in zip(got, replies, strict=True)]
    share = sum(right) / len(right) if right else None
    return EvalResult(
        loss=loss,
        perplexity=perplexity(loss),
        exact_match=share,
        accuracy=share,
        valid_json=_valid_json(got, replies),
        rows=len(examples),
        tokens_supervised=encoded.supervised_tokens,
        cut_rows=encoded.cut_rows,
        cut_answers=sum(not one.ended for one in got),
        seconds=time.perf_counter() - started,
        samples=tuple(
            Sample(question(example), reply, one.text, good)
            for example, reply, one, good in zip(examples[:samples], replies, got, right, strict=False)
        ),
    )


@torch.no_grad()
def mean_loss(engine: Engine, rows: Sequence[Encoded], micro_tokens: int, on_rows: Callable[[int], None]) -> float:
    """Nats per supervised token, the mean over all of them. on_rows: called with how many rows were just measured.

    Raises NumericsError if it is not finite.
    """
    total, count = 0.0, 0
    given = led(rows, lead_of(engine.model))
    for batch in micro_batches(given, range(len(rows)), micro_tokens, engine.packing):
        total, count = total + float(engine.loss(batch)), count + batch.supervised_tokens
        on_rows(batch.rows)
    return finite(total / count)


def finite(loss: float) -> float:
    """The loss, if it is a finite number. Raises NumericsError."""
    if not math.isfinite(loss):
        raise NumericsError(
            f"the loss is {loss}, not a finite number",
            "Lower --scale, use --precision fp32, or check the adapter's weights",
        )
    return loss


def model_loss(model: Any, rows: Sequence[Encoded], micro_tokens: int) -> float:
    """`mean_loss` of a model that is left as it was. Raises NumericsError if it is not finite."""
    engine = prepare(model, share_prefix=True)
    try:
        return mean_loss(engine, rows, micro_tokens, lambda _: None)
    finally:
        engine.close()


def row_losses(
    engine: Engine, rows: Sequence[Encoded], micro_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Of each row the nats of its supervised tokens, added up, and how many those are: (rows,) both.

    Their sums divided are `mean_loss`. What rows have in common is computed once; each has its own part of the loss.
    Nothing is refused here: a loss that is not finite stands as such.
    """
    nats, counts = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    for number, told in _of_rows(engine, rows, micro_tokens, engine.nll):
        nats[number], counts[number] = sum(told), len(told)
    return nats, counts


def row_scores(
    engine: Engine, rows: Sequence[Encoded], micro_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """As `row_losses`, and of each row how many of its supervised tokens are the likeliest ones: (rows,).

    Where all of them are, the model's greedy answer is the row's reply, token for token.
    """
    nats, counts, likeliest = np.zeros(len(rows)), *np.zeros((2, len(rows)), dtype=np.int64)
    for number, told in _of_rows(engine, rows, micro_tokens, engine.nll_and_likeliest):
        nats[number], likeliest[number] = np.sum(told, 0)
        counts[number] = len(told)
    return nats, counts, likeliest


def by_row(
    columns: Mapping[str, NDArray[np.float64] | NDArray[np.int64]], pieces: Sequence[Encoded]
) -> dict[str, list[Any]]:
    """Figures of pieces, added up to those of rows; pieces of a single long text stand for themselves."""
    origins: list[Any] = [piece.origin for piece in pieces]
    if len(set(origins)) == 1:
        origins = list(range(len(origins)))
    found = {}
    for name, values in columns.items():
        added = dict.fromkeys(origins, 0.0 if values.dtype.kind == "f" else 0)
        for origin, own in zip(origins, values.tolist(), strict=True):
            added[origin] += own
        found[name] = list(added.values())
    return found


def _of_rows(
    engine: Engine,
    rows: Sequence[Encoded],
    micro_tokens: int,
    compute: Callable[[Batch], Tensor],
) -> Iterator[tuple[int, list[Any]]]:
    """(number of a row, what is told of each of its supervised tokens). compute: of a batch's pairs, in their order."""
    given = led(rows, lead_of(engine.model))
    for batch in micro_batches(given, range(len(rows)), micro_tokens, engine.packing):
        pairs = zip(batch.predicts.tolist(), batch.targets.tolist(), strict=True)
        # Rows that go on from the same place with the same token have the same pair, and the same loss.
        found = dict(zip(pairs, compute(batch).tolist(), strict=True))
        for number, places in batch.row_places():
            ids, at = given[number].input_ids.tolist(), np.flatnonzero(given[number].supervised).tolist()
            yield number, [found[int(places[t - 1]), ids[t]] for t in at]


def perplexity(loss: float) -> float:
    """exp(loss): among how many equally likely tokens the model seems to choose. Infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    replies: list[str],
    batch_size: int,
    max_new_tokens: int | None,
    on_answer: Callable[[], None],
) -> list[Answer]:
    """The model's own reply to each row, greedily. The rest as of `evaluate`."""
    longest = max(len(ids) for ids in tokenizer(replies, add_special_tokens=False)["input_ids"])
    return answer(
        model,
        tokenizer,
        [prompt_ids(example, tokenizer) for example in examples],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens or longest + TOKENS_BEYOND_EXPECTED,
        temperature=0.0,
        seed=0,
        on_answer=on_answer,
    )


def is_right(got: Answer, reply: str) -> bool:
    """Whether an answer is the expected reply, whitespace around both left out."""
    return got.text.strip() == reply.strip()


def question(example: Example) -> str:
    """What is asked last; empty for running text."""
    if isinstance(example, Chat):
        return example.messages[-2]["content"] if len(example.messages) > 1 else ""
    return example.prompt if isinstance(example, Completion) else ""


def _valid_json(answers: list[Answer], replies: list[str]) -> float | None:
    if not replies or not all(map(_is_json_object, replies)):
        return None
    return sum(_is_json_object(got.text) for got in answers) / len(answers)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_constant=_no_constant), dict)
    except (ValueError, RecursionError):
        return False


def _no_constant(name: str) -> None:
    """Python reads NaN and Infinity, which JSON has not."""
    raise ValueError(name)


def progress_bar(console: Console) -> Progress:
    """Rows that are done, on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("rows, left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def counter(bar: Progress, name: str, total: int) -> Callable[[int], None]:
    """A line of the bar; call it with how many rows are done now."""
    task = bar.add_task(name, total=total)
    return lambda rows: bar.advance(task, rows)
