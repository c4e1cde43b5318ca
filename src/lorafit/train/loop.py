"""The training loop, readable top to bottom.

What it does depends on its inputs and the step number alone, so that a run that was killed and resumed ends where one
left alone does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafit.config import TrainConfig
from lorafit.data.batching import step_rows
from lorafit.data.pack import micro_batches
from lorafit.data.store import Encoded, let_go
from lorafit.engine.batch import Batch
from lorafit.engine.engine import Engine
from lorafit.engine.tally import TALLY
from lorafit.errors import Interrupted, NumericsError, listed
from lorafit.lora import inject
from lorafit.methods.labels import PREFIX as HEAD
from lorafit.methods.method import Method
from lorafit.train import loss_scale
from lorafit.train.adalora import RankSchedule, schedule
from lorafit.train.checkpoint import Checkpoint, Progress
from lorafit.train.optim import adamw, clip_gradients, load_optimizer_state, optimizer_state, rate, set_rate
from lorafit.train.reporting import Reporter, StepReport
from lorafit.train.signals import StopRequest

BAD_STEPS_TO_STOP = 3
SECONDS_BETWEEN_SAVES = 60.0


@dataclass(frozen=True)
class Work:
    """What a run trains on and with. `evaluate` gives the loss on held-out rows; None where there are none."""

    model: nn.Module
    method: Method
    rows: Sequence[Encoded]
    engine: Engine
    micro_tokens: int
    config: TrainConfig
    identity: dict[str, object]
    evaluate: Callable[[], float] | None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every row is seen once."""
        return math.ceil(len(self.rows) / self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.max_steps or self.steps_per_epoch * self.config.epochs


def fit(
    work: Work, start: Checkpoint | None, save: Callable[[Checkpoint], None], stop: StopRequest, report: Reporter
) -> Progress:
    """Train to the end, or until `stop` is asked for. The adapter ends as the best that an evaluation found, if any.

    start: where to go on from; its adapter is given up. Raises Interrupted after saving when stopped, NumericsError
    when the loss is not finite three times in a row or a part of the adapter does not learn.
    """
    loop = Loop(work, start, save)
    if start:
        start.adapter.clear()  # the model has it: a copy would last as long as the run
    config, progress = work.config, loop.progress
    progress.train_s += work.engine.prepare_s
    while progress.step < work.total_steps and not progress.stopped_early:
        train_one_step(loop, report)
        epoch_ended = progress.step % work.steps_per_epoch == 0 or progress.step == work.total_steps
        if work.evaluate and (progress.step % config.eval_every == 0 if config.eval_every else epoch_ended):
            _evaluate(loop, work.evaluate, report)
        if stop.signal or epoch_ended or progress.stopped_early or loop.save_is_due():
            loop.save()
        if stop.signal and progress.step < work.total_steps:
            raise Interrupted(
                f"stopped by signal {stop.signal} after step {progress.step} of {work.total_steps}; all is saved",
                "Run the same command with --resume to go on",
                stop.signal,
            )
    if loop.best:
        work.method.load_state(work.model, loop.best)
    return progress


class Loop:
    """The mutable state of a run: the optimizer, the counts, the best adapter so far. save: keeps it."""

    def __init__(self, work: Work, start: Checkpoint | None, save: Callable[[Checkpoint], None]) -> None:
        self.work = work
        self.progress = start.progress if start else Progress()
        loss_scale.begin(self.progress, work.engine.dtype)
        self.best = start.best if start else {}
        self.ranks = _rank_schedule(work)
        self.parameters, self.optimizer = optimizer_of(work)
        if start:
            work.method.load_state(work.model, start.adapter)
            load_optimizer_state(self.optimizer, list(self.parameters), start.optimizer)
            if self.ranks:
                self.ranks.load_state(start.ranks)
        self._save = save
        self._saved_at = time.monotonic()

    def save_is_due(self) -> bool:
        """By --save-every, or else once a minute: when a state is saved does not change what is computed."""
        if self.work.config.save_every:
            return self.progress.step % self.work.config.save_every == 0
        return time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES

    def save(self) -> None:
        """Keep the state as it is."""
        # The tensors themselves, not copies: nothing changes them until they are written.
        adapter = dict(self.work.method.state(self.work.model))
        moments = optimizer_state(self.optimizer, list(self.parameters))
        ranks = self.ranks.state() if self.ranks else {}
        self._save(Checkpoint(self.progress, self.work.identity, adapter, moments, self.best, ranks))
        self._saved_at = time.monotonic()


def optimizer_of(work: Work) -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    """What is trained, and AdamW over it; those of one rate follow each other."""
    config, trained = work.config, work.method.trainable(work.model)
    factors = {name: _rate_factor(name, config) for name in trained}
    parameters = {name: trained[name] for name in sorted(trained, key=lambda name: factors[name])}
    betas, own = (config.beta1, config.beta2), [factors[name] for name in parameters]
    return parameters, adamw(parameters.values(), config.peak_rate, betas, config.weight_decay, own)


def _rank_schedule(work: Work) -> RankSchedule | None:
    """How ranks change, if they do. Raises ConfigError."""
    config = work.config
    if config.rank_schedule != "adalora":
        return None
    phases = config.rank_hold, config.rank_settle
    return schedule(inject.owners(work.model), config.r, work.total_steps, *phases, config.orthogonality)


def _rate_factor(name: str, config: TrainConfig) -> float:
    """What the rate of a parameter is multiplied by: a head of labels and gates have rates of their own.

    Source: Hayou et al. 2024, LoRA+, eq. 8: B's by lambda.
    """
    if name.startswith(f"{HEAD}."):
        return config.head_rate / config.peak_rate
    if name.endswith(".gate"):
        return config.gate_rate
    return config.lora_plus if name.endswith(".lora_B") else 1.0


def train_one_step(loop: Loop, report: Reporter) -> None:
    """One optimizer step, micro-batch by micro-batch; the loss is the mean over all supervised tokens of the step."""
    work, progress, config = loop.work, loop.progress, loop.work.config
    started = time.perf_counter()
    epoch, index = divmod(progress.step, work.steps_per_epoch)
    row_ids = step_rows(len(work.rows), config.batch_size, config.order_seed, epoch, index)
    batches = micro_batches(work.rows, row_ids, work.micro_tokens, work.engine.packing)

    counted = TALLY.flop
    loss = loss_scale.scaled(progress, loop.parameters.values(), lambda: accumulate_gradients(work, progress, batches))
    if loop.ranks:
        loop.ranks.add_gradients()
    grad_norm = clip_gradients(list(loop.parameters.values()), config.clip or math.inf)
    lr = rate(progress.step, work.total_steps, config.peak_rate, config.schedule, config.warmup)
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    if applied:
        _apply(loop, lr)
    else:
        _count_bad_step(loop, row_ids, loss, grad_norm, report)
    if loop.ranks:
        loop.ranks.after_step(progress.step + 1, applied)
    loop.optimizer.zero_grad(set_to_none=True)
    work.engine.after_step()
    let_go(work.rows)

    step_s = time.perf_counter() - started
    progress.step += 1
    progress.train_s += step_s
    progress.flop += TALLY.flop - counted
    progress.tokens_seen += sum(batch.real_tokens for batch in batches)
    progress.tokens_supervised += sum(batch.supervised_tokens for batch in batches)
    progress.tokens_computed += sum(batch.computed_tokens for batch in batches)
    progress.last_loss = loss if applied else progress.last_loss
    report.step(
        StepReport(
            step=progress.step,
            epoch=epoch,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            applied=applied,
            tokens=sum(batch.real_tokens for batch in batches),
            step_s=step_s,
        )
    )


def accumulate_gradients(work: Work, progress: Progress, batches: Sequence[Batch]) -> float:
    """Gradients of a step's mean loss times `loss_scale`, added up over its micro-batches; returns that loss.

    Each micro-batch is divided by the supervised tokens of the whole step, never by its own, so the sum is exactly the
    gradient of the undivided batch.
    """
    supervised = sum(batch.supervised_tokens for batch in batches)
    total, scale, step = 0.0, progress.loss_scale, progress.step
    for batch in batches:
        work.method.before_forward(work.model, work.config.seed, step, batch.token_rows, batch.position_ids)
        loss: Tensor = work.engine.training_loss(batch) / supervised
        (loss * scale).backward()  # type: ignore[no-untyped-call]  # torch ships it without annotations
        total += float(loss.detach())
        del loss  # or its graph would live through the next forward pass
    return total


def _apply(loop: Loop, lr: float) -> None:
    first = loop.progress.step == len(loop.progress.skipped_steps)
    before = {name: p.detach().clone() for name, p in loop.parameters.items()} if first else {}
    set_rate(loop.optimizer, lr)
    loop.optimizer.step()
    loop.progress.bad_steps_in_a_row = 0
    if first:
        _check_everything_learns(loop.parameters, before)


def _check_everything_learns(parameters: Mapping[str, Tensor], before: dict[str, Tensor]) -> None:
    """After the first step every adapted layer must have a tensor that moved. Raises NumericsError.

    A starts random and B at 0, so at the first step B alone has a gradient: that a layer moved means that its B did.
    """
    moved: dict[str, bool] = {}
    for name, parameter in parameters.items():
        layer = name.rpartition(".")[0]
        changed = parameter.grad is not None and not torch.equal(parameter.detach(), before[name])
        moved[layer] = moved.get(layer, False) or changed
    still = [layer for layer, has_moved in moved.items() if not has_moved]
    if still:
        raise NumericsError(
            f"{len(still)} of {len(moved)} adapted layers got no gradient in the first step: {listed(still, 6)}",
            "Leave them out with --targets or --layers: they do not reach the loss",
        )


def _count_bad_step(loop: Loop, row_ids: list[int], loss: float, grad_norm: float, report: Reporter) -> None:
    """Skip a step whose loss or gradient is not finite. Raises NumericsError after three in a row."""
    progress = loop.progress
    progress.skipped_steps.append(progress.step)
    progress.bad_steps_in_a_row += 1
    origins = listed((loop.work.rows[row].origin for row in row_ids), 16)
    what = f"step {progress.step + 1} skipped: loss {loss}, gradient norm {grad_norm}; its rows: {origins}"
    report.note(progress.step + 1, what)
    if progress.bad_steps_in_a_row == BAD_STEPS_TO_STOP:
        raise NumericsError(
            f"the loss or gradient was not finite in {BAD_STEPS_TO_STOP} steps in a row; the last: {what}",
            "Lower --lr, try --precision fp32, or look at those rows",
        )


def _evaluate(loop: Loop, evaluate: Callable[[], float], report: Reporter) -> None:
    """Measure the held-out loss, keep the adapter if it is the best so far, stop early when it no longer improves."""
    progress, config = loop.progress, loop.work.config
    started = time.perf_counter()
    loss = evaluate()
    progress.eval_s += time.perf_counter() - started
    if loop.ranks and not loop.ranks.is_settled(progress.step):
        report.evaluated(progress.step, loss, False)  # the best is one of those with the ranks that were asked for
        return
    better = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
    if better:
        progress.best_loss, progress.best_step, progress.evaluations_without_gain = loss, progress.step, 0
        loop.best = {}  # before there are two of them
        loop.best = dict(loop.work.method.state(loop.work.model))
    else:
        progress.evaluations_without_gain += 1
    progress.stopped_early = config.patience is not None and progress.evaluations_without_gain >= config.patience
    report.evaluated(progress.step, loss, better)
    if progress.stopped_early:
        many = progress.evaluations_without_gain
        report.note(progress.step, f"stopped early: {many} evaluation{'s' * (many > 1)} without a better loss")
