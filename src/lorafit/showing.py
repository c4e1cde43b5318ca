"""`lorafit report` as one straight line: a directory -> answers before and after -> what it holds -> page, table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from lorafit import files
from lorafit.config import ReportConfig
from lorafit.errors import LorafitError, RunDirError
from lorafit.rundir import RunDir

Found = dict[str, Any]
COMPARED, SCALED, RANKED = "compare.json", "scale.json", "rank.json"
PAGE = "report.html"
# What may stand in a directory that is not finished, and how it is.
UNFINISHED = {
    "setup.json": ("an unfinished comparison, or search of the rank", "Finish it by the same command with --resume"),
    "metrics.jsonl": ("a run that has not finished", "Finish it by `lorafit train --resume`"),
    "checkpoints": ("a run that has not finished", "Finish it by `lorafit train --resume`"),
}


def report(config: ReportConfig, log: Console, out: Console | None) -> Found:
    """Write the page of a run, a comparison or a look at the scale. Returns what is in it, with `page`, its path.

    out: where the table goes, None for nowhere. Raises LorafitError for whatever the user can mend.
    """
    directory = Path(config.directory)
    try:
        found, text = _maker(directory)(directory, config, log, out)
    except KeyError as error:
        raise RunDirError(
            f"what {directory} holds has no {error}", "Was it made by another version, or changed? Make it again"
        ) from error
    page = Path(config.output) if config.output else directory / PAGE
    if page.is_dir():
        raise RunDirError(f"{page} is a directory", "Give the file to write with -o")
    files.write_atomic(page, text)
    log.print(f"wrote {page}", highlight=False, markup=False)
    return found | {"page": str(page)}


Maker = Callable[[Path, ReportConfig, Console, Console | None], tuple[Found, str]]


def _maker(directory: Path) -> Maker:
    """What makes the page of what is in a directory. Raises RunDirError where there is nothing to show."""
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise RunDirError(f"{directory} {what}", "Give the directory of `lorafit train -o` or `lorafit compare -o`")
    for name, maker in ((COMPARED, _of_comparison), (RANKED, _of_rank), (SCALED, _of_scale)):
        if (directory / name).is_file():
            return maker
    if RunDir(directory).exists:
        return _of_run
    for name, (what, do) in UNFINISHED.items():
        if (directory / name).exists():
            raise RunDirError(f"{directory} holds {what}", do)
    raise RunDirError(
        f"{directory} holds no run: it has no run.toml, {COMPARED}, {RANKED} or {SCALED}",
        "Give the directory of `lorafit train`, `compare`, `rank` or `scale`",
    )


def _of_run(directory: Path, config: ReportConfig, log: Console, out: Console | None) -> tuple[Found, str]:
    import torch

    from lorafit.plan import machine
    from lorafit.report.gather import gather
    from lorafit.report.show import page, print_report

    run, samples, notes = RunDir(directory), None, list[str]()
    run.read_config(), run.read_result()  # what is wrong with them is said before a model is loaded
    if config.samples:
        from lorafit.before_after import answers_of  # needs transformers

        torch.set_num_threads(config.threads or machine.usual_threads())
        try:
            samples = answers_of(run, config, log)
        except LorafitError as error:  # the model may be gone; all else is still there
            notes.append(f"there are no answers before and after: {error}")
    torch.set_num_threads(1)  # the matrices are small: a second thread only waits for the first
    found = gather(run, samples, notes)
    if out is not None:
        print_report(found, out)
    return found, page(found)


def _of_comparison(directory: Path, config: ReportConfig, log: Console, out: Console | None) -> tuple[Found, str]:
    from lorafit.compare.show import page, print_comparison, read_curves

    found = _read(directory / COMPARED)
    text = page(found, read_curves(found, directory))
    if out is not None:
        print_comparison(found, out)
    return {"kind": "comparison", "directory": str(directory)} | found, text


def _of_rank(directory: Path, config: ReportConfig, log: Console, out: Console | None) -> tuple[Found, str]:
    from lorafit.rank.show import page, print_rank

    found = _read(directory / RANKED)
    if out is not None:
        print_rank(found, out)
    return {"kind": "rank", "directory": str(directory)} | found, page(found)


def _of_scale(directory: Path, config: ReportConfig, log: Console, out: Console | None) -> tuple[Found, str]:
    from lorafit.adapters import print_scales, scales_picture
    from lorafit.report.scale import page

    found = _read(directory / SCALED)
    text = page(found, scales_picture(found))
    if out is not None:
        print_scales(found, out)
    return {"kind": "scale", "directory": str(directory)} | found, text


def _read(path: Path) -> Found:
    try:
        found: Found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path} cannot be read: {error}", "Make it again, or restore the file") from None
    return found
