"""What the processor calls itself, and which types it multiplies in."""

from __future__ import annotations

import functools
import platform
import sys
from pathlib import Path

# As Linux names them: products of float16 on x86 (AVX512-FP16, AMX-FP16), and vectors of it on Arm.
FP16_FLAGS = ({"avx512_fp16"}, {"amx_fp16"}, {"fphp", "asimdhp"})


def name() -> str:
    """What it calls itself."""
    return _of_cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def has_fp16() -> bool:
    """Whether it computes products of float16 as such; elsewhere every number is widened first, which is slower."""
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    flags = set((_of_cpuinfo("flags") or _of_cpuinfo("Features") or "").split())
    return any(wanted <= flags for wanted in FP16_FLAGS)


def _of_cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
