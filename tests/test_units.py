from __future__ import annotations

import pytest

from lorafit import units


@pytest.mark.parametrize(
    ("expected", "count"), [("512 B", 512), ("1.5 KiB", 1536), ("12.0 MiB", 12 << 20), ("1.50 GiB", 3 << 29)]
)
def test_bytes_are_shown_in_binary_units(expected: str, count: int) -> None:
    assert units.format_bytes(count) == expected


@pytest.mark.parametrize(
    ("expected", "seconds"), [("0.42 s", 0.42), ("12.3 s", 12.34), ("2 min 05 s", 125), ("1 h 02 min", 3725)]
)
def test_seconds_are_shown_as_people_say_them(expected: str, seconds: float) -> None:
    assert units.format_seconds(seconds) == expected


def test_a_number_in_bf16_takes_two_bytes() -> None:
    assert units.bytes_of(100, "bf16") == 200
    assert units.bytes_of(3, "nf4") == 2


def test_a_share_of_nothing_is_not_a_number() -> None:
    assert units.format_share(1, 8) == "12.50%"
    assert units.format_share(1, 0) == "n/a"
