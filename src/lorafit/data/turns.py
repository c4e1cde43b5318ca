"""An Example -> the text that the model reads, and where in it the replies stand. Characters only; mask.py has the ids.

For each reply with a loss two things are verified, because templates break both: what stands before the reply is
exactly what generation would start from, and the reply is still written like that once later messages follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.data.formats import Chat, Completion, Example, Plain
from lorafit.data.template import as_chat, render
from lorafit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARS = 30


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply with a loss.

    prompt: the row's text before it. reply_end: one past its last character that is no whitespace.
    """

    prompt: str
    reply_end: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A row before it is tokenised.

    turns: the replies with a loss, in order; empty for running text. templated: the text came from a chat template,
    which wrote its special tokens; otherwise BOS and end-of-sequence are still to be put around it.
    """

    text: str
    turns: tuple[Turn, ...]
    origin: str
    templated: bool


def draft(example: Example, tokenizer: PreTrainedTokenizerBase) -> Draft:
    """The text of one row. Raises DataError with its origin where the template and the row do not go together."""
    if isinstance(example, Completion) and tokenizer.chat_template:
        example = as_chat(example)
    if isinstance(example, Chat):
        return _draft_chat(example, tokenizer)
    if isinstance(example, Plain):
        return Draft(example.text, (), example.origin, templated=False)
    text = example.prompt + example.completion
    return Draft(text, (Turn(example.prompt, len(text)),), example.origin, templated=False)


def _draft_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Draft:
    messages, origin = chat.messages, chat.origin
    text = render(tokenizer, messages, add_generation_prompt=False, origin=origin)
    turns = []
    for number in range(chat.context, len(messages)):
        if messages[number]["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:number], add_generation_prompt=True, origin=origin)
        is_last = number == len(messages) - 1
        turn = text if is_last else render(tokenizer, messages[: number + 1], False, origin=origin)
        if not turn.startswith(prompt):
            raise _not_a_prefix(origin, number, "does not start a reply as its generation prompt does", prompt, turn)
        if not text.startswith(turn):
            raise _not_a_prefix(origin, number, "rewrites an earlier reply once others follow", turn, text)
        reply_end = _reply_end(turn, len(prompt), messages[number]["content"].strip(), origin, number)
        turns.append(Turn(prompt, reply_end))
    return Draft(text, tuple(turns), origin, templated=True)


def _not_a_prefix(origin: str, number: int, what: str, expected: str, got: str) -> DataError:
    pairs = enumerate(zip(expected, got, strict=False))
    at = next((k for k, (one, other) in pairs if one != other), min(len(expected), len(got)))
    shown = [repr(text[at : at + SHOWN_CHARS]) for text in (expected, got)]
    return DataError(
        f"{origin}: the chat template {what} (messages[{number}]): first {shown[0]}, then {shown[1]}. "
        "In use the model would see another text than in training",
        "Remove what the template drops (reasoning, spaces at the ends), or keep one reply per row",
    )


def _reply_end(turn: str, start: int, reply: str, origin: str, number: int) -> int:
    """Where the reply's own text ends in its turn; templates may trim it or write something in front of it."""
    lead = len(turn) - len(turn[start:].lstrip())
    found = lead if turn.startswith(reply, lead) else turn.rfind(reply, start)
    if found < 0:
        raise DataError(
            f"{origin}: the chat template does not write messages[{number}] as it stands in the row, "
            f"but {turn[start : start + SHOWN_CHARS]!r}",
            "Remove from the reply what the template drops",
        )
    return found + len(reply)
