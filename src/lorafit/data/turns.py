"""An Example -> the text that the model reads, and where in it the replies stand. Characters only; mask.py has the ids.

For each reply with a loss two things are verified, because templates break both: what stands before the reply is
exactly what generation would start from, and the reply is still written like that once later messages follow. Where
only the second fails, as with templates that strip reasoning from the history, a conversation becomes one draft a
reply: each is what the model will see in use when it gives that reply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorafit.data.example import Chat, Completion, Example, Labelled, Message, Plain, Tagged
from lorafit.data.messages import REASONING_KEYS
from lorafit.data.template import as_chat, marked_as_generated, render, writes_tools
from lorafit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARS = 30
LossOn = Literal["replies", "last", "all"]


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
    which wrote its special tokens; otherwise BOS and end-of-sequence are still to be put around it. whole: everything
    has a loss, not the turns alone. row: number of the record in its source. rest: what follows the text and is cut
    off in any case; it is only counted. labels: what its cells of `labels.target_of` say: of a text with a label
    one, of words one each. starts: the characters that those words begin with.
    """

    text: str
    turns: tuple[Turn, ...]
    origin: str
    templated: bool
    whole: bool = False
    row: int = 0
    rest: str = ""
    labels: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()


def drafts(
    example: Example, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn = "replies", reach: int = 1 << 62
) -> list[Draft]:
    """The text of one row; several where the template writes a reply differently once others follow.

    loss_on: every reply that the row wants learned, the last of them, or all tokens. reach: characters of a
    conversation or completion that may be trained on; replies beyond are not looked at. Raises DataError with its
    origin where the template and the row do not go together, or no reply begins within reach.
    """
    if isinstance(example, Completion) and tokenizer.chat_template:
        example = as_chat(example)
    if isinstance(example, Chat):
        return _draft_chat(example, tokenizer, loss_on, reach)
    if isinstance(example, Labelled | Tagged):
        raise DataError(
            f"{example.origin} is text with a label, and these rows are read for a model that writes text",
            "Train with --task auto for a head of labels, or write the label as a reply to a message with the text",
        )
    if isinstance(example, Plain):
        return [Draft(example.text, (), example.origin, templated=False)]
    text = example.prompt + example.completion
    _refuse_beyond(example.origin, example.prompt, reach)
    turn = Turn(example.prompt, len(text))
    return [Draft(text[:reach], (turn,), example.origin, templated=False, whole=loss_on == "all", rest=text[reach:])]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A reply's turn: all text up to its end, as it is written where the conversation ends with it."""

    number: int
    turn: str
    own: Turn


def _refuse_beyond(origin: str, prompt: str, reach: int) -> None:
    if len(prompt) >= reach:
        raise DataError(
            f"{origin}: {len(prompt):,} characters stand before the reply, more than --seq-len tokens can hold",
            "Raise --seq-len, or shorten the row",
        )


def _draft_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, reach: int) -> list[Draft]:
    if chat.tools and not writes_tools(tokenizer):
        raise DataError(
            f"{chat.origin}: the model's chat template has no place for tools, so they would not be seen",
            "Use a model that was trained to call tools, or remove them",
        )
    numbers = chat.learned() if loss_on != "last" else chat.learned()[-1:]
    text = render(tokenizer, chat.messages, False, chat.origin, chat.tools)
    _refuse_dropped(chat, text)
    found: list[_Rendered] = []
    for number in numbers:
        prompt = render(tokenizer, chat.messages[:number], True, chat.origin, chat.tools)
        if found and len(prompt) >= reach:
            break  # what follows is cut off, and going through it all would take the square of its length
        _refuse_beyond(chat.origin, prompt, reach)
        found.append(_rendered(chat, number, prompt, text, tokenizer))
    if all(text.startswith(reply.turn) for reply in found):
        return [_templated(chat, text, tuple(reply.own for reply in found), loss_on, reach)]
    return [_templated(chat, reply.turn, (reply.own,), loss_on, reach) for reply in found]


def _templated(chat: Chat, text: str, turns: tuple[Turn, ...], loss_on: LossOn, reach: int) -> Draft:
    return Draft(text[:reach], turns, chat.origin, templated=True, whole=loss_on == "all", rest=text[reach:])


def _refuse_dropped(chat: Chat, text: str) -> None:
    """Raise DataError where what the model is told is not in the text. Replies are looked at one by one."""
    for number, message in enumerate(chat.messages):
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            raise DataError(
                f"{chat.origin}: the chat template leaves out messages[{number}], from {message['role']!r}, or writes "
                "it differently",
                "Put a system message at the start of the first user message, or choose another --template",
            )


def _rendered(chat: Chat, number: int, prompt: str, text: str, tokenizer: PreTrainedTokenizerBase) -> _Rendered:
    """Message `number`, after its prompt. text: of the whole conversation. Raises DataError; see the module."""
    messages, origin = chat.messages, chat.origin
    is_last = number == len(messages) - 1
    turn = text if is_last else render(tokenizer, messages[: number + 1], False, origin, chat.tools)
    if not turn.startswith(prompt):
        raise _not_a_prefix(origin, number, prompt, turn)
    end = _reply_end(turn, len(prompt), messages[number], tokenizer, f"{origin}: messages[{number}]")
    marked = marked_as_generated(tokenizer, messages[: number + 1], origin, chat.tools)
    if marked:  # where a reply ends the template knows best; it begins where generation does, whatever is marked
        end = max(len(prompt), _without_end(turn[: marked[-1][1]], len(prompt), tokenizer))
    return _Rendered(number, turn, Turn(prompt, end))


def _not_a_prefix(origin: str, number: int, expected: str, got: str) -> DataError:
    pairs = enumerate(zip(expected, got, strict=False))
    at = next((k for k, (one, other) in pairs if one != other), min(len(expected), len(got)))
    shown = [repr(text[at : at + SHOWN_CHARS]) for text in (expected, got)]
    return DataError(
        f"{origin}: the chat template does not start a reply as its generation prompt does (messages[{number}]): "
        f"first {shown[0]}, then {shown[1]}. In use the model would see another text than in training",
        "Write into the reply what the generation prompt begins (such as reasoning), or choose another --template",
    )


def _reply_end(turn: str, start: int, message: Message, tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """Where the reply's own text ends in its turn; templates may trim it or write something in front of it."""
    for key in REASONING_KEYS:
        if key in message and message[key].strip() not in turn[start:]:
            raise DataError(
                f"{where} has {key}, which the chat template does not write, so it would not be learned",
                "Write it into the content as the model would, or remove it",
            )
    reply = message["content"].strip()
    if message.get("tool_calls"):
        return _end_of_calls(turn, start, message, tokenizer, where)
    lead = len(turn) - len(turn[start:].lstrip())
    found = lead if turn.startswith(reply, lead) else turn.rfind(reply, start)
    if found < 0:
        raise DataError(
            f"{where} is not written by the chat template as it stands in the row, "
            f"but as {turn[start : start + SHOWN_CHARS]!r}",
            "Remove from the reply what the template drops",
        )
    return found + len(reply)


def _end_of_calls(turn: str, start: int, message: Message, tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """Calls are written in the template's own way, with tokens of their own: all up to the end-of-turn token."""
    for text in (message["content"].strip(), *(call["function"]["name"] for call in message["tool_calls"])):
        if text not in turn[start:]:
            raise DataError(
                f"{where} calls a function, and the chat template does not write {text[:SHOWN_CHARS]!r}",
                "Use a model that was trained to call tools, or remove the row",
            )
    return _without_end(turn, start, tokenizer)


def _without_end(turn: str, start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The length of a turn without the end-of-turn token, where it ends with one, and without space behind it."""
    written = turn.rstrip()
    ends = sorted({token.content for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
    end = next((token for token in ends if token.strip() and written.endswith(token)), "")
    return max(start, len(written) - len(end))
