"""While a trial runs, the screen shows what it says last; elsewhere nothing is shown."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

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
def test_what_a_trial_says_is_shown_on_a_terminal_alone(is_terminal: bool, tmp_path: Path) -> None:
    heard = io.StringIO()
    console = Console(file=heard, force_terminal=is_terminal, width=80)
    log = tmp_path / "log"
    with watched(console, "training [rank] 4", log):
        log.write_text("step 3/9 · loss 1.234\n")
        deadline = time.monotonic() + 20
        while is_terminal and "step 3/9" not in heard.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ("training [rank] 4 · step 3/9 · loss 1.234" in heard.getvalue()) == is_terminal
    assert bool(heard.getvalue()) == is_terminal


def test_an_error_comes_through_and_nobody_looks_after_it(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(ValueError, match="mine"), watched(console, "x", tmp_path / "log"):
        assert NAME in {thread.name for thread in threading.enumerate()}
        raise ValueError("mine")
    assert NAME not in {thread.name for thread in threading.enumerate()}
