"""What a request asks for, and what is offered: between HTTP and what computes. No HTTP library, no llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What is called with each piece of an answer: its text, often none, and of how many tokens it is. True ends the answer.
Take = Callable[[str, int], bool]
Finish = Literal["stop", "length", "taken"]  # ended by the model; by a limit; by `Take`


@dataclass(frozen=True, slots=True)
class Served:
    """A model that a request can name.

    adapter: its number in the backend, None for the base alone. system: the system message of its training rows, for
    conversations that begin without one. stops: the tokens that end an answer.
    """

    name: str
    adapter: int | None
    system: str | None
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    stops: frozenset[int]


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer that is wanted, with nothing left open.

    adapter: as of `Served`. prompt: token ids. max_new_tokens: prompt and answer fit into the context. schema: a JSON
    schema that the answer must follow.
    """

    adapter: int | None
    scale: float
    prompt: list[int]
    stops: frozenset[int]
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    schema: dict[str, Any] | None = None


class Backend(Protocol):
    """What computes answers. Its methods are called in threads; `answer` in up to `parallel` at once."""

    name: str
    parallel: int
    context: int
    # What of a request it cannot do, by the names of Ask's fields.
    unable: frozenset[str]

    def answer(self, ask: Ask, take: Take) -> Finish:
        """Give the pieces of one answer to `take`, also empty ones while the prompt is read. Raises LorafitError."""

    def close(self) -> None:
        """Free the model. No answer may be under way."""


class UntilStop:
    """Cuts a text, as it comes, in front of the first of some strings; what may be the start of one is held back."""

    def __init__(self, stops: list[str]) -> None:
        self._stops, self._held = stops, ""
        self.found = False

    def push(self, text: str) -> str:
        """The part that is certain now; empty once a stop was found."""
        if self.found:
            return ""
        text = self._held + text
        first = min((at for at in map(text.find, self._stops) if at >= 0), default=-1)
        if first >= 0:
            self.found, self._held = True, ""
            return text[:first]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back and turned out to be no stop."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that a stop begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
