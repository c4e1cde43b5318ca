"""Several trials at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from lorafit.trials import child


def together(jobs: Sequence[Callable[[], object]], slots: int) -> None:
    """Do all jobs, `slots` at a time, each in a thread that waits for it. What is refused is left to be met again.

    Any other error, and Ctrl-C, is raised at once: jobs that have not begun are given up, others are not waited for.
    """
    pool = ThreadPoolExecutor(slots)
    try:
        for future in [pool.submit(job) for job in jobs]:
            with suppress(child.Refused):
                future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
