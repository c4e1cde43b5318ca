"""Messages of a conversation, checked field by field: OpenAI's, and ShareGPT's under OpenAI's names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.data.example import Chat, Message, Tool
from lorafit.errors import DataError, did_you_mean, listed

Record = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# Beside content, what a reply may hold; what a template does not write is found when it is rendered.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Keys that say what to learn in a way that nothing here can follow.
UNREAD_KEYS = ("prefix", "function_call")
# How ShareGPT names a function call; its value is the call, or a list of calls, as JSON.
CALL_ROLES = ("function_call", "tool_call")


def read_conversation(messages: Any, column: str, origin: str, context: int = 0, tools: Any = None) -> Chat:
    """A checked conversation that ends with a reply. context: this many messages are only read. Raises DataError."""
    checked = read_messages(messages, column, origin)
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise DataError(f"{origin}: {column} has no assistant message", "Add the reply that the model should learn")
    if roles[-1] != "assistant":
        raise DataError(
            f"{origin}: the last message is from {roles[-1]!r}, not from 'assistant'",
            "Add the reply, or remove what follows the last reply",
        )
    first = next(role for role in roles if role != "system")
    if first == "assistant":
        raise DataError(f"{origin}: the first message is a reply to nothing", "Start with a user message")
    unlearned = frozenset(
        number for number, message in enumerate(messages) if not _learns(message, f"{column}[{number}]", origin)
    )
    chat = Chat(checked, origin, context, read_tools(tools, origin), unlearned & _replies(roles))
    if not chat.learned():
        raise DataError(f"{origin}: no reply of {column} is to be learned", "Remove the row, or a weight of 0")
    return chat


def _replies(roles: Sequence[str]) -> frozenset[int]:
    return frozenset(number for number, role in enumerate(roles) if role == "assistant")


def read_messages(value: Any, column: str, origin: str) -> tuple[Message, ...]:
    """A list of messages, each checked. Raises DataError."""
    if not isinstance(value, list):
        raise DataError(
            f"{origin}: {column} is {kind(value)}, not a list", 'Write [{"role": ..., "content": ...}, ...]'
        )
    if not value:
        raise DataError(f"{origin}: {column} is an empty list", "Add a user message and a reply, or remove the row")
    return tuple(_message(message, f"{column}[{number}]", origin) for number, message in enumerate(value))


def _message(value: Any, where: str, origin: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: {where} is {kind(value)}", 'Write {"role": ..., "content": ...}')
    given = {key: item for key, item in value.items() if item is not None}  # null stands for absent, as in OpenAI's API
    for key in UNREAD_KEYS:
        if key in given:
            raise DataError(f"{origin}: {where} has {key!r}, which is not read", _instead_of(key))
    role = given.get("role")
    if role not in ROLES:
        raise DataError(f"{origin}: {where} has the role {role!r}; known: {listed(ROLES)}", _right_role(role, value))
    message: Message = {"role": role, "content": _content(given, where, origin)}
    if "tool_calls" in given:
        if role != "assistant":
            raise DataError(f"{origin}: {where} is from {role!r} and has tool_calls", "Only an assistant calls tools")
        message["tool_calls"] = _calls(given["tool_calls"], where, origin)
    for key in (*REASONING_KEYS, *(("tool_call_id", "name") if role == "tool" else ())):
        if key in given:
            if not isinstance(given[key], str):
                raise DataError(f"{origin}: {key} of {where} is {kind(given[key])}, not a string", "Write a string")
            message[key] = given[key]
    if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
        raise DataError(f"{origin}: {where} is an empty reply", "Fill it in, or remove the row")
    return message


def _content(message: Record, where: str, origin: str) -> str:
    """A string as it stands; the texts of a list of parts, one after the other. A call of tools needs none."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        other = next((part for part in content if part.get("type") != "text" or not _is_text(part)), None)
        if other is not None:
            raise DataError(
                f"{origin}: the content of {where} has a part of type {other.get('type')!r}, and only text is read",
                "Remove the part, or the row",
            )
        return "".join(part["text"] for part in content)
    if message["role"] == "tool" and isinstance(content, dict | list):
        return json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise DataError(f"{origin}: the content of {where} is {kind(content)}, not a string", "Write it as one string")
    return content


def _is_text(part: Record) -> bool:
    return isinstance(part.get("text"), str)


def _instead_of(key: str) -> str:
    return "Write it as tool_calls" if key == "function_call" else "Remove it from the message"


def _right_role(role: Any, message: Record) -> str:
    if role is None:
        return did_you_mean("role", message) or 'Write {"role": ..., "content": ...}'
    other = OTHER_ROLE_NAMES.get(str(role).lower())
    return f"Did you mean {other!r}?" if other else did_you_mean(str(role), ROLES) or "Rename it"


def _learns(message: Record, where: str, origin: str) -> bool:
    """By OpenAI's `weight`, 0 or 1, or `train`, true or false; without either it does."""
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"{origin}: weight of {where} is {weight!r}, and only 0 and 1 are known", "Write 0 or 1")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{origin}: train of {where} is {kind(train)}", "Write true or false")
    return weight != 0 and train is not False


# --- tools ------------------------------------------------------------------------------------------------------------


def read_tools(value: Any, origin: str) -> tuple[Tool, ...]:
    """Functions as templates want them: {"type": "function", "function": {"name", ...}} each. Raises DataError."""
    value = from_json(value, "tools", origin)
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        raise DataError(f"{origin}: tools is {kind(value)}, not a list", "Write a list of functions")
    return tuple(_tool(tool, f"tools[{number}]", origin) for number, tool in enumerate(value))


def _tool(value: Any, where: str, origin: str) -> Tool:
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{origin}: {where} names no function", 'Write {"type": "function", "function": {"name": ..., ...}}'
        )
    return {"type": "function", "function": function}


def _calls(value: Any, where: str, origin: str) -> list[Record]:
    value = from_json(value, f"tool_calls of {where}", origin)
    if not isinstance(value, list) or not value:
        raise DataError(f"{origin}: tool_calls of {where} is {kind(value)}", "Write a list of calls, or leave it out")
    return [_call(call, f"tool_calls[{number}] of {where}", origin) for number, call in enumerate(value)]


def _call(value: Any, where: str, origin: str) -> Record:
    """With its arguments as an object, as templates expect them; OpenAI's API writes them as a string of JSON."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{origin}: {where} names no function", 'Write {"function": {"name": ..., "arguments": {...}}}')
    arguments = from_json(function.get("arguments", {}), f"arguments of {where}", origin)
    if not isinstance(arguments, dict):
        raise DataError(f"{origin}: arguments of {where} are {kind(arguments)}, not an object", "Write an object")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {**call, "id": value["id"]} if isinstance(value.get("id"), str) else call


def from_json(value: Any, where: str, origin: str) -> Any:
    """A structure that a table could only hold as a string of JSON. Raises DataError for a string that is none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise DataError(f"{origin}: {where} is a string that is no JSON", "Write the structure itself") from None


# --- ShareGPT ---------------------------------------------------------------------------------------------------------


def from_sharegpt(turns: Any, origin: str) -> Any:
    """ShareGPT's {"from", "value"} turns under OpenAI's names. What is no list is given back as it is."""
    if not isinstance(turns, list):
        return turns
    return [_openai_message(turn, number, origin) for number, turn in enumerate(turns)]


def _openai_message(turn: Any, number: int, origin: str) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # a message already, or nothing that can be read
    role, where = str(turn["from"]).lower(), f"conversations[{number}]"
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if role in CALL_ROLES:
        call = from_json(turn.get("value"), f"the call in {where}", origin)
        return {**rest, "role": "assistant", "content": None, "tool_calls": call if isinstance(call, list) else [call]}
    return {**rest, "role": OTHER_ROLE_NAMES.get(role, role), "content": turn.get("value")}


def kind(value: Any) -> str:
    """What a JSON value is, for a sentence."""
    names: Mapping[type, str] = {
        type(None): "null", bool: "true or false", str: "a string", list: "a list", dict: "an object",
        int: "a number", float: "a number",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)
