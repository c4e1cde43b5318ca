"""Go's text/template, as much of it as is written here: a writer for chat templates, and what they give.

`evaluate` is no part of the writer: it reads the text as Go would, and so tells whether what was written is right.
Understood are text, range over .Messages, if, else if, else, end, variables, comparisons, len and slice.
Source: https://pkg.go.dev/text/template; what Ollama passes in: its template/template.go.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from lorafit.errors import ModelError
from lorafit.export.turns import ASSISTANT, REPLY, SYSTEM, USER, Turns

LAST = "$last"


# --- writing --------------------------------------------------------------------------------------------------------


def write(turns: Turns) -> str:
    """A template for Ollama that writes what `turns` says, and ends where a reply is to begin."""
    roles = [role for role in (SYSTEM, USER, ASSISTANT) if any(after == role for _, after in turns.between)]
    branches = [
        f'if eq .Role "{role}" }}}}{_head(turns, role)}{_inner(turns, role)}{{{{ .Content }}}}' for role in roles
    ]
    body = "{{ " + "{{ else ".join(branches) + "{{ end }}"
    opening = f'{{{{ {LAST} := "" }}}}{{{{ range $i, $_ := .Messages }}}}'
    # A system message that goes elsewhere, or nowhere, is no turn of its own.
    remembered = f"{{{{ {LAST} = .Role }}}}"
    if SYSTEM not in roles:
        remembered = f'{{{{ if ne .Role "system" }}}}{remembered}{{{{ end }}}}'
    reply = literal(turns.between[USER, REPLY])
    return f'{opening}{body}{remembered}{{{{ end }}}}{{{{ if ne {LAST} "assistant" }}}}{reply}{{{{ end }}}}'


def _head(turns: Turns, role: str) -> str:
    """What stands before a message of this role, by the role of the one before; what they share is written once."""
    texts = {before: text for (before, after), text in turns.between.items() if after == role}
    shared = _common_end(list(texts.values()))
    own = {before: text[: len(text) - len(shared)] for before, text in texts.items()}
    kinds = list(dict.fromkeys(own.values()))
    if len(kinds) == 1:
        return literal(kinds[0] + shared)
    usual = own.get(ASSISTANT, kinds[-1])
    tests = [(before, text) for before, text in own.items() if text != usual]
    written = "".join(
        f'{{{{ {"else if" if number else "if"} eq {LAST} "{before}" }}}}{literal(text)}'
        for number, (before, text) in enumerate(tests)
    )
    rest = f"{{{{ else }}}}{literal(usual)}" if usual else ""
    return f"{written}{rest}{{{{ end }}}}{literal(shared)}"


def _inner(turns: Turns, role: str) -> str:
    """The system message inside of the last question, where it belongs there."""
    if role != USER or turns.around_system is None:
        return ""
    before, after = map(literal, turns.around_system)
    is_last = "eq (len (slice $.Messages $i)) 1"
    return f"{{{{ if and $.System ({is_last}) }}}}{before}{{{{ $.System }}}}{after}{{{{ end }}}}"


def _common_end(texts: list[str]) -> str:
    """The longest end that all have, from where a token or a line begins: for the eye alone."""
    shortest = min(texts, key=len)
    cuts = [cut for cut in range(len(shortest)) if shortest[cut] in "<[#\n" or cut == 0]
    return next((shortest[cut:] for cut in cuts if all(text.endswith(shortest[cut:]) for text in texts)), "")


def literal(text: str) -> str:
    """Text that stands for itself, in a template and in a Modelfile, which drops what does not print."""
    text = text.replace('"""', "\0\0\0")
    return "".join(char if _is_plain(char) else _escaped('"' if char == "\0" else char) for char in text)


def _is_plain(char: str) -> bool:
    return char != "{" and (char in " \n" or unicodedata.category(char)[0] in "LMNPS")


def _escaped(char: str) -> str:
    code = ord(char)
    return f'{{{{ "\\u{code:04x}" }}}}' if code < 1 << 16 else f'{{{{ "\\U{code:08x}" }}}}'


# --- reading --------------------------------------------------------------------------------------------------------

ACTION = re.compile(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", re.DOTALL)
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\(|\)|[^\s()]+')
ESCAPE = re.compile(r"\\(?:u([0-9a-f]{4})|U([0-9a-f]{8})|(.))")
Node = tuple[Any, ...]


def evaluate(template: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of a conversation. messages: role and content of each. Raises ModelError for other syntax.

    Ollama joins neighbours of one role and gathers system messages, in this way, before it calls the template.
    """
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1]["content"] += "\n\n" + message["content"]
        else:
            merged.append(dict(message))
    system = "\n\n".join(message["content"] for message in messages if message["role"] == SYSTEM)
    root = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in merged], "System": system}
    nodes, ended = _parse(_pieces(template))
    if ended:
        raise _unknown(ended)
    return "".join(_run(nodes, root, {"$": root}))


def _pieces(template: str) -> Iterator[tuple[str, str]]:
    """("text", its characters) and ("action", its words), whitespace trimmed where an action asks for it."""
    end, trim = 0, False
    for found in ACTION.finditer(template):
        text = template[end : found.start()]
        text = text.lstrip() if trim else text
        yield "text", text.rstrip() if found[1] else text
        yield "action", found[2]
        end, trim = found.end(), bool(found[3])
    yield "text", template[end:].lstrip() if trim else template[end:]


def _parse(pieces: Iterator[tuple[str, str]]) -> tuple[list[Node], str]:
    """(nodes up to the end of this block, the action that ended it, or nothing)."""
    nodes: list[Node] = []
    for kind, text in pieces:
        if kind == "text":
            nodes.append(("text", text))
        elif text == "end" or text.startswith("else"):
            return nodes, text
        elif text.startswith("if "):
            nodes.append(_branch(text, pieces))
        elif found := re.fullmatch(r"range (?:(\$\w+), \$_ := )?(\S+)", text):
            body, ended = _parse(pieces)
            if ended != "end":
                raise _unknown(ended)
            nodes.append(("range", found[1], found[2], body))
        elif found := re.fullmatch(r"(\$\w+) :?= (.+)", text):
            nodes.append(("set", found[1], WORD.findall(found[2])))
        else:
            nodes.append(("print", WORD.findall(text)))
    return nodes, ""


def _branch(text: str, pieces: Iterator[tuple[str, str]]) -> Node:
    """An if with all that belongs to it: ("if", condition, nodes, nodes otherwise)."""
    then, ended = _parse(pieces)
    otherwise: list[Node] = []
    if ended.startswith("else if "):
        otherwise = [_branch(ended.removeprefix("else "), pieces)]
    elif ended == "else":
        otherwise, ended = _parse(pieces)
        if ended != "end":
            raise _unknown(ended)
    elif ended != "end":
        raise _unknown(ended)
    return ("if", WORD.findall(text.removeprefix("if ")), then, otherwise)


def _run(nodes: list[Node], dot: Any, variables: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        match node:
            case ("text", text):
                yield text
            case ("print", words):
                yield str(_value(words, dot, variables))
            case ("set", name, words):
                variables[name] = _value(words, dot, variables)
            case ("if", words, then, otherwise):
                yield from _run(then if _value(words, dot, variables) else otherwise, dot, variables)
            case ("range", index, over, body):
                for number, item in enumerate(_operand(over, dot, variables)):
                    if index:
                        variables[index] = number
                    yield from _run(body, item, variables)


def _value(words: list[str], dot: Any, variables: dict[str, Any]) -> Any:
    """The value of a command: a function with its operands, or one operand."""
    rest = list(words)
    values = []
    while rest:
        word = rest.pop(0)
        if word == "(":
            depth, inner = 1, []
            while depth:
                if not rest:
                    raise _unknown(" ".join(words))
                depth += {"(": 1, ")": -1}.get(rest[0], 0)
                inner.append(rest.pop(0))
            values.append(_value(inner[:-1], dot, variables))
        elif not values and word in FUNCTIONS and rest:
            values.append(FUNCTIONS[word])
        else:
            values.append(_operand(word, dot, variables))
    return values[0](*values[1:]) if callable(values[0]) else values[0]


FUNCTIONS: dict[str, Any] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a and b,
    "len": len,
    "slice": lambda items, first: items[first:],
}


def _operand(word: str, dot: Any, variables: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return ESCAPE.sub(_unescaped, word[1:-1])
    if word.isdigit():
        return int(word)
    name, _, attribute = word.partition(".")
    if name and name not in variables:
        raise _unknown(word)
    value = variables[name] if name else dot
    return value[attribute] if attribute else value


def _unescaped(found: re.Match[str]) -> str:
    code = found[1] or found[2]
    return chr(int(code, 16)) if code else {"n": "\n", "t": "\t"}.get(found[3], found[3])


def _unknown(what: str) -> ModelError:
    return ModelError(f"the Go template has {what!r}, which is not understood here", "")
