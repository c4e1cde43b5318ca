from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from rich.console import Console

from lorafit.errors import ConfigError, DataError, ModelError
from lorafit.infer.chat import Session, chat
from lorafit.lora.inject import lora_layers, set_scale
from tests import tiny
from tests.infer.learned import LEARNED, Learned, llama

REPLY = dict(LEARNED)
QUESTION = LEARNED[0][0]


class Terminal(io.StringIO):
    """A stream that says it is a terminal. before_write: called with each text before it is written."""

    def __init__(self, text: str = "", before_write: Callable[[str], None] = lambda text: None) -> None:
        super().__init__(text)
        self._before_write = before_write

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._before_write(text)
        return super().write(text)


def session(learned: Learned, **settings: Any) -> Session:
    defaults: dict[str, Any] = {
        "has_adapter": True, "scale": 1.0, "system": None, "temperature": 0.0, "max_new_tokens": 40, "seed": 0,
    }  # fmt: skip
    learned.model.eval()
    return Session(model=learned.model, tokenizer=learned.tokenizer, **{**defaults, **settings})


def filtered(own: Session, lines: Iterable[str]) -> tuple[list[str], str]:
    """Lines in: the lines of stdout, and the notes."""
    stdout, notes = io.StringIO(), io.StringIO()
    chat(own, io.StringIO("".join(f"{line}\n" for line in lines)), stdout, Console(file=notes, width=1000))
    return stdout.getvalue().splitlines(), notes.getvalue()


def talked(own: Session, text: str, **terminal: Any) -> tuple[str, str]:
    """What a user at a terminal sees: stdout, and the notes."""
    stdout, notes = Terminal(**terminal), io.StringIO()
    chat(own, Terminal(text), stdout, Console(file=notes, width=1000))
    return stdout.getvalue(), notes.getvalue()


def base_answer(learned: Learned, question: str) -> str:
    lines, _ = filtered(session(Learned(llama(), learned.tokenizer, []), has_adapter=False), [question])
    return "\n".join(lines)


def test_a_filter_answers_each_line_and_prints_nothing_else(learned: Learned) -> None:
    for question, reply in LEARNED:
        assert filtered(session(learned), [question]) == ([reply], "")


def test_empty_lines_are_passed_over_and_the_last_needs_no_line_break(learned: Learned) -> None:
    own, stdout = session(learned), io.StringIO()
    chat(own, io.StringIO(f"\n   \n{QUESTION}"), stdout, Console(file=io.StringIO()))
    assert stdout.getvalue() == REPLY[QUESTION] + "\n"


def test_the_conversation_is_remembered_until_reset(learned: Learned) -> None:
    own = session(learned)
    _, notes = filtered(own, [QUESTION, "Hi"])
    assert [message["content"] for message in own.history[:3]] == [QUESTION, REPLY[QUESTION], "Hi"]
    lines, notes = filtered(session(learned), [QUESTION, "/reset", "Hi"])
    assert lines == [REPLY[QUESTION], REPLY["Hi"]]
    assert "anew" in notes


def test_scale_changes_while_chatting(learned: Learned) -> None:
    own = session(learned)
    lines, notes = filtered(own, [QUESTION, "/reset", "/scale 0", QUESTION, "/scale", "/reset", "/scale 1.0", QUESTION])
    assert lines[0] == lines[-1] == REPLY[QUESTION]
    assert "\n".join(lines[1:-1]) == base_answer(learned, QUESTION)
    assert notes.count("scale 0\n") == 2
    assert "scale 1\n" in notes
    assert own.scale == 1.0


def test_base_answers_by_both_and_changes_nothing(learned: Learned) -> None:
    own = session(learned)
    lines, _ = filtered(own, [QUESTION, "/base"])
    assert lines[0] == REPLY[QUESTION]
    assert "\n".join(lines[1:-1]) == f"[base] {base_answer(learned, QUESTION)}"
    assert lines[-1] == f"[tuned, scale 1] {REPLY[QUESTION]}"
    assert len(own.history) == 2
    assert {layer.scale for layer in lora_layers(learned.model).values()} == {1.0}


def test_base_at_scale_0_shows_the_tuned_model_at_1(learned: Learned) -> None:
    lines, _ = filtered(session(learned), ["/scale 0", QUESTION, "/base"])
    assert lines[-1] == f"[tuned, scale 1] {REPLY[QUESTION]}"
    assert {layer.scale for layer in lora_layers(learned.model).values()} == {0.0}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/scael 1", "Did you mean '/scale'?"),
        ("/frobnicate", "There are /scale, /base, /system, /reset, /help, /quit."),
        ("/scale lots", "/scale 'lots' is no number"),
        ("/scale nan", "finite"),
        ("/base", "Say something first"),
    ],
)
def test_a_wrong_command_is_a_sentence(learned: Learned, line: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        filtered(session(learned), [line])
    assert sentence in str(error.value)
    stdout, notes = talked(session(learned), f"{line}\n{QUESTION}\n")  # a terminal shows it and goes on
    assert sentence in notes
    assert REPLY[QUESTION] in stdout


def test_a_space_in_front_sends_what_looks_like_a_command(learned: Learned) -> None:
    own = session(learned)
    filtered(own, [" /etc/fstab"])
    assert own.history[0] == {"role": "user", "content": "/etc/fstab"}


@pytest.mark.parametrize("line", ["/scale 0.5", "/base"])
def test_a_model_without_an_adapter_has_nothing_to_scale(learned: Learned, line: str) -> None:
    with pytest.raises(ConfigError, match="a model without one"):
        filtered(session(learned, has_adapter=False), [line])


def test_quit_ends_and_help_lists_every_command(learned: Learned) -> None:
    lines, notes = filtered(session(learned), ["/help", "/quit", QUESTION])
    assert lines == []
    assert all(name in notes for name in ("/scale X", "/base", "/system TEXT", "/reset", "/help", "/quit"))


def test_the_system_message_comes_once_and_only_if_there_is_one(learned: Learned) -> None:
    template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nDEFAULT<|im_end|>\n{% endif %}" + tiny.CHATML
    )
    own = session(learned)
    own.tokenizer = tiny.tokenizer(template)
    read: list[str] = []
    hook = learned.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(own.tokenizer.decode(kwargs["input_ids"][0])), with_kwargs=True
    )
    try:
        filtered(own, ["Hi", "/reset", "/system Be short", "Hi", "/reset", "/system", "Hi"])
    finally:
        hook.remove()
    prompts = [text for text in read if "<|im_start|>assistant" in text]
    assert [text.count("DEFAULT") for text in prompts] == [1, 0, 1]
    assert [text.count("Be short") for text in prompts] == [0, 1, 0]
    assert all(text.count("system\n") == 1 for text in prompts)


def test_a_terminal_is_prompted_and_told_the_speed(learned: Learned) -> None:
    stdout, notes = talked(session(learned), f"{QUESTION}\n")
    assert stdout == f"> {REPLY[QUESTION]}\n> "
    assert f"{len(REPLY[QUESTION])} tokens, " in notes
    assert "tokens/s" in notes
    assert "/help" in notes


def test_answers_come_in_pieces_and_no_piece_holds_a_part_of_a_character(learned: Learned) -> None:
    written: list[str] = []
    stdout, _ = talked(session(learned), "What is 雨?\n", before_write=written.append)
    assert REPLY["What is 雨?"] in stdout
    assert {"雨", "🌧"} & set("".join(written))
    assert len(written) > 10
    assert all("\ufffd" not in piece for piece in written)


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(learned: Learned) -> None:
    pressed = []

    def press(text: str) -> None:
        if text == ":" and not pressed:
            pressed.append(text)
            raise KeyboardInterrupt

    own = session(learned)
    stdout, notes = talked(own, f"{QUESTION}\n/reset\nHi\n", before_write=press)
    assert stdout == f'> {{"intent"\n> > {REPLY["Hi"]}\n> '
    assert "stopped" in notes
    own = session(learned)
    pressed.clear()
    talked(own, f"{QUESTION}\n", before_write=press)
    assert own.history == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": '{"intent"'}]


def test_ctrl_c_at_the_prompt_ends_the_chat_and_ends_a_filter_as_an_interrupt(learned: Learned) -> None:
    class Interrupted(Terminal):
        def readline(self, size: int | None = -1, /) -> str:
            raise KeyboardInterrupt

    chat(session(learned), Interrupted(), Terminal(), Console(file=io.StringIO()))

    def press(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat(session(learned), io.StringIO("Hi\n"), Terminal(before_write=press), Console(file=io.StringIO()))


def test_the_users_own_terminal_is_read_with_line_editing(learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([QUESTION])

    def read(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    keyboard = Terminal()
    monkeypatch.setattr(sys, "stdin", keyboard)
    monkeypatch.setattr("builtins.input", read)
    stdout = Terminal()
    chat(session(learned), keyboard, stdout, Console(file=io.StringIO()))
    assert stdout.getvalue() == f"{REPLY[QUESTION]}\n\n"


def test_a_cut_answer_is_said(learned: Learned) -> None:
    lines, notes = filtered(session(learned, max_new_tokens=4), [QUESTION])
    assert lines == [REPLY[QUESTION][:4]]
    assert "an answer was cut at 4 tokens" in notes
    assert "cut at 4 tokens" in talked(session(learned, max_new_tokens=4), f"{QUESTION}\n")[1]


def test_the_oldest_turns_are_left_out_when_the_context_is_full(learned: Learned) -> None:
    own = session(learned)
    _, notes = filtered(own, ["x" * 150, "y" * 150, "z" * 150, "Hi"])
    assert "the oldest turns (1 of 2) are left out from here on: the model reads 512 tokens" in notes
    contents = [message["content"] for message in own.history]
    assert "x" * 150 not in contents
    assert contents[-2] == "Hi"
    assert own.history[0]["role"] == "user"


def test_a_message_beyond_the_context_is_refused_and_forgotten(learned: Learned) -> None:
    own = session(learned)
    with pytest.raises(DataError, match="fills the model's context of 512"):
        filtered(own, ["x" * 600])
    assert own.history == []


def test_drawn_answers_follow_the_seed(learned: Learned) -> None:
    def drawn(seed: int) -> list[str]:
        set_scale(learned.model, 0.3)
        return filtered(session(learned, temperature=1.5, seed=seed), [QUESTION, QUESTION])[0]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_model_without_a_template_knows_no_conversation(learned: Learned) -> None:
    own = session(learned)
    own.tokenizer = tiny.tokenizer(template=None)
    with pytest.raises(ModelError, match="no chat template"):
        filtered(own, [QUESTION])


def test_input_that_is_not_utf_8_is_a_sentence(learned: Learned) -> None:
    for errors in ("strict", "surrogateescape"):
        stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors)
        with pytest.raises(DataError, match="not UTF-8"):
            chat(session(learned), stdin, io.StringIO(), Console(file=io.StringIO()))


def test_chatting_computes_no_gradients(learned: Learned) -> None:
    filtered(session(learned), [QUESTION])
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
