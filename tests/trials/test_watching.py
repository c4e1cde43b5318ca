"""While a trial runs, the screen shows what it says last; elsewhere a line tells of it now and then."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from lorafit.trials import watching
from lorafit.trials.watching import NAME, last_line, watched


@pytest.mark.parametrize(
    ("text", "last"),
    [("", ""), ("one\n", "one"), ("one\ntwo [b]\n\n  \n", "two [b]"), ("x\n" * 5000 + "step 3/9\n", "step 3/9")],
)
def test_the_last_line_is_the_last_that_says_something(text: str, last: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    assert last_line(tmp_path / "log") == last
    assert last_line(tmp_path / "none") == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_trial_says_is_shown_on_a_terminal_at_once_and_elsewhere_after_a_while(
    is_terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "SECONDS_TO_FIRST_LINE", 0.2)
    heard = io.StringIO()
    console = Console(file=heard, force_terminal=is_terminal, width=80)
    log = tmp_path / "log"
    log.write_text("step 3/9\n")
    with watched(console, "training [rank] 4", log):
        deadline = time.monotonic() + 20
        while "step 3/9" not in heard.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "training [rank] 4 · step 3/9" in heard.getvalue()


def test_where_there_is_no_terminal_lines_come_ever_more_seldom_and_none_of_what_is_soon_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, pauses = io.StringIO(), list[float]()
    console = Console(file=heard, width=20)
    with watched(console, "soon done", tmp_path / "log"):
        pass
    assert heard.getvalue() == ""

    class Ended(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is None:  # of the thread itself, that it has started
                return super().wait()
            pauses.append(timeout)
            return len(pauses) > 3

    monkeypatch.setattr(watching.threading, "Event", Ended)
    with watched(console, "a longer one than the width", tmp_path / "log"):
        deadline = time.monotonic() + 20
        while len(pauses) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert pauses == [60.0, 120.0, 240.0, 480.0]
    assert heard.getvalue() == 3 * "a longer one than the width\n"


def test_an_error_comes_through_and_nobody_looks_after_it(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(ValueError, match="mine"), watched(console, "x", tmp_path / "log"):
        assert NAME in {thread.name for thread in threading.enumerate()}
        raise ValueError("mine")
    assert NAME not in {thread.name for thread in threading.enumerate()}
