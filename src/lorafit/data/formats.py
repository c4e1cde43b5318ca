"""A row's columns -> an Example: what is said, by whom, and what has a loss. No tokenizer here.

A new format is one function and one line in FORMATS: it is known by its columns; the function checks every field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorafit.data.example import Completion, Example, Labelled, Plain, Tagged
from lorafit.data.messages import Record, from_json, from_sharegpt, kind, read_conversation, read_messages
from lorafit.data.rows import Row
from lorafit.errors import ConfigError, DataError, did_you_mean, listed


@dataclass(frozen=True, slots=True)
class Format:
    """How one kind of row is known and read.

    columns: what the format needs. read: (record, origin) -> Example; raises DataError. also: columns that it reads
    where they are there; others are not read, and counted.
    """

    columns: tuple[str, ...]
    read: Callable[[Record, str], Example]
    also: tuple[str, ...] = ()

    def matches(self, record: Record) -> bool:
        """Whether the record has every column of this format."""
        return all(column in record for column in self.columns)


# --- conversations ----------------------------------------------------------------------------------------------------


def read_openai(record: Record, origin: str) -> Example:
    """OpenAI's chat format: {"messages": [{"role", "content"}, ...]}, perhaps with "tools". Raises DataError."""
    if isinstance(record.get("label"), bool):
        raise DataError(
            f"{origin} has messages and a label that is true or false: a preference, and preference training is not "
            "available",
            "Keep the rows whose label is true, without it",
        )
    messages = from_json(record["messages"], "messages", origin)
    return read_conversation(messages, "messages", origin, tools=record.get("tools"))


def read_sharegpt(record: Record, origin: str) -> Example:
    """{"conversations": [{"from": "human" | "gpt" | ..., "value"}, ...]}, perhaps with "system". Raises DataError."""
    turns = from_sharegpt(from_json(record["conversations"], "conversations", origin), origin)
    if record.get("system") and isinstance(turns, list):
        turns = [{"role": "system", "content": record["system"]}, *turns]
    return read_conversation(turns, "conversations", origin, tools=record.get("tools"))


def read_alpaca(record: Record, origin: str) -> Example:
    """{"instruction", "output"}, perhaps with "input", "system" and "history", a list of [user, reply].

    The input follows the instruction after an empty line; replies of the history have a loss too. Raises DataError.
    """
    parts = [_string(record, name, origin) for name in ("instruction", "input", "output", "system")]
    instruction, more, output, system = parts
    history = from_json(record.get("history"), "history", origin) or []
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(f"{origin}: history[{number}] is no pair of texts", "Write [user, reply]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked = "\n\n".join(part for part in (instruction, more) if part.strip())
    if not asked:
        raise DataError(f"{origin}: instruction and input are empty", "Fill one in, or remove the row")
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    return read_conversation(messages, "instruction and output", origin)


def _string(record: Record, name: str, origin: str) -> str:
    value = record.get(name)
    if value is None and name not in ("instruction", "output"):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{origin}: {name} is {kind(value)}, not a string", "Write it as one string")
    return value


# --- prompt and completion --------------------------------------------------------------------------------------------


def read_prompt_completion(record: Record, origin: str) -> Example:
    """{"prompt", "completion"}: two strings or two lists of messages; the completion has the loss. Raises DataError."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = read_messages(prompt, "prompt", origin)
        read_messages(completion, "completion", origin)
        both = [*prompt, *completion]
        return read_conversation(both, "prompt and completion", origin, len(before), record.get("tools"))
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise DataError(f"{origin}: {name} is {kind(value)}", "Write both as strings, or both as lists of messages")
    _refuse_columns(record, origin, ("tools",))
    if not completion.strip():
        raise DataError(f"{origin}: completion is empty", "Fill it in, or remove the row")
    return Completion(prompt, completion, origin)


# --- text -------------------------------------------------------------------------------------------------------------


def read_text(record: Record, origin: str) -> Example:
    """{"text"}: running text, tokenised as it is. Raises DataError."""
    return Plain(_text(record, origin), origin)


def read_label(record: Record, origin: str) -> Example:
    """{"text", "label"}: a text and what it is an example of; a list of labels where several may hold; or a number."""
    text, label = _text(record, origin), record["label"]
    if isinstance(label, float):
        if not math.isfinite(label):
            raise DataError(f"{origin}: label is {label}, which is no number to learn", "Correct it, or remove the row")
        return Labelled(text, (), origin, number=label)
    labels = label if isinstance(label, list) else [label]
    for one in labels:
        if not isinstance(one, str | int) or not str(one).strip():
            raise DataError(f"{origin}: label is {kind(one)}, not a string or a number", "Write a name or a number")
    number = float(label) if isinstance(label, int) and not isinstance(label, bool) else None
    return Labelled(text, tuple(str(one) for one in labels), origin, isinstance(label, list), number)


def read_tags(record: Record, origin: str) -> Example:
    """{"tokens", "tags"}: a list of words, and one of their tags. Raises DataError."""
    words, tags = record["tokens"], record["tags"]
    for name, some, types in (("tokens", words, str), ("tags", tags, str | int)):
        if not isinstance(some, list) or not all(isinstance(one, types) and str(one).strip() for one in some):
            raise DataError(f"{origin}: {name} is no list of {'words' if name == 'tokens' else 'tags'}", "Write a list")
    if not words or len(words) != len(tags):
        raise DataError(f"{origin} has {len(words)} tokens and {len(tags)} tags", "Write one tag for each word")
    return Tagged(tuple(words), tuple(map(str, tags)), origin)


def _text(record: Record, origin: str) -> str:
    text = record["text"]
    if not isinstance(text, str):
        raise DataError(f"{origin}: text is {kind(text)}, not a string", "Write it as one string")
    if not text.strip():
        raise DataError(f"{origin}: text is empty", "Fill it in, or remove the row")
    return text


def _renamed(names: Mapping[str, str]) -> Callable[[Record, str], Example]:
    """`read_label` of rows whose columns have other names."""
    return lambda record, origin: read_label({names.get(key, key): value for key, value in record.items()}, origin)


FORMATS: dict[str, Format] = {  # a row with the columns of several is the first of them
    "messages": Format(("messages",), read_openai, ("tools",)),
    "sharegpt": Format(("conversations",), read_sharegpt, ("system", "tools")),
    "prompt/completion": Format(("prompt", "completion"), read_prompt_completion, ("tools",)),
    "alpaca": Format(("instruction", "output"), read_alpaca, ("input", "system", "history")),
    "text/label": Format(("text", "label"), read_label),
    "sentence/label": Format(("sentence", "label"), _renamed({"sentence": "text"})),
    "text/labels": Format(("text", "labels"), _renamed({"labels": "label"})),
    "tokens/tags": Format(("tokens", "tags"), read_tags),
    "text": Format(("text",), read_text),
    "text/score": Format(("text", "score"), _renamed({"score": "label"})),  # by name, or for --task regress
    "text/value": Format(("text", "value"), _renamed({"value": "label"})),
}

# Those of labelled texts, of texts with a number, of tagged words.
LABELLED = ("text/label", "sentence/label", "text/labels")
NUMBERED = ("text/score", "text/value")
TAGGED = ("tokens/tags",)

# Rows that mean another task: columns -> what they are, what to do.
REFUSED: dict[tuple[str, ...], tuple[str, str]] = {
    ("chosen", "rejected"): (
        "preference pairs, and preference training is not available",
        "Write the chosen reply as messages",
    ),
    ("input_ids",): (
        "tokens, and what they were before they were tokens cannot be checked",
        "Write the text or the messages that they were made from",
    ),
}

# Columns that the chat template would read: leaving them out would train on another prompt.
MEANINGFUL_COLUMNS = ("tools", "functions", "documents", "images", "system")


def read_examples(
    rows: Iterable[Row], fmt: str | None = None, rename: Mapping[str, str] | None = None
) -> list[Example]:
    """One Example per row, as FormatReader reads them. Raises DataError with file:line, ConfigError."""
    reader = FormatReader(fmt, rename)
    return [reader.read(row) for row in rows]


class FormatReader:
    """Reads the rows of one source, which all have one format.

    format: its name, as soon as it is known. unused: columns that were not read -> in how many rows they stood.
    """

    def __init__(
        self, fmt: str | None = None, rename: Mapping[str, str] | None = None, first: Sequence[str] = ()
    ) -> None:
        """fmt: a name in FORMATS, or None to know it by the columns. rename: column -> what it is to be called.

        first: formats that are tried before the others. Raises ConfigError for an unknown fmt.
        """
        if fmt is not None and fmt not in FORMATS:
            raise ConfigError(f"unknown data format {fmt!r}; known: {listed(FORMATS)}", did_you_mean(fmt, FORMATS))
        self.format, self.unused = fmt, dict[str, int]()
        self._rename = dict(rename or {})
        self._first, self._tried_first = "", first

    def read(self, row: Row) -> Example:
        """What the row says. Raises DataError for a row that cannot be used."""
        record = self._renamed(row)
        name = self.format if self.format and not self._first else detect(record, row.origin, self._tried_first)
        if self._first and name != self.format:
            raise DataError(
                f"{self._first} is {self.format!r} and {row.origin} is {name!r}", "Keep one format in a file"
            )
        form = FORMATS[name]
        if not form.matches(record):
            raise _unknown(record, row.origin, f"not {name!r} ({' and '.join(form.columns)})")
        read = {*form.columns, *form.also}
        _refuse_columns(record, row.origin, set(MEANINGFUL_COLUMNS) - read)
        example = form.read(record, row.origin)
        if self.format is None:
            self.format, self._first = name, row.origin
        for column in record:
            if column not in read:
                self.unused[column] = self.unused.get(column, 0) + 1
        return example

    def _renamed(self, row: Row) -> Record:
        for old, new in self._rename.items():
            if old not in row.record:
                hint = did_you_mean(old, row.record) or f"It has {listed(row.record)}"
                raise DataError(f"{row.origin} has no column {old!r} to be called {new!r}", hint)
        if not self._rename:
            return row.record
        return {self._rename.get(column, column): value for column, value in row.record.items()}


def detect(record: Record, origin: str, first: Sequence[str] = ()) -> str:
    """The name of the format that the record's columns fit. Raises DataError if there is none or it is another task.

    first: formats that are tried before the others.
    """
    for columns, (what, do) in REFUSED.items():
        if all(column in record for column in columns):
            raise DataError(f"{origin} has {' and '.join(columns)}: {what}", do)
    name = next((name for name in (*first, *FORMATS) if FORMATS[name].matches(record)), None)
    if name is None:
        raise _unknown(record, origin, "no known format")
    return name


def _unknown(record: Record, origin: str, what: str) -> DataError:
    columns = {column for form in FORMATS.values() for column in form.columns}
    hint = next((hint for key in record if key not in columns and (hint := did_you_mean(key, columns))), "")
    known = "; ".join(" and ".join(form.columns) for form in FORMATS.values())
    return DataError(f"{origin} has the columns {listed(record) or '(none)'}: {what}", hint or f"Known: {known}")


def _refuse_columns(record: Record, origin: str, columns: Collection[str]) -> None:
    for column in sorted(columns):
        if record.get(column):
            raise DataError(
                f"{origin} has the column {column!r}, which is not read and would change the prompt",
                "Write a system prompt as a message" if column == "system" else "Remove it, or the row",
            )
