"""`lorafit compare` as one straight line.

names -> rows split once -> floors -> a search of each method's rate -> rounds of seeds -> intervals -> page, table.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorafit import files
from lorafit.compare import child
from lorafit.compare.budget import Budget
from lorafit.compare.candidate import candidates
from lorafit.compare.conclude import conclude
from lorafit.compare.on_ray import Cluster, connect, what_is_there
from lorafit.compare.rows import Rows, split
from lorafit.compare.show import page, print_comparison, read_curves
from lorafit.compare.study import Study
from lorafit.config import CompareConfig, parse_seconds
from lorafit.data.formats import read_examples
from lorafit.data.load import locate
from lorafit.errors import RunDirError
from lorafit.model import spec as model_spec
from lorafit.rundir import LOCK

KEEP = Path(__file__).parent / "keep.txt"
FILE_NAMES = ("compare.json", "report.html", "setup.json", "rows", "trials")
# What may differ when a comparison is resumed: more time, more seeds; the directory may have moved.
FREE_TO_CHANGE = frozenset({"output", "budget", "seeds", "model", "data", "eval", "keep", "ray"})
# Replies of at most so many tokens are compared word for word; longer ones are seldom the very same.
SHORT_REPLY_TOKENS = 64


def compare(config: CompareConfig, resume: bool, log: Console, out: Console | None) -> dict[str, Any]:
    """Compare methods, and write compare.json and report.html. Returns the former.

    log: hears of every trial. out: where the table goes, None for nowhere. Raises LorafitError for whatever the user
    can mend, Interrupted on Ctrl-C.
    """
    config = _everywhere(config) if config.ray else config
    chosen = candidates(config.methods)
    budget = Budget(parse_seconds(config.budget, "--budget") if config.budget else math.inf)
    directory = Path(config.output)
    _check_usable(directory, resume)
    keep = config.keep or str(KEEP)
    with _held(directory), _cluster(config) as cluster:
        spec = model_spec.read(config.model)
        read_examples(locate(keep).unseen().rows())  # what is wrong with it is said now
        rows = split(config, directory / "rows")
        told = ", ".join(f"{count} {name}" for name, count in rows.counts.items())
        log.print(f"rows: {told} (search is a part of valid)", highlight=False)
        setup = _setup(config, directory, rows, model_spec.sha256(spec), keep, log)
        study = Study(
            config=config,
            directory=directory,
            rows=rows,
            keep=keep,
            precision=setup["precision"],
            generate=setup["generate"],
            labels=setup.get("labels"),
            candidates=chosen,
            budget=budget,
            console=log,
            notes=list(rows.notes),
        )
        if cluster:
            _use(cluster, study, log)
        study.measure_floors()
        study.search()
        study.run_seeds()
        found = conclude(study)
        files.write_json(directory / "compare.json", found)
        files.write_atomic(directory / "report.html", page(found, read_curves(found, directory)))
    if out is not None:
        print_comparison(found, out)
    log.print(f"wrote {directory / 'compare.json'} and {directory / 'report.html'}", highlight=False, markup=False)
    return found


def _everywhere(config: CompareConfig) -> CompareConfig:
    """Paths that hold in whatever directory a worker runs."""
    given = {name: getattr(config, name) for name in ("model", "data", "eval", "keep")}
    paths = {name: str(Path(value).absolute()) for name, value in given.items() if value and Path(value).exists()}
    return config.model_copy(update=paths | {"output": str(Path(config.output).absolute())})


@contextmanager
def _cluster(config: CompareConfig) -> Iterator[Cluster | None]:
    """The cluster that was asked for, for as long as it lasts; None where trials run here. Raises ConfigError."""
    if config.ray is None:
        yield None
        return
    cluster = connect(config.ray, config.threads)
    try:
        with redirect_stdout(sys.stderr):  # Ray tells there of workers that died, and stdout is for the result
            yield cluster
    except KeyboardInterrupt:
        raise child.interrupted() from None
    finally:
        cluster.close()


def _use(cluster: Cluster, study: Study, log: Console) -> None:
    """Run the trials on a cluster. Raises ConfigError where a node cannot reach what they need."""
    paths = [*map(study.rows.path, study.rows.counts), *([study.keep] if Path(study.keep).exists() else [])]
    cluster.check(study.directory, paths, partial(what_is_there, study.config.model))
    log.print(f"ray: {cluster.slots} trials at a time, {cluster.cpus} CPUs each", highlight=False)
    study.call, study.slots = cluster.call, cluster.slots


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """The directory is this process's own; one that was made for it and in which nothing began is removed again."""
    busy = RunDirError(f"{directory} is in use by another lorafit process", "Wait until it ends, or choose another -o")
    is_new = not directory.exists()
    with files.lock(directory / LOCK, busy):
        try:
            yield
        finally:
            if is_new and not (directory / "setup.json").exists():
                shutil.rmtree(directory, ignore_errors=True)


def _check_usable(directory: Path, resume: bool) -> None:
    """Refuse a directory that holds something else, or a comparison when not resuming. Raises RunDirError."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise RunDirError(f"{directory} is a file", "Choose a directory with -o")
    present = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
    strangers = sorted(set(present) - set(FILE_NAMES))
    if strangers:
        raise RunDirError(f"{directory} already holds other files ({strangers[0]})", "Choose another directory with -o")
    if "setup.json" in present and not resume:
        raise RunDirError(
            f"{directory} already holds a comparison", "Choose another directory with -o, or go on with it by --resume"
        )


def _setup(
    config: CompareConfig, directory: Path, rows: Rows, model_sha256: str, keep: str, log: Console
) -> dict[str, Any]:
    """What is settled once: the inputs' hashes, the precision that all are measured in, whether answers are compared.

    Raises CheckpointError where a comparison is resumed with other settings or inputs.
    """
    path = directory / "setup.json"
    settings = {name: value for name, value in config.model_dump().items() if name not in FREE_TO_CHANGE}
    settings.pop("methods")  # more of them may be added: the others' trials stand
    inputs = {"model": model_sha256, "keep": files.sha256(Path(keep)) if Path(keep).is_file() else keep}
    inputs |= {side: files.sha256(Path(rows.path(side))) for side in rows.counts}
    if path.is_file():
        earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        from lorafit.train.checkpoint import check_same  # needs torch, which bad settings never wait for

        check_same("comparison", earlier, {"config": settings, "sha256": inputs})
        return earlier
    from lorafit.compare import measure  # needs torch

    seen = child.call(measure.look, (config, rows.path("train"), rows.path("test")), directory / "trials" / "setup.log")
    longest = seen["longest_reply"]
    generate = longest is not None and (
        config.metric == "accuracy" or (config.metric == "auto" and longest <= SHORT_REPLY_TOKENS)
    )
    if config.metric == "accuracy" and longest is None and not seen.get("labels"):
        log.print("--metric accuracy: the rows have no replies, so the loss decides", style="yellow")
    setup = {"config": settings, "sha256": inputs, "precision": seen["precision"], "generate": generate}
    setup["labels"] = seen.get("labels")
    files.write_json(path, setup)
    return setup
