"""What the loop tells the outside: one line a step in metrics.jsonl, and a progress bar or plain lines on stderr."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorafit import files
from lorafit.plan.machine import rss_bytes
from lorafit.rundir import read_lines
from lorafit.units import format_bytes

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. loss in nats per supervised token; step_s in seconds; tokens without padding."""

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    applied: bool
    tokens: int
    step_s: float


class Reporter(Protocol):
    """What the loop calls."""

    def step(self, report: StepReport) -> None:
        """An optimizer step has ended."""

    def evaluated(self, step: int, loss: float, better: bool) -> None:
        """The held-out loss after `step`."""

    def note(self, step: int, message: str) -> None:
        """Something that must not be silent."""


class MetricsLog:
    """metrics.jsonl: a JSON object a line. On a resume the lines after the resumed step are dropped."""

    def __init__(self, path: Path, from_step: int) -> None:
        kept = [line for line in read_lines(path) if line.get("step", 0) <= from_step] if from_step else []
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        files.write_atomic(path, text)
        self._path = path
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()

    def write(self, record: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system. Raises RunDirError. JSON has no NaN: it becomes null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with files.explained(self._path):
            self._file.write(json.dumps(clean, ensure_ascii=False) + "\n")
            self._file.flush()

    def write_steps(self, steps: Iterable[StepReport]) -> None:
        """A line for each optimizer step."""
        for report in steps:
            self.write({"kind": "step", **asdict(report)})

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ConsoleReporter:
    """Writes metrics.jsonl and shows the progress: a bar on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, log: MetricsLog, console: Console, total_steps: int, done_steps: int) -> None:
        self._log = log
        self._console = console
        self._total_steps = total_steps
        self._last_line_at = 0.0
        self._smooth_loss: float | None = None
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=False,
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=done_steps, status="")

    def __enter__(self) -> ConsoleReporter:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()
        self._log.close()

    def step(self, report: StepReport) -> None:
        """Log the step; show loss (averaged over about ten steps), tokens/s, memory and the time left."""
        self._log.write_steps([report])
        if report.applied:
            last = self._smooth_loss
            self._smooth_loss = report.loss if last is None else 0.9 * last + 0.1 * report.loss
        speed = report.tokens / report.step_s if report.step_s else 0.0
        loss = "" if self._smooth_loss is None else f"loss {self._smooth_loss:.3f} · "
        status = f"{loss}{speed:,.0f} tokens/s · {format_bytes(rss_bytes())}"
        self._bar.update(self._task, completed=report.step, status=status)
        if not self._console.is_terminal and self._line_is_due(report.step):
            self._console.print(f"step {report.step}/{self._total_steps} · {status}", highlight=False)

    def _line_is_due(self, step: int) -> bool:
        now = time.monotonic()
        if step == self._total_steps or now - self._last_line_at >= SECONDS_BETWEEN_LINES:
            self._last_line_at = now
            return True
        return False

    def evaluated(self, step: int, loss: float, better: bool) -> None:
        """Log and show the held-out loss."""
        self._log.write({"kind": "eval", "step": step, "loss": loss, "best": better})
        best = ", the best so far" if better else ""
        self._console.print(f"step {step}: held-out loss {loss:.4f}{best}", highlight=False)

    def note(self, step: int, message: str) -> None:
        """Log and show."""
        self._log.write({"kind": "note", "step": step, "message": message})
        self._console.print(message, style="yellow", highlight=False)
