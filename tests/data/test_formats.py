from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.formats import Chat, Completion, Plain, read_examples, unused_columns
from lorafit.data.load import Row
from lorafit.errors import ConfigError, DataError

USER = {"role": "user", "content": "Hello"}
REPLY = {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


def rows(*records: dict[str, Any]) -> list[Row]:
    return [Row(record, f"f.jsonl:{line}") for line, record in enumerate(records, 1)]


def refusal(*records: dict[str, Any], fmt: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(rows(*records), fmt)
    return str(caught.value)


def test_messages_become_a_chat_and_other_columns_are_counted() -> None:
    data = rows({"messages": [SYSTEM, USER, REPLY], "intent": "greet"}, {"messages": [USER, REPLY]})
    assert [Chat((SYSTEM, USER, REPLY), "f.jsonl:1"), Chat((USER, REPLY), "f.jsonl:2")] == read_examples(data)
    assert unused_columns(data) == {"intent": 1}


def test_prompt_and_completion_strings_become_a_completion() -> None:
    assert [Completion("2+2=", "4", "f.jsonl:1")] == read_examples(rows({"prompt": "2+2=", "completion": "4"}))


def test_prompt_and_completion_messages_become_a_chat_whose_prompt_has_no_loss() -> None:
    (chat,) = read_examples(rows({"prompt": [USER, REPLY, USER], "completion": [REPLY]}))
    assert Chat((USER, REPLY, USER, REPLY), "f.jsonl:1", context=3) == chat


def test_text_becomes_plain() -> None:
    assert [Plain("Once", "f.jsonl:1")] == read_examples(rows({"text": "Once"}))


def test_null_keys_in_a_message_count_as_absent_and_unknown_ones_are_left_out() -> None:
    reply = {**REPLY, "tool_calls": None, "id": 7}
    assert [Chat((USER, REPLY), "f.jsonl:1")] == read_examples(rows({"messages": [USER, reply]}))


def test_a_format_that_is_named_wins_over_the_columns() -> None:
    both = {"text": "a", "label": "spam"}
    assert [Plain("a", "f.jsonl:1")] == read_examples(rows(both), "text")
    assert "not 'messages' (messages)" in refusal(both, fmt="messages")


def test_an_unknown_format_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown data format 'mesages'.*Did you mean 'messages'\?"):
        read_examples([], "mesages")


def test_mixed_formats_are_refused_with_both_origins() -> None:
    said = refusal({"text": "a"}, {"messages": [USER, REPLY]})
    assert "f.jsonl:1 is 'text' and f.jsonl:2 is 'messages'" in said


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "a", "label": "b"}, "classification head, which comes with --method head and is not available yet"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pairs"),
        ({"message": [USER, REPLY]}, "has the columns message: no known format. Did you mean 'messages'?"),
        ({"prompt": "a", "completions": "b"}, "Did you mean 'completion'?"),
        ({"x": 1, "y": 2}, "has the columns x, y: no known format. Known: messages; prompt and completion; text"),
        ({}, "has the columns (none)"),
        ({"messages": [USER, REPLY], "tools": [{"name": "f"}]}, "the column 'tools', which is not read yet"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "Write a system prompt as a message"),
        ({"messages": "hi"}, "messages is a string, not a list"),
        ({"messages": None}, "messages is null, not a list"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": ["hi"]}, "messages[0] is a string"),
        ({"messages": [SYSTEM, USER]}, "messages has no assistant message"),
        ({"messages": [USER, REPLY, USER]}, "the last message is from 'user', not from 'assistant'"),
        ({"messages": [REPLY]}, "the first message is a reply to nothing"),
        ({"messages": [SYSTEM, REPLY, USER, REPLY]}, "the first message is a reply to nothing"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "messages[1] is an empty reply"),
        ({"messages": [USER, {"role": "assistant"}]}, "the content of messages[1] is null, not a string"),
        ({"messages": [USER, {"role": "assistant", "content": [1]}]}, "the content of messages[1] is a list"),
        ({"messages": [USER, {"role": "asistant", "content": "a"}]}, "Did you mean 'assistant'?"),
        ({"messages": [{"role": "human", "content": "a"}, REPLY]}, "Did you mean 'user'?"),
        ({"messages": [{"roel": "user", "content": "a"}, REPLY]}, "Did you mean 'roel'?"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "messages[1] is a tool call",
        ),
        ({"messages": [USER, {"role": "tool", "content": "4"}, REPLY]}, "messages[1] is a tool call or its result"),
        ({"messages": [USER, {**REPLY, "weight": 0}]}, "messages[1] has 'weight', which is not read yet"),
        ({"prompt": "a", "completion": " "}, "completion is empty"),
        ({"prompt": 1, "completion": "b"}, "prompt is a number"),
        ({"prompt": [USER], "completion": "b"}, "Write both as strings, or both as lists of messages"),
        ({"prompt": [USER], "completion": [USER]}, "has no assistant message"),
        ({"prompt": [], "completion": [REPLY]}, "prompt is an empty list"),
        ({"text": "\n"}, "text is empty"),
        ({"text": True}, "text is true or false, not a string"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_origin(record: dict[str, Any], said: str) -> None:
    message = refusal(record)
    assert said in message
    assert "f.jsonl:1" in message


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["user", "assistant", "system", "tool", "", "hi"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "weight", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
COLUMNS = ["messages", "prompt", "completion", "text", "label", "chosen", "rejected", "tools", "system", "other"]


@given(record=st.dictionaries(st.sampled_from(COLUMNS), values, max_size=4))
def test_whatever_a_row_holds_it_is_read_or_refused_as_a_data_error(record: dict[str, Any]) -> None:
    try:
        (example,) = read_examples(rows(record))
    except DataError as error:
        assert "f.jsonl:1" in str(error)
    else:
        assert example.origin == "f.jsonl:1"
