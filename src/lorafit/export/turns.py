"""What a chat template writes around the messages of a conversation, found by rendering conversations with marks.

Nearly every template writes a fixed text between two messages that depends on their roles alone, as `<|im_end|>`, a new
line and `<|im_start|>user` between a reply and a question. Those texts are found here, whatever the template's name or
wording. Whether they are all that it does is for the caller to see, by comparing what they make with the template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafit.data.example import Message
from lorafit.data.template import render
from lorafit.errors import DataError, ModelError
from lorafit.export.gguf_chat import begins_with_bos

START, SYSTEM, USER, ASSISTANT, REPLY = "", "system", "user", "assistant", "reply"
MARK = "Zq{}qZ"  # a word that no template writes, and that trimming leaves as it is


@dataclass(frozen=True)
class Turns:
    """between: (role before, or START; role after, or REPLY) -> the text between their contents.

    around_system: where the system message goes into the last question: the text before and after it there.
    """

    between: dict[tuple[str, str], str]
    around_system: tuple[str, str] | None = None

    @property
    def takes_later_system(self) -> bool:
        """Whether one may stand within a conversation."""
        return (ASSISTANT, SYSTEM) in self.between

    @property
    def takes_system(self) -> bool:
        """Whether a system message has a place."""
        return self.around_system is not None or (START, SYSTEM) in self.between


def find_turns(tokenizer: Any) -> list[Turns]:
    """What the template may be, the likeliest first: system messages at their place, or in the last question.

    Raises DataError where there is no template or it refuses a question, ModelError where it changes one.
    """
    known: dict[tuple[str, str], str] = {}
    for roles in ([USER], [USER, ASSISTANT, USER]):
        known |= _between(tokenizer, roles)
    try:
        with_system = _between(tokenizer, [SYSTEM, USER])
    except (DataError, ModelError):
        return [Turns(known)]
    later = _later_system(tokenizer)
    if any(text != (known | with_system).get(pair, text) for pair, text in later.items()):
        later = {}
    found = [Turns(known | with_system | later)]
    before, opening = with_system[START, SYSTEM], known[START, USER]
    if before.startswith(opening):
        found.append(Turns(known, (before.removeprefix(opening), with_system[SYSTEM, USER])))
    return found


def _later_system(tokenizer: Any) -> dict[tuple[str, str], str]:
    """Around a system message within a conversation, where the template takes one."""
    try:
        return _between(tokenizer, [USER, ASSISTANT, SYSTEM, USER])
    except (DataError, ModelError):
        return {}


def _between(tokenizer: Any, roles: list[str]) -> dict[tuple[str, str], str]:
    """(role before, role after) -> text, of one conversation. Raises ModelError if a mark is lost or moved."""
    marks = [MARK.format(number) for number in range(len(roles))]
    messages: list[Message] = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    rest = rendered(tokenizer, messages)
    found: dict[tuple[str, str], str] = {}
    for before, after, mark in zip([START, *roles], roles, marks, strict=False):
        text, its, rest = rest.partition(mark)
        if not its:
            raise ModelError(f"the chat template leaves out or moves the message of the {after}", "")
        found[before, after] = text
    if any(mark in rest for mark in marks):
        raise ModelError("the chat template writes a message twice", "")
    found[roles[-1], REPLY] = rest
    return found


def rendered(tokenizer: Any, messages: list[Message]) -> str:
    """The text before a reply, as a program that puts bos in front by itself is to write it. Raises DataError."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if begins_with_bos(tokenizer) else text
