"""Every error a user can mend, as one sentence in three parts: what is wrong, what was got, what to do.

`cli.py` prints `str(error)` and exits with `error.exit_code`. Anything that is not a `LorafitError` is our own fault
and exits 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorafitError(Exception):
    """An error that the user can mend.

    what: what is wrong, with the value that was got. do: the next step to take.
    """

    exit_code = 2

    def __init__(self, what: str, do: str = "") -> None:
        self.what = what.rstrip(".")
        self.do = do.rstrip(".")
        super().__init__(" ".join(_sentence(part) for part in (self.what, self.do) if part))


def _sentence(part: str) -> str:
    return part if part.endswith(("?", "!")) else f"{part}."


class ConfigError(LorafitError):
    """A setting that is unknown, out of range or at odds with another."""


class DataError(LorafitError):
    """A data file or a row in it that cannot be used. Messages name file:line."""


class ModelError(LorafitError):
    """A model or tokenizer that cannot be found, read or adapted."""


class TargetError(LorafitError):
    """`targets`, `layers` or `rank_pattern` match nothing, or match what cannot be adapted."""


class RankError(LorafitError):
    """A rank that is below 1 or above what a layer can hold, min(in, out)."""


class AdapterError(LorafitError):
    """Adapter weights that are incomplete, of the wrong shape, not finite, or for another model."""


class MergeError(LorafitError):
    """A merge whose result differs from the unmerged model by more than rounding explains."""


class CheckpointError(LorafitError):
    """A checkpoint that is damaged, or that belongs to another run."""


class RunDirError(LorafitError):
    """An output directory that is in use, unwritable or holds something else."""


class NumericsError(LorafitError):
    """A loss or gradient that is not finite, or a layer that does not learn."""


class DoesNotFitError(LorafitError):
    """The predicted peak memory is above what the machine has free."""


class Interrupted(LorafitError):
    """Training stopped on a signal after its state was saved. exit_code: 128 + the signal's number."""

    def __init__(self, what: str, do: str, signal_number: int) -> None:
        super().__init__(what, do)
        self.signal_number, self.exit_code = signal_number, 128 + signal_number


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """`Did you mean 'q_proj'?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else ""


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names in one line, cut after `most` with the count of the rest."""
    names = list(names)
    shown = ", ".join(names[:most])
    return f"{shown}, ... ({len(names) - most} more)" if len(names) > most else shown
