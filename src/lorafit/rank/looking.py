"""What a child process does for `lorafit rank`: a look at base and rows without training, and a run's losses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorafit.config import RankConfig, TrainConfig
from lorafit.data.batching import step_rows
from lorafit.data.example import Plain
from lorafit.data.mask import encode_all
from lorafit.data.pack import micro_batches
from lorafit.engine import precision
from lorafit.engine.engine import Engine, prepare
from lorafit.rank import distance, spectra
from lorafit.rank.energies import Spectrum
from lorafit.rank.expected import Pace, expect
from lorafit.trials.measuring import examples_of, losses_of, open_model, text_to_keep

if TYPE_CHECKING:
    from lorafit.data.store import Encoded
    from lorafit.engine.batch import Batch

# Of the rows every fourth is looked at before training, but so many at least and at most; of the steps of the run every
# fifteenth, as far as the first epoch has them: then a look takes about a fifth of the run, and less of a longer one.
# After a third of the steps the energies of weights are the same to a correlation of 0.999, and the effective rank a
# twelfth less.
ROWS_BY, LEAST_ROWS, MOST_ROWS = 4, 64, 256
STEPS_BY, LEAST_STEPS, MOST_STEPS = 15, 4, 12
# Steps of it whose rows tell what a held-out one will take.
PACED_STEPS = 2
# Rows that are shown as the furthest, and the most characters of each.
FURTHEST, SHOWN_CHARS = 5, 160
MICRO_TOKENS = int(TrainConfig.model_fields["micro_tokens"].default)


def look(config: RankConfig, most: int, train: str, held_out: int, keep: str, console: Console) -> dict[str, Any]:
    """How far the rows are from what the base knows, and the spectra of their gradients. Raises LorafitError.

    most: the largest rank that is asked for. held_out: rows of the other side. Returns `precision` and `run_precision`,
    which is int8 where this was bf16, `supervised_tokens` of all rows, `distance`, `spectra` by weight, and `expected`,
    the seconds of the run of all ranks by the pace here.
    """
    started = time.perf_counter()
    opened = open_model(config.model, config, config.precision, console)
    examples = examples_of(train, config)
    encoded = encode_all(examples, opened.tokenizer, config.seq_len, config.loss_on)
    every = encoded.encoded
    chosen = [every[n] for n in distance.evenly(len(every), _within(len(every) // ROWS_BY, LEAST_ROWS, MOST_ROWS))]
    reference = text_to_keep(keep, opened).encoded
    bare = prepare(opened.model, share_prefix=True)  # layers that hold sketches cost a quarter more
    load_s = time.perf_counter() - started
    far = distance.measure(bare, opened.model, opened.tokenizer, chosen, reference, config.seq_len, config.seed)
    bare.close()
    told = [_told(opened.tokenizer, chosen[n], far, n) for n in far.furthest(FURTHEST)]
    layers = spectra.attach(opened.model, most)
    engine = prepare(opened.model, share_prefix=True)
    engine.model.eval()
    steps, of_steps = _steps(config, engine, every), Pace()
    found = spectra.measure(engine, layers, steps, config.seed, of_steps)
    row_s, pieces = _row_s(engine, steps), round(held_out * len(every) / len(examples))
    return {
        "precision": opened.precision,
        "run_precision": precision.choose(config.precision),
        "rows": len(examples),
        "is_text": isinstance(examples[0], Plain),
        "supervised_tokens": encoded.supervised_tokens,
        "distance": {
            "data": far.data, "own": far.own, "reference": far.reference, "surprise": far.surprise,
            "rows": len(chosen), "furthest": told,
        },
        "spectra": {name: _as_json(one) for name, one in found.items()},
        "expected": asdict(expect(config, most, len(every), pieces, load_s, of_steps.usual, row_s)),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _steps(config: RankConfig, engine: Engine, rows: Sequence[Encoded]) -> list[list[Batch]]:
    """Steps of the first epoch that lie evenly in it."""
    count = -(-len(rows) // config.batch_size)
    run = config.max_steps or count * config.epochs
    numbers = distance.evenly(count, _within(run // STEPS_BY, LEAST_STEPS, MOST_STEPS))
    steps = [step_rows(len(rows), config.batch_size, config.seed, 0, number) for number in numbers]
    return [list(micro_batches(rows, own, MICRO_TOKENS, engine.packing)) for own in steps]


def _row_s(engine: Engine, steps: Sequence[Sequence[Batch]]) -> float:
    """Seconds of a held-out piece, as a run measures it: with layers, in passes no larger than those of its steps."""
    batches = [batch for step in steps[:PACED_STEPS] for batch in step]
    started = time.perf_counter()
    for batch in batches:
        engine.nll_and_likeliest(batch)
    return (time.perf_counter() - started) / sum(batch.rows for batch in batches)


def _within(count: int, least: int, most: int) -> int:
    return max(least, min(most, count))


def _told(tokenizer: Any, row: Encoded, far: distance.Distance, number: int) -> dict[str, Any]:
    """A row as it can be found again: where it stands, and how it ends."""
    text = tokenizer.decode(row.input_ids[row.supervised], skip_special_tokens=True).strip()
    shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."
    return {"origin": str(row.origin), "loss": float(far.by_row[number]), "tokens": int(far.tokens[number]),
            "text": shown}  # fmt: skip


def _as_json(one: Spectrum) -> dict[str, Any]:
    return {"shape": one.shape, "energies": one.energies.tolist(), "rest": one.rest}


def losses(run: str, config: RankConfig, precision: str, valid: str, console: Console) -> dict[str, Any]:
    """What a run loses on each row of `valid`: nats and tokens. Raises LorafitError."""
    opened = open_model(run, config, precision, console)
    return losses_of(prepare(opened.model, share_prefix=True), opened, examples_of(valid, config), config)
