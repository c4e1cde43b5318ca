"""A time limit for code that is not ours and runs in this thread."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class OutOfTime(Exception):
    """Raised inside the code that ran too long."""


class _Watch:
    """One thread that sleeps until the first deadline, for any number of calls: starting one for each would be dear."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._ends: dict[int, float] = {}  # by thread
        self._late: set[int] = set()
        self._thread: threading.Thread | None = None
        self._idle = False

    def begin(self, seconds: float) -> None:
        with self._change:
            self._ends[threading.get_ident()] = time.monotonic() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            if self._idle:  # else it wakes for an earlier end, and then looks for the next
                self._change.notify()

    def end(self) -> bool:
        """Whether the limit was passed: then the exception may still be on its way."""
        own = threading.get_ident()
        with self._change:
            self._ends.pop(own, None)
            late = own in self._late
            self._late.discard(own)
            return late

    def _run(self) -> None:
        with self._change:
            while True:
                now = time.monotonic()
                for thread, end in list(self._ends.items()):
                    if end <= now:
                        del self._ends[thread]
                        self._late.add(thread)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(OutOfTime))
                first = min(self._ends.values(), default=None)
                self._idle = first is None
                self._change.wait(None if first is None else max(0.0, first - time.monotonic()))


_watch = _Watch()


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block once it has run for `seconds`. One long call of a C function is not interrupted."""
    _watch.begin(seconds)
    try:
        yield
    finally:
        if _watch.end():
            with suppress(OutOfTime):  # if it has not come yet, it comes here
                for _ in range(100):
                    time.sleep(0)
