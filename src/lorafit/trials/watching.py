"""What a trial says of itself, on the screen while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.text import Text

SECONDS_BETWEEN_LOOKS = 0.5
# Until the first line where there is no terminal; then twice as long each time, so that a log of a night stays short.
SECONDS_TO_FIRST_LINE = 60.0
# From the end of a log, what holds its last line.
TAIL_BYTES = 4096
NAME = "watching a trial"


@contextmanager
def watched(console: Console, doing: str, log: Path) -> Iterator[None]:
    """Show what is being done and the last line of `log`, which it writes to.

    On a terminal that stands there until it is done; elsewhere it is a line now and then, where it takes minutes.
    """
    ended = threading.Event()

    def refresh() -> None:
        while status and not ended.wait(SECONDS_BETWEEN_LOOKS):
            status.update(_told(doing, log))

    def tell() -> None:
        pause = SECONDS_TO_FIRST_LINE
        while not ended.wait(pause):
            console.print(_told(doing, log), soft_wrap=True)
            pause *= 2

    with console.status(Text(doing)) if console.is_terminal else nullcontext() as status:
        thread = threading.Thread(target=refresh if status else tell, name=NAME, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _told(doing: str, log: Path) -> Text:
    line = last_line(log)
    return Text(f"{doing} · {line}" if line else doing, overflow="ellipsis", no_wrap=True)


def last_line(path: Path) -> str:
    """The last line of a file that says something; none of a file that is not there."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
