"""`lorafit rank` as one straight line.

rows split once -> a look at base and rows -> one run of all ranks -> its curve -> the advice, verified -> page, table.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from rich.console import Console

from lorafit import files
from lorafit.config import RankConfig, TrainConfig
from lorafit.data.labels import task_of
from lorafit.data.load import locate
from lorafit.errors import ConfigError, DoesNotFitError, LorafitError, NumericsError
from lorafit.model import spec as model_spec
from lorafit.model.spec import ModelSpec
from lorafit.plan.counts import block_weights
from lorafit.rank.conclude import BY_LAYER, ONE_RUN, TRIALS, conclude, with_verified
from lorafit.rank.show import expected_told, page, print_rank
from lorafit.rank.verify import verify
from lorafit.rundir import RunDir
from lorafit.trials import child
from lorafit.trials.directory import SETUP, check_usable, held, settle
from lorafit.trials.records import Record, Work, log_of, record
from lorafit.trials.rows import KEEP, Rows, split_in_two
from lorafit.trials.watching import watched
from lorafit.units import format_seconds

FILE_NAMES = ("rank.json", "report.html", BY_LAYER, SETUP, "rows", TRIALS)
# What children compute beside trainings.
LOOKING = "lorafit.rank.looking"
# What may differ when a search is resumed.
FREE_TO_CHANGE = frozenset({"output", "model", "data", "eval", "verify"})
# What all runs of a search have in common.
SHARED = (
    "model", "batch_size", "max_steps", "loss_on", "precision", "threads", "trust_remote_code", "format", "rename",
    "template", "seq_len", "seed", "epochs",
)  # fmt: skip


def rank(config: RankConfig, resume: bool, log: Console, out: Console | None) -> dict[str, Any]:
    """Find the rank, and write rank.json and report.html. Returns the former.

    log: hears of every step. out: where the answer goes, None for nowhere. Raises LorafitError for whatever the user
    can mend, Interrupted on Ctrl-C.
    """
    directory = Path(config.output)
    check_usable(directory, resume, FILE_NAMES, "a search of the rank")
    with held(directory):
        spec = model_spec.read(config.model)
        most = _most(spec, config, log)
        _check_rows(config)
        rows = split_in_two(config, directory / "rows")
        log.print(f"rows: {rows.counts['train']} train, {rows.counts['valid']} valid", highlight=False)
        for note in rows.notes:
            log.print(note, style="yellow", highlight=False)
        look = partial(_look, config, most, directory, rows, log)
        inputs = {"model": model_spec.sha256(spec)}
        setup = settle(config, directory, FREE_TO_CHANGE, inputs, rows, look, "search of the rank")
        log.print(f"looked at base and rows in {format_seconds(setup['look']['seconds'])}", highlight=False)
        if expected := setup["look"].get("expected"):  # a look of an earlier version has none
            log.print(expected_told(expected, setup["look"].get("run_precision")), highlight=False)
        trials = Trials(config, directory, rows, setup["look"]["precision"], log)
        told = f"ranks 1 to {most} in one run"
        settings = {"r": most, "alpha": 2.0 * most, "lr": config.lr, "rank_schedule": "halving"}
        made = trials.train(ONE_RUN, told, settings)
        if made["result"] is None:
            raise NumericsError(f"the run of all ranks failed: {made['refused']}", "Begin anew with a lower --lr")
        one = RunDir(directory / TRIALS / ONE_RUN)
        found = conclude(config, spec, rows, setup["look"], made, one.read_held_out(), _evaluations(one))
        if config.verify:
            found = with_verified(config, found, verify(trials, found))
        files.write_json(directory / "rank.json", found)
        if found["settings_by_layer"]:
            files.write_atomic(directory / BY_LAYER, tomli_w.dumps(found["settings_by_layer"]))
        files.write_atomic(directory / "report.html", page(found))
    if out is not None:
        print_rank(found, out)
    log.print(f"wrote {directory / 'rank.json'} and {directory / 'report.html'}", highlight=False, markup=False)
    return found


def _evaluations(run: RunDir) -> list[float]:
    """Held-out losses, epoch by epoch; those that are not finite are left out."""
    return [line["loss"] for line in run.read_metrics() if line["kind"] == "eval" and line["loss"] is not None]


def _most(spec: ModelSpec, config: RankConfig, log: Console) -> int:
    """The largest rank that all layers hold. Raises ConfigError where that is 1."""
    narrowest = min((min(shape) for shape in block_weights(spec).values()), default=0)
    if narrowest < 2:
        raise ConfigError(f"{spec.name} has no layers that hold a rank of 2", "There is nothing to choose: use --r 1")
    if narrowest < config.max_r:
        log.print(f"ranks up to {narrowest}, which is what the narrowest layer holds", highlight=False)
    return min(narrowest, config.max_r)


def _check_rows(config: RankConfig) -> None:
    """Raises ConfigError for rows with labels, DataError for rows that cannot be read."""
    if task_of(locate(config.data).train(), config.format, config.rename) != "generate":
        raise ConfigError(
            f"{config.data} has rows with labels, and ranks are searched for models that write text",
            "Let the model write the label: --rename text=prompt,label=completion",
        )


def _look(config: RankConfig, most: int, directory: Path, rows: Rows, log: Console) -> dict[str, Any]:
    arguments = (config, most, rows.path("train"), rows.counts["valid"], str(KEEP))
    path = directory / TRIALS / "look.log"
    with watched(log, "looking at base and rows, without training", path):
        found = child.call(f"{LOOKING}:look", arguments, path)
    for row in found["distance"]["furthest"]:
        row["origin"] = rows.given("train", row["origin"])
    return {"look": found}


def _what_to_do(refused: child.Refused) -> str:
    """In the words of this command, which has no --r and no --force."""
    if isinstance(refused, child.Killed):
        return "Free memory, and run the same command with --resume; or begin anew with a lower --max-r"
    if issubclass(refused.kind, DoesNotFitError):
        return "Begin anew with a lower --max-r or --seq-len, or with --precision bf16"
    return refused.do


class Trials:
    """Runs of a search, each made once."""

    def __init__(self, config: RankConfig, directory: Path, rows: Rows, precision: str, log: Console) -> None:
        """precision: what all are measured in."""
        self.config, self.directory, self.rows, self.precision, self.log = config, directory, rows, precision, log

    def train(self, name: str, told: str, settings: dict[str, Any]) -> Record:
        """result: run.json's content, or None where the rate was too high, and why as refused.

        Stops once the held-out loss has risen. told: what it is, for the log. Raises LorafitError for what is in the
        way of any rate, such as want of memory, which is no record: another try may go better.
        """
        run = self.directory / TRIALS / name
        wanted = {key: getattr(self.config, key) for key in SHARED} | {"patience": 1} | settings
        wanted |= {"data": self.rows.path("train"), "eval": self.rows.path("valid"), "output": str(run)}

        def work(path: Path) -> Record:
            try:
                result = child.call(child.TRAIN, (TrainConfig(**wanted).model_dump(),), path)
            except child.Refused as refused:
                if not issubclass(refused.kind, NumericsError):
                    raise LorafitError(f"training {told} failed: {refused.what}", _what_to_do(refused)) from None
                return {"result": None, "refused": refused.what}
            shutil.rmtree(run / "checkpoints", ignore_errors=True)  # a finished run needs none, and they are large
            return {"result": result, "refused": None}

        made = self._once(name, work, f"training {told}")
        result = made["result"]
        what = f"loss {result['eval_loss']:.4f}" if result else f"failed: {made['refused']}"
        self.log.print(f"{told}: {what} ({format_seconds(made['wall_s'])})", highlight=False, markup=False)
        return made

    def losses(self, name: str) -> Record:
        """What a run loses on each held-out row: nats and tokens."""

        def work(path: Path) -> Record:
            run = str(self.directory / TRIALS / name)
            arguments = (run, self.config, self.precision, self.rows.path("valid"))
            return child.call(f"{LOOKING}:losses", arguments, path)

        return self._once(f"{name}.losses", work, "measuring it on the held-out rows")

    def _once(self, name: str, work: Work, doing: str) -> Record:
        directory = self.directory / TRIALS
        with watched(self.log, doing, log_of(directory, name)):
            return record(directory, name, work)
