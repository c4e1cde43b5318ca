"""Trials at the same time: as many as there are slots. What is refused stops none of the others, what fails does."""

from __future__ import annotations

import threading
import time

import pytest

from lorafit.compare.together import together
from lorafit.trials import child


def test_jobs_meet_where_there_are_slots_for_all() -> None:
    meeting = threading.Barrier(3, timeout=20)  # breaks, and fails the test, unless three jobs wait at once
    together([meeting.wait] * 3, 3)


def test_never_more_at_once_than_there_are_slots() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def job() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    together([job] * 8, 2)
    assert (running, most) == (0, 2)


def test_what_is_refused_is_left_and_what_fails_is_raised() -> None:
    done = []

    def refused() -> None:
        raise child.Refused("this cannot be", "Leave it")

    together([refused, lambda: done.append(1), refused, lambda: done.append(2)], 2)
    assert sorted(done) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        together([lambda: 1 / 0, lambda: time.sleep(0.01)], 1)
