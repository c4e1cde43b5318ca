from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from lorafit.data.formats import read_examples
from lorafit.data.mask import encode_all
from lorafit.data.rows import Row
from lorafit.engine.engine import plain, prepare
from lorafit.errors import NumericsError
from lorafit.infer.evaluate import EvalResult, Sample, evaluate, mean_loss, perplexity, row_losses
from lorafit.lora.inject import detach, set_scale
from tests import tiny
from tests.infer.learned import LEARNED, Learned, examples_of, learn, llama


def measure(learned: Learned, examples: Any = None, **settings: Any) -> EvalResult:
    defaults: dict[str, Any] = {
        "batch_size": 3, "max_new_tokens": None, "generate": True, "samples": 2, "seq_len": 512, "micro_tokens": 100,
        "console": Console(file=io.StringIO()),
    }  # fmt: skip
    rows = learned.examples if examples is None else examples
    engine = prepare(learned.model, share_prefix=True)
    try:
        return evaluate(engine, learned.tokenizer, rows, **{**defaults, **settings})
    finally:
        engine.close()


def measures(result: EvalResult) -> tuple[object, ...]:
    """Everything but the time it took."""
    return (result.loss, result.exact_match, result.accuracy, result.valid_json, result.cut_answers, result.samples)


def test_the_tuned_model_is_right_and_its_base_is_not(learned: Learned) -> None:
    tuned = measure(learned)
    set_scale(learned.model, 0.0)
    base = measure(learned)
    assert (tuned.exact_match, tuned.accuracy, tuned.valid_json) == (1.0, 1.0, 1.0)
    assert (base.exact_match, base.accuracy, base.valid_json) == (0.0, 0.0, 0.0)
    assert tuned.loss < 1 < 4 < base.loss
    assert (tuned.rows, base.rows) == (5, 5)
    assert tuned.cut_answers == 0


def test_scale_0_is_bitwise_the_model_without_an_adapter() -> None:
    own = learn()
    set_scale(own.model, 0.0)
    at_zero = measure(own)
    detach(own.model)
    own.model.requires_grad_(False)  # as `eval` opens a model: what is frozen is run fast
    assert measures(measure(own)) == measures(at_zero)
    assert measures(measure(Learned(llama().requires_grad_(False), own.tokenizer, own.examples))) == measures(at_zero)


def test_loss_is_the_mean_over_supervised_tokens_by_plain_cross_entropy(learned: Learned) -> None:
    set_scale(learned.model, 0.5)
    got = measure(learned)
    learned.model.eval()
    losses = []
    for row in encode_all(learned.examples, learned.tokenizer, 512).encoded:
        ids, supervised = torch.from_numpy(row.input_ids).long(), torch.from_numpy(row.supervised)
        with torch.no_grad():
            chances = learned.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        losses += [-float(chances[t - 1, ids[t]]) for t in range(1, len(ids)) if supervised[t]]
    assert got.tokens_supervised == len(losses)
    # Each logit is a sum over 32 products and 2 layers of about 10 such: fp32 rounding of relative size eps sqrt(k L).
    expected = sum(losses) / len(losses)
    assert got.loss == pytest.approx(expected, rel=torch.finfo(torch.float32).eps * math.sqrt(32 * 20))
    assert got.perplexity == math.exp(got.loss)


def test_the_loss_does_not_depend_on_how_rows_are_batched(learned: Learned) -> None:
    set_scale(learned.model, 0.5)
    one, many = measure(learned, micro_tokens=1), measure(learned, micro_tokens=10_000)
    assert one.loss == pytest.approx(many.loss, rel=torch.finfo(torch.float32).eps * math.sqrt(32 * 20))


def test_perplexity_overflows_to_infinity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == math.inf


def test_whitespace_around_a_reply_does_not_count_and_within_it_does(learned: Learned) -> None:
    around = examples_of([(question, f" {reply}\n") for question, reply in LEARNED[:2]])
    within = examples_of([(question, reply.replace(": ", ":  ")) for question, reply in LEARNED[:2]])
    assert measure(learned, around).exact_match == 1.0
    assert measure(learned, within).exact_match == 0.0


def test_samples_are_the_first_rows_in_order_right_or_wrong(learned: Learned) -> None:
    wrong = ("Where is my card?", "Somewhere")
    result = measure(learned, examples_of([LEARNED[1], wrong, LEARNED[2]]))
    assert result.samples == (
        Sample(*LEARNED[1], got=LEARNED[1][1], right=True),
        Sample(*wrong, got=LEARNED[0][1], right=False),
    )
    assert result.exact_match == pytest.approx(2 / 3)
    assert measure(learned, samples=0).samples == ()


def test_valid_json_counts_answers_only_where_all_replies_are_objects(learned: Learned) -> None:
    mixed = examples_of([LEARNED[0], ("Where is my card?", "[1]")])
    assert measure(learned, mixed).valid_json is None
    assert measure(learned, max_new_tokens=5).valid_json == 0.0  # cut in their midst
    not_a_number = examples_of([("Where is my card?", '{"a": NaN}')])
    assert measure(learned, not_a_number).valid_json is None


def test_running_text_has_a_loss_and_no_answers(learned: Learned) -> None:
    text = read_examples([Row({"text": "Where is my card? " * 40}, "rows.jsonl:1")])
    result = measure(learned, text, seq_len=100)
    assert math.isfinite(result.loss)
    assert (result.exact_match, result.accuracy, result.valid_json, result.samples) == (None, None, None, ())
    assert result.rows == 1


def test_without_generation_there_is_the_loss_alone(learned: Learned) -> None:
    result = measure(learned, generate=False)
    assert result.loss == measure(learned).loss
    assert (result.exact_match, result.accuracy, result.samples) == (None, None, ())


def test_prompt_and_completion_are_answered_as_a_chat(learned: Learned) -> None:
    rows = [Row({"prompt": question, "completion": reply}, "rows.jsonl:1") for question, reply in LEARNED]
    result = measure(learned, read_examples(rows))
    assert result.exact_match == 1.0
    assert result.samples[0].prompt == LEARNED[0][0]


def test_only_the_last_turn_is_compared(learned: Learned) -> None:
    messages = [*tiny.chat_row("Hi", "Wrong")["messages"], *tiny.chat_row(*LEARNED[0])["messages"]]
    result = measure(learned, read_examples([Row({"messages": messages}, "rows.jsonl:1")]))
    assert result.samples[0].expected == LEARNED[0][1]
    assert result.samples[0].prompt == LEARNED[0][0]


def test_answers_have_room_for_the_longest_reply_and_16_tokens(learned: Learned) -> None:
    set_scale(learned.model, 0.0)
    longest = max(len(reply.encode()) for _, reply in LEARNED)  # one token a byte
    by_default, as_asked = measure(learned), measure(learned, max_new_tokens=longest + 16)
    assert by_default.cut_answers > 0
    assert measures(by_default) == measures(as_asked)
    assert measures(by_default) != measures(measure(learned, max_new_tokens=longest + 15))


def test_batch_size_rows_answer_together(learned: Learned) -> None:
    rows: list[int] = []

    def count(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        if args[0].shape[1] == 1:  # a token is added to each answer
            rows.append(len(args[0]))

    hook = learned.model.model.embed_tokens.register_forward_hook(count)
    try:
        for batch_size in (1, 2, 5):
            rows.clear()
            measure(learned, batch_size=batch_size, micro_tokens=1)
            assert max(rows) == batch_size
    finally:
        hook.remove()


def test_rows_that_are_cut_are_counted(learned: Learned) -> None:
    assert measure(learned, seq_len=94, generate=False).cut_rows == 1


def test_a_loss_that_is_no_number_is_a_sentence(learned: Learned) -> None:
    set_scale(learned.model, 1e38)
    with pytest.raises(NumericsError, match="Lower --scale"):
        measure(learned)


def test_a_terminal_sees_progress_and_a_log_does_not(learned: Learned) -> None:
    shown, logged = io.StringIO(), io.StringIO()
    measure(learned, console=Console(file=shown, force_terminal=True))
    measure(learned, console=Console(file=logged))
    assert "answers" in shown.getvalue()
    assert logged.getvalue() == ""


def rows_and_mean(model: nn.Module, encoded: Any, packed: bool) -> tuple[Any, Any, float]:
    engine = prepare(model, share_prefix=True) if packed else plain(model)
    try:
        nats, tokens = row_losses(engine, encoded.encoded, 90)
        return nats, tokens, mean_loss(engine, encoded.encoded, 90, lambda rows: None)
    finally:
        engine.close()


@pytest.mark.parametrize("packed", [True, False])
def test_each_row_has_the_loss_it_has_alone_and_together_they_are_the_mean(learned: Learned, packed: bool) -> None:
    set_scale(learned.model, 0.5)
    learned.model.eval()
    texts = [{"text": f"They all begin with the same words, and go on {n}."} for n in ("so", "so", "as they like")]
    for examples in (learned.examples, read_examples(Row(text, f"t:{n}") for n, text in enumerate(texts))):
        encoded = encode_all(examples, learned.tokenizer, 512)
        nats, tokens, mean = rows_and_mean(learned.model, encoded, packed)
        assert tokens.tolist() == [int(row.supervised.sum()) for row in encoded.encoded]
        # Sums in another order: fp32 rounding, as in the test of the mean.
        tolerance = torch.finfo(torch.float32).eps * math.sqrt(32 * 20)
        assert nats.sum() / tokens.sum() == pytest.approx(mean, rel=tolerance)
        for number, example in enumerate(examples):
            alone = rows_and_mean(learned.model, encode_all([example], learned.tokenizer, 512), packed)[2]
            assert nats[number] / tokens[number] == pytest.approx(alone, rel=10 * tolerance)
