from __future__ import annotations

import time

import pytest
from transformers import PreTrainedTokenizerFast

from lorafit.data import template
from lorafit.data.deadline import OutOfTime, deadline
from lorafit.errors import DataError


def test_what_runs_too_long_is_stopped_and_what_does_not_is_left_alone() -> None:
    begun = time.monotonic()
    with pytest.raises(OutOfTime), deadline(0.1):
        while True:
            pass
    assert time.monotonic() - begun < 60  # other threads of the process may hold the interpreter for a while
    for _ in range(1000):
        with deadline(10):
            pass
    with deadline(0.3):
        pass
    time.sleep(0.5)  # the end of a block that is over reaches nobody


def test_a_template_that_never_ends_is_refused(
    chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.2)
    loops = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(chatml, "chat_template", loops)
    with pytest.raises(DataError, match=r"f:1: the chat template runs for more than 0.2 s"):
        template.render(chatml, [{"role": "user", "content": "a"}], True, "f:1")
