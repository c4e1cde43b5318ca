"""All answers of an evaluation as a file of JSON Lines: what was asked, expected and answered, beside the row."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lorafit import files
from lorafit.data.example import Example, Labelled, Tagged
from lorafit.data.mask import expected_reply
from lorafit.data.rows import Row
from lorafit.errors import ConfigError
from lorafit.infer.evaluate import Sample
from lorafit.infer.labels import LabelsMeasured
from lorafit.infer.numbers import NumbersMeasured


def check(path: Path, examples: Sequence[Example], generate: bool) -> None:
    """Before anything large is read: there will be answers, and a place to write them.

    Raises ConfigError where nothing is answered, RunDirError for a path that cannot be written.
    """
    if not generate:
        raise ConfigError("--answers and --no-generate are both given: nothing would be answered", "Leave one out")
    if any(not isinstance(one, Labelled | Tagged) and expected_reply(one) is None for one in examples):
        raise ConfigError(
            "--answers is given, and running text is not answered", "Give rows with prompts, or leave it out"
        )
    if path.is_dir():
        raise ConfigError(f"--answers {path} is a directory", "Give the name of a file to write")
    with files.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write(path: Path, rows: Sequence[Row], answered: Sequence[Sample]) -> None:
    """One line per row, in order. `row` holds all of its columns, such as several references. Raises RunDirError."""
    lines = [
        {
            "prompt": one.prompt,
            "expected": one.expected,
            "answer": one.got,
            "right": one.right,
            "origin": row.origin,
            "row": row.record,
        }
        for row, one in zip(rows, answered, strict=True)
    ]
    files.write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def of_head(examples: Sequence[Example], names: Sequence[str], found: LabelsMeasured | NumbersMeasured) -> list[Sample]:
    """What a head said of each row: its labels, its number, or the tags of its words."""
    if isinstance(found, NumbersMeasured):
        told = zip(examples, found.expected, found.got, strict=bool(examples))
        return [Sample(_text(one), f"{own:.6g}", f"{got:.6g}", None) for one, own, got in told]
    missed, place, answered = {one.row: one.got for one in found.wrong}, 0, []
    for one in examples:
        own = one.tags if isinstance(one, Tagged) else (_labels(one, names),)
        got = [missed.get(place + number, each) for number, each in enumerate(own)]
        answered.append(Sample(_text(one), " ".join(own), " ".join(got), got == list(own)))
        place += len(own)
    return answered


def _text(one: Example) -> str:
    if isinstance(one, Tagged):
        return " ".join(one.words)
    assert isinstance(one, Labelled), "a head reads nothing else"
    return one.text


def _labels(one: Example, names: Sequence[str]) -> str:
    """As a row that was told wrong has them."""
    assert isinstance(one, Labelled), "a head reads nothing else"
    return ", ".join(name for name in names if name in one.labels) or "(none)"
