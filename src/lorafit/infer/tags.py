"""Tags of words as entities: of B-PER, I-PER, O the runs of words that begin with B- and go on with I-."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

Entity = tuple[str, int, int]
BIO = re.compile(r"O|[BI]-.+")


def is_bio(names: Sequence[str]) -> bool:
    """Whether tags say where entities begin and go on."""
    return all(BIO.fullmatch(name) for name in names) and any(name != "O" for name in names)


def entities(tags: Sequence[str]) -> set[Entity]:
    """(type, first word, one past the last) of each.

    I- begins an entity too where it goes on with none of its type, as conlleval counts (Tjong Kim Sang and
    Buchholz 2000).
    """
    found, begun, kind = set[Entity](), 0, ""
    for at, tag in enumerate([*tags, "O"]):
        mark, _, own = tag.partition("-")
        if kind and (mark != "I" or own != kind):
            found.add((kind, begun, at))
            kind = ""
        if own and not kind:
            begun, kind = at, own
    return found


def counted(expected: Sequence[Sequence[str]], got: Sequence[Sequence[str]]) -> dict[str, tuple[int, int, int]]:
    """Of each type of entity, sorted: (found rightly, there are, were found). Right is its type, begin and end."""
    right, there, given = Counter[str](), Counter[str](), Counter[str]()
    for a, b in zip(expected, got, strict=True):
        wanted, seen = entities(a), entities(b)
        right.update(kind for kind, _, _ in wanted & seen)
        there.update(kind for kind, _, _ in wanted)
        given.update(kind for kind, _, _ in seen)
    return {kind: (right[kind], there[kind], given[kind]) for kind in sorted(there | given)}
