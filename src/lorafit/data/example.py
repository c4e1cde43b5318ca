"""What a row says, whatever its format: a conversation, a prompt with what follows, running text, or labelled text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# "role" and "content", and what a template may read beside them: "tool_calls", "tool_call_id", "name", reasoning.
# A dict because chat templates index it.
Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with the assistant.

    messages: {"role": "system" | "user" | "assistant" | "tool", "content": str, ...} each.
    context: this many first messages are only read; assistant turns after them have a loss.
    tools: JSON schemas of the functions that the assistant may call, for the template.
    unlearned: numbers of assistant messages after them that are only read as well.
    """

    messages: tuple[Message, ...]
    origin: str
    context: int = 0
    tools: tuple[Tool, ...] = ()
    unlearned: frozenset[int] = frozenset()

    def learned(self) -> list[int]:
        """Numbers of the messages that have a loss."""
        after = range(self.context, len(self.messages))
        return [n for n in after if self.messages[n]["role"] == "assistant" and n not in self.unlearned]


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt that is only read, and the text that follows it, which has the loss."""

    prompt: str
    completion: str
    origin: str


@dataclass(frozen=True, slots=True)
class Plain:
    """Running text: every token but the first has a loss."""

    text: str
    origin: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and what it is an example of: one label, or any number of them where `several`; or a number.

    number: where the label is one; a whole one is a label as well.
    """

    text: str
    labels: tuple[str, ...]
    origin: str
    several: bool = False
    number: float | None = None


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words, and a tag for each of them."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    origin: str


Example = Chat | Completion | Plain | Labelled | Tagged
