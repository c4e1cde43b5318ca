"""Ollama's Modelfile of a model: what it says around messages, where a reply ends, how tokens are drawn.

Of a GGUF file's own chat template Ollama only looks up which of its own templates it resembles, and takes the plain
prompt where none is near. So TEMPLATE is always written, and held against the chat template on conversations.
Source: Ollama's docs/modelfile.md, template/template.go, parser/parser.go.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

from lorafit.config import ChatConfig
from lorafit.data.mask import stop_ids
from lorafit.errors import DataError, ModelError
from lorafit.export import go_template
from lorafit.export.turns import MARK, SYSTEM, Turns, find_turns, rendered

QUESTION, REPLY = {"role": "user"}, {"role": "assistant"}
TEXTS = (
    "Where is my parcel?\nIt was sent on 7 May.",
    "On its way.",
    "{{ .Role }} and {% if %}, 3 < 4?",
    "Über 12 €.",
    "So?",
)
BARE = "{{ .Prompt }}"  # which is Ollama's own default
CLOCK = ("strftime_now", "date_string")


@dataclass(frozen=True)
class Template:
    """text: in Go's language. notes: what else the chat template does, which it cannot say."""

    text: str
    takes_system: bool
    notes: list[str]


def template_of(tokenizer: Any) -> Template:
    """The chat template in Go's language. Raises ModelError where none was found that writes the same."""
    if not tokenizer.chat_template:
        return Template(BARE, False, ["the model has no chat template: Ollama gives it the bare prompt"])
    try:
        candidates = find_turns(tokenizer)
    except (DataError, ModelError) as error:
        raise _impossible(error.what) from None
    differing: list[str] = []
    for turns in candidates:
        text = go_template.write(turns)
        differing = [name for name, messages in conversations().items() if not _same(text, messages, tokenizer)]
        if not differing:
            return Template(text, turns.takes_system, _notes(turns, tokenizer))
    raise _impossible(f"a template of fixed texts between messages writes {differing[0]} otherwise")


def conversations() -> dict[str, list[dict[str, str]]]:
    """What a Go template is held against the chat template on."""
    talk = [{**(REPLY if number % 2 else QUESTION), "content": text} for number, text in enumerate(TEXTS)]
    found = {"a question": talk[:1], "a second question": talk[:3], "a third question": talk}
    system = {"role": SYSTEM, "content": "Be brief.\nBe kind."}
    return found | {f"{name} after a system message": [system, *own] for name, own in found.items()}


def _same(text: str, messages: list[dict[str, str]], tokenizer: Any) -> bool:
    try:
        return go_template.evaluate(text, messages) == rendered(tokenizer, [dict(message) for message in messages])
    except DataError:  # refused by the chat template: nothing to agree with
        return True


def _notes(turns: Turns, tokenizer: Any) -> list[str]:
    notes = []
    if not turns.takes_system:
        notes.append("the chat template has no place for system messages, and Ollama's leaves them out")
    elif not turns.takes_later_system:
        notes.append("a system message is understood at the beginning of a conversation alone")
    padded = rendered(tokenizer, [{**QUESTION, "content": f" {MARK} "}])
    if f" {MARK} " not in padded:
        notes.append("the chat template trims messages, and Ollama's cannot: send them without spaces around them")
    thought = [
        {**QUESTION, "content": "a"},
        {**REPLY, "content": f"<think>{MARK}</think>b"},
        {**QUESTION, "content": "c"},
    ]
    if MARK not in rendered(tokenizer, [dict(message) for message in thought]):
        notes.append("the chat template drops the reasoning of earlier replies, and Ollama's cannot: leave it out")
    if any(name in str(tokenizer.chat_template) for name in CLOCK):
        notes.append("the chat template writes the date of the day, and Ollama's has the one of this export")
    if "tools" in str(tokenizer.chat_template):
        notes.append("tools are left out of Ollama's template")
    return notes


def _impossible(why: str) -> ModelError:
    return ModelError(
        f"the chat template cannot be said in Ollama's template language: {why.rstrip('.')}",
        "Export --format gguf, and serve it with llama.cpp, which reads the chat template itself",
    )


@dataclass(frozen=True)
class Modelfile:
    """What is written. stops: texts that end a reply. system: what all training rows began with."""

    model: str
    template: str
    stops: list[str]
    num_ctx: int
    system: str | None
    licence: str | None

    def render(self) -> str:
        """The file's text. Sampling is `lorafit chat`'s: Ollama's own defaults draw, and punish repetition."""
        temperature = ChatConfig.model_fields["temperature"].default
        parts = [f"FROM ./{self.model}", f"TEMPLATE {_quoted(self.template)}"]
        parts += [f'PARAMETER stop "{stop}"' for stop in self.stops]
        parts += [
            f"PARAMETER num_ctx {self.num_ctx}",
            f"PARAMETER temperature {temperature:g}",
            "PARAMETER repeat_penalty 1",
        ]
        parts += [f"SYSTEM {_quoted(self.system)}"] if self.system else []
        parts += [f"LICENSE {_quoted(self.licence)}"] if self.licence else []
        return "\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def dropped(text: str) -> list[str]:
    """Characters that a Modelfile cannot hold outside of its template: what Go does not print, and three quotes."""
    lost = {char for char in text if char not in " \n\t" and unicodedata.category(char)[0] not in "LMNPS"}
    return sorted(f"U+{ord(char):04X}" for char in lost) + (['"""'] if '"""' in text else [])


def stops_of(tokenizer: Any) -> list[str]:
    """The texts of all tokens that end a reply."""
    return [str(tokenizer.decode([token])) for token in sorted(stop_ids(tokenizer))]
