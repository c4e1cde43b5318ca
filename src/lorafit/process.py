"""When the process began, and what is set in it before torch loads."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path


def started_at() -> float:
    """Seconds since the epoch at which this process began, so that a load time includes Python and its imports."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime_s - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()


def prepare() -> None:
    """Set what libraries read when they load, where the user has not, and how often Python looks for garbage."""
    # Hugging Face's libraries fork nothing here; their warning about it would only alarm.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # OpenMP's threads wait for each other in a busy loop of about 10 ms by default. On a machine that does anything
    # else they take the cores from those they wait for, and a step takes 4 times as long (docs/log.md). To be set
    # before torch loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # oneDNN keeps code and buffers for each of the last 1,024 shapes of a product, about 0.6 MB each. A layer has a
    # dozen, and all layers the same; what rows of other lengths had is not worth its memory (docs/log.md).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    # Importing torch and transformers makes a million objects, none of them garbage. At Python's own thresholds they
    # are searched through again and again, for a tenth of the time that loading takes.
    gc.set_threshold(100_000, 20, 20)
