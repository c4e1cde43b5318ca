"""What a server says of itself when it listens."""

from __future__ import annotations

import json
import os
import shlex
from typing import Any

from rich.console import Console

from lorafit.config import ServeConfig
from lorafit.errors import listed
from lorafit.infer.server.ask import Served
from lorafit.units import format_count

TOKEN_VARIABLE = "LORAFIT_TOKEN"


def say(console: Console, line: str) -> None:
    """One line beside what matters."""
    console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def announce(config: ServeConfig, offered: dict[str, Served], facts: dict[str, Any], console: Console) -> None:
    """Say what is served, where, how to ask, how to stop."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{facts['port']}"
    names = [f"{one.name} (the base)" if one.adapter is None else one.name for one in offered.values()]
    at_once = "one answer" if facts["parallel"] == 1 else f"{facts['parallel']} answers"
    many = f"{at_once} at a time, {format_count(config.queue)} more may wait"
    first = next(iter(offered.values()))
    if not facts["local"]:
        say(console, "it can be reached from other machines, unencrypted: put a proxy that speaks TLS in front of it")
    lines = [
        f"serving {listed(names)} by {facts['backend']} on {url}",
        f"{format_count(facts['context'])} tokens of context; {many}. Ask it:",
        f"  {_curl(config, url, first)}",
        "Ctrl-C stops it.",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _curl(config: ServeConfig, url: str, served: Served) -> str:
    """A command that can be pasted into a shell. The token is never in it, but where it is to be found."""
    body: dict[str, Any]
    if served.tokenizer.chat_template:
        path, body = "chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}
    else:
        path, body = "completions", {"prompt": "Hello"}
    parts = ["curl", f"{url}/v1/{path}", "-H", shlex.quote("Content-Type: application/json")]
    if config.token_file:
        parts += ["-H", f'"Authorization: Bearer $(cat {shlex.quote(config.token_file)})"']
    elif TOKEN_VARIABLE in os.environ:
        parts += ["-H", f'"Authorization: Bearer ${TOKEN_VARIABLE}"']
    return " ".join([*parts, "-d", shlex.quote(json.dumps({"model": served.name, **body}, ensure_ascii=False))])
