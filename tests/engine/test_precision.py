from __future__ import annotations

import pytest

from lorafit.engine import precision


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_what_is_asked_for_is_taken(asked: str) -> None:
    assert precision.choose(asked) == asked


def test_auto_chooses_by_measuring() -> None:
    assert precision.choose("auto") in precision.DTYPES
