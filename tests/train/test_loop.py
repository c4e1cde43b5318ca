from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorafit.config import TrainConfig
from lorafit.data.formats import read_examples
from lorafit.data.mask import encode_all
from lorafit.data.pack import micro_batches
from lorafit.data.rows import Row
from lorafit.engine.engine import plain, prepare
from lorafit.engine.packing import Packing
from lorafit.errors import Interrupted, NumericsError
from lorafit.methods import gated
from lorafit.methods.table import METHODS
from lorafit.train.checkpoint import Checkpoint
from lorafit.train.loop import Work, fit
from lorafit.train.reporting import StepReport
from lorafit.train.signals import StopRequest
from tests import tiny

QUESTIONS = [(f"What is {n}?", f"It is {n * 3}{'.' * (n % 5)}") for n in range(12)]


class Heard:
    """A reporter that remembers."""

    def __init__(self, on_step: Callable[[StepReport], None] | None = None) -> None:
        self.steps: list[StepReport] = []
        self.evaluations: list[tuple[int, float, bool]] = []
        self.notes: list[str] = []
        self.on_step = on_step

    def step(self, report: StepReport) -> None:
        self.steps.append(report)
        if self.on_step:
            self.on_step(report)

    def evaluated(self, step: int, loss: float, better: bool) -> None:
        self.evaluations.append((step, loss, better))

    def note(self, step: int, message: str) -> None:
        self.notes.append(message)


def work(
    questions: list[tuple[str, str]] | None = None,
    model: nn.Module | None = None,
    engine: str = "fast",
    evaluate: Callable[[nn.Module], float] | None = None,
    **settings: Any,
) -> Work:
    model = model or tiny.llama()
    defaults = {"r": 3, "alpha": 7.0, "batch_size": 4, "lr": 5e-3}
    config = TrainConfig(model="tiny", data="rows", output="out", **{**defaults, **settings})
    rows = [Row(tiny.chat_row(*pair), f"rows.jsonl:{n + 1}") for n, pair in enumerate(questions or QUESTIONS)]
    encoded = encode_all(read_examples(rows), tiny.tokenizer(), config.seq_len)
    gated.attach(model, config)
    return Work(
        model=model,
        method=METHODS["lora"],
        rows=list(encoded.encoded),
        micro_tokens=config.micro_tokens,
        engine=prepare(model, share_prefix=config.dropout == 0) if engine == "fast" else plain(model),
        config=config,
        identity={},
        evaluate=(lambda: evaluate(model)) if evaluate else None,
    )


def adapter(job: Work) -> dict[str, torch.Tensor]:
    return job.method.state(job.model)


def run(job: Work, start: Checkpoint | None = None, heard: Heard | None = None) -> list[Checkpoint]:
    saved: list[Checkpoint] = []
    fit(job, start, saved.append, StopRequest(), heard or Heard())
    return saved


def test_the_loss_is_that_of_transformers_over_the_same_labels() -> None:
    job = work()
    batch = micro_batches(job.rows, [0, 5, 9], 4096, Packing(padded=True))[0]
    expected = 0.0
    with torch.no_grad():
        loss = job.engine.loss(batch)
        for row in (job.rows[0], job.rows[5], job.rows[9]):
            ids, supervised = torch.from_numpy(row.input_ids).long(), torch.from_numpy(row.supervised)
            labels = ids.masked_fill(~supervised, -100)  # transformers shifts them itself
            expected += float(job.model(input_ids=ids[None], labels=labels[None]).loss) * int(supervised.sum())
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def _gradients(micro_tokens: int) -> tuple[float, dict[str, torch.Tensor]]:
    job = work(micro_tokens=micro_tokens, batch_size=12, max_steps=1, clip=None)
    gradients: dict[str, torch.Tensor] = {}
    parameters = job.method.trainable(job.model)

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients.update({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})

    handle = register_optimizer_step_pre_hook(keep)
    try:
        heard = Heard()
        run(job, heard=heard)
    finally:
        handle.remove()
    return heard.steps[0].loss, gradients


@pytest.mark.parametrize("micro_tokens", [1, 90, 200])
def test_accumulation_gives_the_gradient_of_the_undivided_batch(micro_tokens: int) -> None:
    whole_loss, whole = _gradients(1 << 20)
    loss, split = _gradients(micro_tokens)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for name, expected in whole.items():
        assert (split[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-12, name


def test_training_lowers_the_loss_and_moves_only_the_adapter() -> None:
    job = work(epochs=12, lr=0.02)
    frozen = {name: p.detach().clone() for name, p in job.model.named_parameters() if not p.requires_grad}
    heard = Heard()
    run(job, heard=heard)
    assert heard.steps[-1].loss < 0.8 * heard.steps[0].loss
    after = dict(job.model.named_parameters())
    assert all(torch.equal(expected, after[name]) for name, expected in frozen.items())


@pytest.mark.parametrize(("expected", "settings"), [(6, {"epochs": 2}), (5, {"max_steps": 5}), (7, {"max_steps": 7})])
def test_max_steps_wins_over_epochs(expected: int, settings: dict[str, int]) -> None:
    heard = Heard()
    run(work(**settings), heard=heard)
    assert [report.step for report in heard.steps] == list(range(1, expected + 1))


def test_a_run_that_is_stopped_and_resumed_ends_bitwise_where_one_left_alone_does() -> None:
    settings: dict[str, Any] = {"dropout": 0.2, "epochs": 3, "micro_tokens": 100, "weight_decay": 0.01}
    through = work(**settings)
    run(through)
    for stop_after in range(1, 9):
        request = StopRequest()

        def ask(report: StepReport, after: int = stop_after, request: StopRequest = request) -> None:
            request.signal = 15 if report.step == after else 0

        saved: list[Checkpoint] = []
        with pytest.raises(Interrupted) as error:
            fit(work(**settings), None, saved.append, request, Heard(ask))
        assert error.value.exit_code == 143
        assert saved[-1].progress.step == stop_after
        resumed = work(**settings)
        run(resumed, start=saved[-1])
        assert all(torch.equal(value, adapter(resumed)[name]) for name, value in adapter(through).items())


def _poisoned() -> nn.Module:
    """A model in which the letter Z is not a number."""
    model = tiny.llama()
    ids = tiny.tokenizer()("Z", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.get_input_embeddings().weight[ids] = math.nan
    return model


def _with_z(*positions: int) -> list[tuple[str, str]]:
    return [(question + ("Z" if n in positions else ""), reply) for n, (question, reply) in enumerate(QUESTIONS)]


def test_a_step_that_is_not_finite_is_skipped_and_its_rows_are_named() -> None:
    heard = Heard()
    job = work(_with_z(7), _untied(_poisoned()))
    saved = run(job, heard=heard)
    applied = [report.applied for report in heard.steps]
    assert applied.count(False) == 1
    assert "rows.jsonl:8" in heard.notes[0]
    assert saved[-1].progress.skipped_steps == [applied.index(False)]
    assert all(value.isfinite().all() for value in adapter(job).values())


def _untied(model: nn.Module) -> nn.Module:
    """The head gets a weight of its own, so that the poison stays in the embedding."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.nan_to_num(head.weight.detach().clone()))
    return model


def test_three_bad_steps_in_a_row_end_the_run_with_advice() -> None:
    with pytest.raises(NumericsError, match=r"3 steps in a row.*Lower --lr"):
        run(work(_with_z(*range(12)), _untied(_poisoned()), epochs=2))


def test_a_layer_that_does_not_reach_the_loss_is_named_after_the_first_step() -> None:
    model = tiny.llama()
    model.model.unused = nn.Linear(32, 32)
    with pytest.raises(NumericsError, match=r"1 of 15 adapted layers got no gradient in the first step: model.unused"):
        run(work(model=model))


def test_the_best_adapter_is_kept_and_training_stops_early() -> None:
    # A loss that an evaluation gives in this order; what is kept is the adapter at the lowest.
    losses = iter([3.0, 1.0, 2.0, 2.5, 0.1])
    seen: list[dict[str, torch.Tensor]] = []
    job = work(
        evaluate=lambda model: (seen.append(METHODS["lora"].state(model)), next(losses))[1], epochs=5, patience=2
    )
    heard = Heard()
    progress = fit(job, None, lambda state: None, StopRequest(), heard)
    assert [loss for _, loss, _ in heard.evaluations] == [3.0, 1.0, 2.0, 2.5]
    assert (progress.best_loss, progress.best_step, progress.stopped_early) == (1.0, 6, True)
    assert all(torch.equal(expected, adapter(job)[name]) for name, expected in seen[1].items())


def test_evaluation_falls_on_its_own_steps_when_asked() -> None:
    heard = Heard()
    run(work(evaluate=lambda model: 1.0, eval_every=2, epochs=2), heard=heard)
    assert [step for step, _, _ in heard.evaluations] == [2, 4, 6]


def test_clipping_bounds_the_step_but_reports_the_true_norm() -> None:
    heard = Heard()
    run(work(clip=1e-3, max_steps=1), heard=heard)
    assert heard.steps[0].grad_norm > 1e-2
