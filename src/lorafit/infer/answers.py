"""All answers of an evaluation as a file of JSON Lines: what was asked, expected and answered, beside the row."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lorafit import files
from lorafit.data.example import Example, Labelled
from lorafit.data.mask import expected_reply
from lorafit.data.rows import Row
from lorafit.errors import ConfigError
from lorafit.infer.evaluate import Sample
from lorafit.infer.labels import Wrong


def check(path: Path, examples: Sequence[Example], generate: bool) -> None:
    """Before anything large is read: there will be answers, and a place to write them.

    Raises ConfigError where nothing is answered, RunDirError for a path that cannot be written.
    """
    if not generate:
        raise ConfigError("--answers and --no-generate are both given: nothing would be answered", "Leave one out")
    if any(not isinstance(one, Labelled) and expected_reply(one) is None for one in examples):
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


def of_labels(examples: Sequence[Example], names: Sequence[str], wrong: Sequence[Wrong]) -> list[Sample]:
    """What a head said of each row. wrong: the rows that it told wrong; it gave all others their own labels."""
    missed = {one.row: one for one in wrong}
    found = []
    for number, one in enumerate(examples):
        if not isinstance(one, Labelled):
            raise TypeError("only rows with labels are told apart")
        own = ", ".join(name for name in names if name in one.labels) or "(none)"
        got = missed[number].got if number in missed else own
        found.append(Sample(one.text, own, got, number not in missed))
    return found
