"""Bytes, GiB, FLOP, seconds and dtype widths; the only place that formats them. GiB is 2^30 bytes, GB is 10^9."""

from __future__ import annotations

GIB = 1 << 30
MIB = 1 << 20

DTYPE_BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.0, "nf4": 4.0}


def bytes_of(count: int, dtype: str) -> int:
    """Bytes that `count` numbers of `dtype` take, without scales. Raises KeyError for an unknown dtype."""
    return round(count * DTYPE_BITS[dtype] / 8)


def format_bytes(count: float) -> str:
    """`1.50 GiB`, `12.3 MiB` or `512 B`: binary units, three figures."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    if count >= MIB:
        return f"{count / MIB:.1f} MiB"
    if count >= 1024:
        return f"{count / 1024:.1f} KiB"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `2 min 05 s` or `1 h 02 min`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_flop(flop: float) -> str:
    """`1.62 GFLOP`, three figures."""
    for name, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flop >= size:
            return f"{flop / size:.3g} {name}FLOP"
    return f"{flop:.0f} FLOP"


def format_count(count: int) -> str:
    """`134,515,008`."""
    return f"{count:,}"


def format_share(part: int, whole: int) -> str:
    """`3.50%`: part of the whole, two decimals; `n/a` where the whole is 0."""
    return f"{100 * part / whole:.2f}%" if whole else "n/a"
