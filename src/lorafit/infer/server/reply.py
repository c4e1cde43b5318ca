"""Answers as OpenAI's API tells them: whole objects, and the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorafit.infer.server.ask import Served
from lorafit.infer.server.body import Order

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks of an answer begin with."""

    order: Order
    id: str
    created: int

    @classmethod
    def of(cls, order: Order) -> Head:
        """A new one."""
        return cls(order, f"{'chatcmpl' if order.chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, text: str, finish: str, tokens: int) -> dict[str, Any]:
        """The answer in one object. finish: `stop` or `length`. tokens: of the answer, without its end token."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self.order.chat else {"text": text}
        kind = "chat.completion" if self.order.chat else "text_completion"
        return self._headed(kind, [choice]) | {"usage": self._usage(tokens)}

    def first(self) -> list[bytes]:
        """What a stream begins with: of a conversation, who speaks."""
        return [self._chunk({"role": "assistant", "content": ""}, None)] if self.order.chat else []

    def piece(self, text: str) -> bytes:
        """A part of the text."""
        return self._chunk({"content": text}, None, text)

    def last(self, finish: str, tokens: int) -> list[bytes]:
        """What a stream ends with."""
        chunks = [self._chunk({}, finish)]
        if self.order.include_usage:
            chunks.append(event(self._headed(self._stream_kind, []) | {"usage": self._usage(tokens)}))
        return [*chunks, DONE]

    def _chunk(self, delta: dict[str, Any], finish: str | None, text: str = "") -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice |= {"delta": delta} if self.order.chat else {"text": text}
        return event(self._headed(self._stream_kind, [choice]))

    @property
    def _stream_kind(self) -> str:
        return "chat.completion.chunk" if self.order.chat else "text_completion"

    def _headed(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.order.model, "choices": choices,
        }  # fmt: skip

    def _usage(self, tokens: int) -> dict[str, int]:
        prompt = len(self.order.ask.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dumped(value) + b"\n\n"


def dumped(value: Any) -> bytes:
    """JSON. A half of a surrogate pair, which a body may bring, has no UTF-8 and becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(errors="replace")


def model(served: Served, created: int) -> dict[str, Any]:
    """One line of /v1/models."""
    return {"id": served.name, "object": "model", "created": created, "owned_by": "lorafit"}


def models(offered: Iterable[Served], created: int) -> dict[str, Any]:
    """All that a request can name."""
    return {"object": "list", "data": [model(served, created) for served in offered]}
