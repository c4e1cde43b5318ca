"""What this machine has, and what this process has taken of it."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import psutil


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far: VmHWM where there is /proc, mapped pages included."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """The resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def available_bytes() -> int:
    """Memory that a new process can take without swapping, a container's limit included."""
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def usual_threads() -> int:
    """Threads where none are asked for: one a core, or as few as OMP_NUM_THREADS says, which torch heeds too."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # one a level of nesting
    cores = physical_cores()  # never more: Ray sets the variable to hyper-threads
    return min(int(given), cores) if given.isdecimal() and int(given) else cores


def physical_cores() -> int:
    """Cores that this process may use; hyper-threads share one and make matrix products no faster."""
    physical = psutil.cpu_count(logical=False) or 1
    allowed = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process(), "cpu_affinity") else physical
    return max(1, min(physical, allowed))
