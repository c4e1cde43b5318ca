"""The seeded split of rows into two sides: equal records on one side, labels in the same proportions on both."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.errors import ConfigError, DataError

LABEL = "label"
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])


def share_of(text: str) -> float:
    """The share of rows that `10%` asks for. Raises ConfigError."""
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ConfigError(f"--eval {text!r} is not a share between 0% and 100%", "Give one such as 10%, or a file")
    return share


def digest(record: Mapping[str, Any]) -> bytes:
    """16 bytes, equal for equal records, whatever the order of their columns."""
    text = json.dumps(record, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=DIGEST.itemsize).digest()


def label_of(record: Mapping[str, Any]) -> str | None:
    """What the row is an example of, where it says so."""
    label = record.get(LABEL)
    return str(label) if isinstance(label, str | int) else None


def held_out(digests: NDArray[Any], labels: NDArray[np.int32], share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are held out, about `share` of them, chosen by `seed`: (rows,).

    digests: (rows,) of DIGEST, equal for rows that must stay together. labels: number of each row's label, -1 for none.
    Of every label about the same share is held out. The held-out side is never larger than the share asks for, unless
    the smallest group of equal records already is; it has at least one row. The order of the rows does not matter.
    Raises ConfigError for a share outside (0, 1), DataError where one side would be empty.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the share of rows to hold out is {share}", "Give a share between 0 and 1, such as 10%")
    _, firsts, group, sizes = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise DataError(
            f"{len(digests)} rows with {len(sizes)} distinct records cannot be split in two",
            "Give more rows, or a file of its own to evaluate on",
        )
    # The raw stream of a Philox counter is the same on every machine and in every numpy.
    keys = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(len(sizes))
    order = np.argsort(keys, kind="stable")
    taken = _choose(order[:-1], sizes, labels[firsts], _quotas(labels, share))
    if not taken.any():
        taken[order[np.argmin(sizes[order])]] = True
    return taken[group]


def _quotas(labels: NDArray[np.int32], share: float) -> dict[int, int]:
    """Rows to hold out of each label; together the share of all rows, rounded. The largest fractions are rounded up."""
    names, counts = np.unique(labels, return_counts=True)
    exact = share * counts
    quotas = np.floor(exact).astype(int)
    missing = max(0, round(share * len(labels)) - int(quotas.sum()))
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    return dict(zip(names.tolist(), quotas.tolist(), strict=True))


def _choose(
    order: NDArray[np.int64], sizes: NDArray[np.int64], labels: NDArray[np.int32], quotas: dict[int, int]
) -> NDArray[np.bool_]:
    """Groups in their order, as long as they fit into what is left of their label's quota."""
    taken = np.zeros(len(sizes), dtype=np.bool_)
    wanted = sum(quotas.values())
    for group in order:
        if not wanted:
            break
        size, label = int(sizes[group]), int(labels[group])
        if size <= quotas[label]:
            taken[group] = True
            quotas[label] -= size
            wanted -= size
    return taken
