"""A row's columns -> an Example: what is said, by whom, and what has a loss. No tokenizer here.

A new format is one function and one line in FORMATS: it is known by its columns; the function checks every field.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.data.load import Row
from lorafit.errors import ConfigError, DataError, did_you_mean, listed

Record = dict[str, Any]
Message = dict[str, str]  # exactly "role" and "content"; a dict because chat templates index it


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with the assistant.

    messages: {"role": "system" | "user" | "assistant", "content": str} each.
    context: this many first messages are only read; assistant turns after them have a loss.
    """

    messages: tuple[Message, ...]
    origin: str
    context: int = 0


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


Example = Chat | Completion | Plain


@dataclass(frozen=True, slots=True)
class Format:
    """How one kind of row is known and read.

    columns: what the format needs; other columns of the row are not read. read: (record, origin) -> Example; raises
    DataError.
    """

    columns: tuple[str, ...]
    read: Callable[[Record, str], Example]

    def matches(self, record: Record) -> bool:
        """Whether the record has every column of this format."""
        return all(column in record for column in self.columns)


# --- messages -------------------------------------------------------------------------------------------------------

ROLES = ("system", "user", "assistant")
OTHER_ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
# Keys that say what to learn or what the model thought: reading the row without them would train something else.
UNREAD_KEYS = ("weight", "train", "reasoning", "reasoning_content", "thinking", "prefix")


def read_messages(record: Record, origin: str) -> Example:
    """OpenAI's chat format: {"messages": [{"role", "content"}, ...]}. Raises DataError."""
    _refuse_columns(record, origin)
    return Chat(_conversation(record["messages"], "messages", origin), origin)


def _conversation(value: Any, column: str, origin: str) -> tuple[Message, ...]:
    """Checked messages that end with a reply."""
    messages = _messages(value, column, origin)
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{origin}: {column} has no assistant message", "Add the reply that the model should learn")
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{origin}: the last message is from {messages[-1]['role']!r}, not from 'assistant'",
            "Add the reply, or remove what follows the last reply",
        )
    first = next(message["role"] for message in (*messages, messages[0]) if message["role"] != "system")
    if first == "assistant":
        raise DataError(f"{origin}: the first message is a reply to nothing", "Start with a user message")
    return messages


def _messages(value: Any, column: str, origin: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise DataError(
            f"{origin}: {column} is {_kind(value)}, not a list", 'Write [{"role": ..., "content": ...}, ...]'
        )
    if not value:
        raise DataError(f"{origin}: {column} is an empty list", "Add a user message and a reply, or remove the row")
    return tuple(_message(message, f"{column}[{number}]", origin) for number, message in enumerate(value))


def _message(value: Any, where: str, origin: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: {where} is {_kind(value)}", 'Write {"role": ..., "content": ...}')
    present = [key for key, item in value.items() if item is not None]  # null stands for absent, as in OpenAI's API
    for key in present:
        if key in TOOL_KEYS or value.get("role") in ("tool", "function"):
            raise DataError(f"{origin}: {where} is a tool call or its result", "Tools cannot be trained yet: remove it")
        if key in UNREAD_KEYS:
            raise DataError(f"{origin}: {where} has {key!r}, which is not read yet", "Remove it from the message")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise DataError(f"{origin}: {where} has the role {role!r}; known: {listed(ROLES)}", _right_role(role, value))
    if not isinstance(content, str):
        raise DataError(f"{origin}: the content of {where} is {_kind(content)}, not a string", "Write it as one string")
    if role == "assistant" and not content.strip():
        raise DataError(f"{origin}: {where} is an empty reply", "Fill it in, or remove the row")
    return {"role": role, "content": content}


def _right_role(role: Any, message: Record) -> str:
    if role is None:
        return did_you_mean("role", message) or 'Write {"role": ..., "content": ...}'
    other = OTHER_ROLE_NAMES.get(str(role).lower())
    return f"Did you mean {other!r}?" if other else did_you_mean(str(role), ROLES) or "Rename it"


# --- prompt and completion ------------------------------------------------------------------------------------------


def read_prompt_completion(record: Record, origin: str) -> Example:
    """{"prompt", "completion"}: two strings or two lists of messages; the completion has the loss. Raises DataError."""
    _refuse_columns(record, origin)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, "prompt", origin)
        reply = _messages(completion, "completion", origin)
        messages = [*before, *reply]
        return Chat(_conversation(messages, "prompt and completion", origin), origin, context=len(before))
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise DataError(
                f"{origin}: {name} is {_kind(value)}", "Write both as strings, or both as lists of messages"
            )
    if not completion.strip():
        raise DataError(f"{origin}: completion is empty", "Fill it in, or remove the row")
    return Completion(prompt, completion, origin)


# --- text -----------------------------------------------------------------------------------------------------------


def read_text(record: Record, origin: str) -> Example:
    """{"text"}: running text, tokenised as it is. Raises DataError."""
    text = record["text"]
    if not isinstance(text, str):
        raise DataError(f"{origin}: text is {_kind(text)}, not a string", "Write it as one string")
    if not text.strip():
        raise DataError(f"{origin}: text is empty", "Fill it in, or remove the row")
    return Plain(text, origin)


FORMATS: dict[str, Format] = {  # a row with the columns of several is the first of them
    "messages": Format(("messages",), read_messages),
    "prompt/completion": Format(("prompt", "completion"), read_prompt_completion),
    "text": Format(("text",), read_text),
}

# Rows that look like a known format but mean another task: columns -> what they are, what to do.
REFUSED: dict[tuple[str, ...], tuple[str, str]] = {
    ("text", "label"): (
        "labelled text for a classification head, which comes with --method head and is not available yet",
        "Write the label as the reply: a user message with the text, an assistant message with the label",
    ),
    ("chosen", "rejected"): (
        "preference pairs, and preference training is not available",
        "Write the chosen reply as messages",
    ),
}

# Columns that the chat template would read: leaving them out would train on another prompt.
MEANINGFUL_COLUMNS = ("tools", "functions", "documents", "images", "system")


def read_examples(rows: Sequence[Row], fmt: str | None = None) -> list[Example]:
    """One Example per row. fmt: a name in FORMATS, or None to know it by the columns; all rows must have the same.

    Raises DataError with file:line for a row that cannot be used, ConfigError for an unknown fmt.
    """
    if fmt is not None and fmt not in FORMATS:
        raise ConfigError(f"unknown data format {fmt!r}; known: {listed(FORMATS)}", did_you_mean(fmt, FORMATS))
    names = [fmt or detect(row.record, row.origin) for row in rows]
    for row, name in zip(rows, names, strict=True):
        if name != names[0]:
            raise DataError(
                f"{rows[0].origin} is {names[0]!r} and {row.origin} is {name!r}", "Keep one format in one file"
            )
        if not FORMATS[name].matches(row.record):
            raise _unknown(row.record, row.origin, f"not {name!r} ({' and '.join(FORMATS[name].columns)})")
    return [FORMATS[name].read(row.record, row.origin) for row, name in zip(rows, names, strict=True)]


def detect(record: Record, origin: str) -> str:
    """The name of the format that the record's columns fit. Raises DataError if there is none or it is another task."""
    name = next((name for name, fmt in FORMATS.items() if fmt.matches(record)), None)
    if name is None or name == "text":
        for columns, (what, do) in REFUSED.items():
            if all(column in record for column in columns):
                raise DataError(f"{origin} has {' and '.join(columns)}: {what}", do)
    if name is None:
        raise _unknown(record, origin, "no known format")
    return name


def unused_columns(rows: Sequence[Row], fmt: str | None = None) -> dict[str, int]:
    """Columns that training does not read -> in how many rows they stand. For the line that says so."""
    counts: dict[str, int] = {}
    for row in rows:
        used = FORMATS[fmt or detect(row.record, row.origin)].columns
        for column in row.record:
            if column not in used:
                counts[column] = counts.get(column, 0) + 1
    return counts


def _unknown(record: Record, origin: str, what: str) -> DataError:
    columns = {column for fmt in FORMATS.values() for column in fmt.columns}
    hint = next((hint for key in record if key not in columns and (hint := did_you_mean(key, columns))), "")
    known = "; ".join(" and ".join(fmt.columns) for fmt in FORMATS.values())
    return DataError(f"{origin} has the columns {listed(record) or '(none)'}: {what}", hint or f"Known: {known}")


def _refuse_columns(record: Record, origin: str, columns: Collection[str] = MEANINGFUL_COLUMNS) -> None:
    for column in columns:
        if record.get(column):
            raise DataError(
                f"{origin} has the column {column!r}, which is not read yet and would change the prompt",
                "Write a system prompt as a message" if column == "system" else "Remove it, or the row",
            )


def _kind(value: Any) -> str:
    """What a JSON value is, for a sentence."""
    names = {type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
