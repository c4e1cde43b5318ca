from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.example import Chat, Completion, Labelled, Plain
from lorafit.data.formats import FormatReader, read_examples
from lorafit.data.rows import Row
from lorafit.errors import ConfigError, DataError

USER = {"role": "user", "content": "Hello"}
REPLY = {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def rows(*records: dict[str, Any]) -> list[Row]:
    return [Row(record, f"f.jsonl:{line}") for line, record in enumerate(records, 1)]


def refusal(*records: dict[str, Any], fmt: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(rows(*records), fmt)
    return str(caught.value)


def test_messages_become_a_chat_and_other_columns_are_counted() -> None:
    data = rows({"messages": [SYSTEM, USER, REPLY], "intent": "greet"}, {"messages": [USER, REPLY]})
    assert [Chat((SYSTEM, USER, REPLY), "f.jsonl:1"), Chat((USER, REPLY), "f.jsonl:2")] == read_examples(data)
    reader = FormatReader()
    for row in data:
        reader.read(row)
    assert (reader.format, reader.unused) == ("messages", {"intent": 1})


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


def test_tools_and_calls_are_written_as_templates_want_them() -> None:
    asked = {
        **REPLY,
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    }
    result = {"role": "tool", "content": {"sum": 3}, "tool_call_id": "1"}
    record = {"messages": [USER, asked, result, REPLY], "tools": [TOOL["function"]]}
    (chat,) = read_examples(rows(record))
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, "id": "1"}
    assert isinstance(chat, Chat)
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert chat.messages[2] == {"role": "tool", "content": '{"sum": 3}', "tool_call_id": "1"}
    assert (chat.tools, chat.learned()) == ((TOOL,), [1, 3])


def test_weights_and_train_say_which_replies_are_learned() -> None:
    messages = [USER, {**REPLY, "weight": 0}, USER, {**REPLY, "train": False}, USER, {**REPLY, "weight": 1}]
    (chat,) = read_examples(rows({"messages": messages}))
    assert isinstance(chat, Chat)
    assert (chat.learned(), chat.messages[1]) == ([5], REPLY)


def test_parts_of_text_and_reasoning_are_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    record = {"messages": [{"role": "user", "content": parts}, {**REPLY, "reasoning_content": "hm"}]}
    (chat,) = read_examples(rows(record))
    assert isinstance(chat, Chat)
    assert list(chat.messages) == [{"role": "user", "content": "ab"}, {**REPLY, "reasoning_content": "hm"}]


def test_sharegpt_is_a_chat_with_calls_and_their_results() -> None:
    call = json.dumps(CALL["function"])
    turns = [
        ("human", "1 + 2?"),
        ("function_call", call),
        ("observation", "3"),
        ("gpt", "3"),
        ("human", "x"),
        ("gpt", "y"),
    ]
    record = {
        "conversations": [{"from": who, "value": what} for who, what in turns],
        "system": "Be brief.",
        "tools": "[]",
    }
    (chat,) = read_examples(rows(record))
    assert isinstance(chat, Chat)
    assert [message["role"] for message in chat.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    assert chat.messages[2]["tool_calls"] == [CALL]
    assert chat.learned() == [2, 4, 6]


def test_alpaca_is_a_chat_whose_input_follows_the_instruction() -> None:
    record = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "s", "history": [["a", "b"]]}
    (chat,) = read_examples(rows(record))
    assert isinstance(chat, Chat)
    assert [message["content"] for message in chat.messages] == ["s", "a", "b", "Add.\n\n1, 2", "3"]
    (bare,) = read_examples(rows({"instruction": "Hi", "input": "", "output": "Hello"}))
    assert isinstance(bare, Chat)
    assert bare.messages[0] == {"role": "user", "content": "Hi"}


def test_text_with_a_label_or_several_is_labelled() -> None:
    data = rows({"text": "a", "label": "spam"}, {"text": "b", "label": ["x", 2]})
    assert [Labelled("a", ("spam",), "f.jsonl:1"), Labelled("b", ("x", "2"), "f.jsonl:2", several=True)] == [
        FormatReader().read(row) for row in data
    ]


def test_renamed_columns_are_read_under_their_new_names() -> None:
    reader = FormatReader(rename={"q": "prompt", "a": "completion"})
    assert Completion("2+2=", "4", "f.jsonl:1") == reader.read(rows({"q": "2+2=", "a": "4"})[0])
    with pytest.raises(DataError, match=r"f.jsonl:1 has no column 'q' to be called 'prompt'. It has question, a"):
        reader.read(rows({"question": "2+2=", "a": "4"})[0])


def test_an_unknown_format_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown data format 'mesages'.*Did you mean 'messages'\?"):
        read_examples([], "mesages")


def test_mixed_formats_are_refused_with_both_origins() -> None:
    said = refusal({"text": "a"}, {"messages": [USER, REPLY]})
    assert "f.jsonl:1 is 'text' and f.jsonl:2 is 'messages'" in said


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [USER, REPLY], "label": True}, "a preference, and preference training is not available"),
        ({"input_ids": [1, 2]}, "has input_ids: tokens"),
        ({"text": "a", "label": None}, "label is null, not a string or a number"),
        ({"text": "a", "label": float("nan")}, "label is nan, which is no number to learn"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pairs"),
        ({"message": [USER, REPLY]}, "has the columns message: no known format. Did you mean 'messages'?"),
        ({"prompt": "a", "completions": "b"}, "Did you mean 'completion'?"),
        ({"x": 1, "y": 2}, "has the columns x, y: no known format. Known: messages; conversations;"),
        ({}, "has the columns (none)"),
        ({"messages": [USER, REPLY], "functions": [{"name": "f"}]}, "the column 'functions', which is not read"),
        ({"messages": [USER, REPLY], "tools": [{"x": 1}]}, "tools[0] names no function"),
        ({"messages": [USER, REPLY], "tools": {"name": "f"}}, "tools is an object, not a list"),
        ({"messages": [USER, REPLY], "tools": "f(x)"}, "tools is a string that is no JSON"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "Write a system prompt as a message"),
        ({"prompt": "a", "completion": "b", "tools": [CALL]}, "the column 'tools', which is not read"),
        ({"messages": "hi"}, "messages is a string that is no JSON"),
        ({"messages": 5}, "messages is a number, not a list"),
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
        ({"messages": [USER, {**REPLY, "tool_calls": [{}]}]}, "tool_calls[0] of messages[1] names no function"),
        ({"messages": [USER, {**REPLY, "tool_calls": "f"}]}, "tool_calls of messages[1] is a string that is no JSON"),
        (
            {"messages": [USER, {**REPLY, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "arguments of tool_calls[0] of messages[1] are a list, not an object",
        ),
        ({"messages": [{**USER, "tool_calls": [CALL]}, REPLY]}, "messages[0] is from 'user' and has tool_calls"),
        ({"messages": [USER, {**REPLY, "function_call": {"name": "f"}}]}, "Write it as tool_calls"),
        ({"messages": [USER, {**REPLY, "weight": 0}]}, "no reply of messages is to be learned"),
        ({"messages": [USER, {**REPLY, "weight": 0.5}]}, "weight of messages[1] is 0.5, and only 0 and 1 are known"),
        ({"messages": [USER, {**REPLY, "train": "no"}]}, "train of messages[1] is a string"),
        ({"messages": [USER, {**REPLY, "reasoning_content": 1}]}, "reasoning_content of messages[1] is a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, REPLY]},
            "the content of messages[0] has a part of type 'image_url', and only text is read",
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, "conversations has no assistant message"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "conversations[0] has the role 'alien'"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}]},
            "the call in conversations[1] is a string that is no JSON",
        ),
        ({"instruction": "", "output": "b"}, "instruction and input are empty"),
        ({"instruction": "a", "output": ""}, "is an empty reply"),
        ({"instruction": 1, "output": "b"}, "instruction is a number, not a string"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0] is no pair of texts"),
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
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "weight", "from", "value"]), inner, max_size=3
        )
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
