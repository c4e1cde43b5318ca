"""`lorafit compare` as one straight line.

names -> rows split once -> floors -> a search of each method's rate -> rounds of seeds -> intervals -> page, table.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lorafit import files
from lorafit.compare.budget import Budget
from lorafit.compare.candidate import candidates
from lorafit.compare.conclude import conclude
from lorafit.compare.on_ray import Cluster, connect, what_is_there
from lorafit.compare.show import page, print_comparison, read_curves
from lorafit.compare.study import MEASURE, Study
from lorafit.config import CompareConfig, parse_seconds
from lorafit.data.formats import read_examples
from lorafit.data.load import locate
from lorafit.model import spec as model_spec
from lorafit.trials import child
from lorafit.trials.directory import SETUP, check_usable, held, settle
from lorafit.trials.rows import KEEP, Rows, split_in_three

FILE_NAMES = ("compare.json", "report.html", SETUP, "rows", "trials")
# What may differ when a comparison is resumed: more time, more seeds, more methods, as the others' trials stand; the
# directory may have moved.
FREE_TO_CHANGE = frozenset({"methods", "output", "budget", "seeds", "model", "data", "eval", "keep", "ray"})
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
    check_usable(directory, resume, FILE_NAMES, "a comparison")
    keep = config.keep or str(KEEP)
    with held(directory), _cluster(config) as cluster:
        spec = model_spec.read(config.model)
        read_examples(locate(keep).unseen().rows())  # what is wrong with it is said now
        rows = split_in_three(config, directory / "rows")
        told = ", ".join(f"{count} {name}" for name, count in rows.counts.items())
        log.print(f"rows: {told} (search is a part of valid)", highlight=False)
        inputs = {"model": model_spec.sha256(spec), "keep": files.sha256(Path(keep)) if Path(keep).is_file() else keep}
        look = partial(_look, config, directory, rows, log)
        setup = settle(config, directory, FREE_TO_CHANGE, inputs, rows, look, "comparison")
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


def _look(config: CompareConfig, directory: Path, rows: Rows, log: Console) -> dict[str, Any]:
    """What is settled once: the precision that all are measured in, whether answers are compared, labels."""
    arguments = (config, rows.path("train"), rows.path("test"))
    seen = child.call(f"{MEASURE}:look", arguments, directory / "trials" / "setup.log")
    longest = seen["longest_reply"]
    generate = longest is not None and (
        config.metric == "accuracy" or (config.metric == "auto" and longest <= SHORT_REPLY_TOKENS)
    )
    if config.metric == "accuracy" and longest is None and not seen.get("labels"):
        log.print("--metric accuracy: the rows have no replies, so the loss decides", style="yellow")
    return {"precision": seen["precision"], "generate": generate, "labels": seen.get("labels")}
