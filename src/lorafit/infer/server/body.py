"""The body of a request, by OpenAI's names: read, checked, and made an `Ask`.

A field that is not known is refused rather than passed over; so is one that asks for what is not done here. Fields that
would not change the answer are let through.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorafit.data.mask import Marks, encode_prompt
from lorafit.data.messages import read_messages, read_tools
from lorafit.data.tokenise import Tokeniser
from lorafit.errors import DataError, LorafitError, did_you_mean, listed
from lorafit.infer.server.ask import Ask, Backend, Served

MOST_STOPS, MOST_STOP_CHARS = 16, 256
BIGGEST_SEED = 2**32  # llama.cpp's are so long


class ApiError(Exception):
    """A request that is refused. status: of HTTP. kind, code, param: OpenAI's `type`, `code` and `param`."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", code: str = "", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API says it."""
        return {"error": {"message": self.message, "type": self.kind, "code": self.code or None, "param": self.param}}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for, and what it gets where it says nothing. Settings of ServeConfig."""

    scale: float
    max_scale: float
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Order:
    """A request that was understood: what is wanted, and how the answer is to be told."""

    ask: Ask
    model: str
    chat: bool
    stream: bool
    include_usage: bool
    stop: list[str]


# --- what may stand in a body ---------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Any = None


class _Schema(_Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class _Format(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


class _Common(_Strict):
    """Null stands for absent, as in OpenAI's API."""

    model: str | None = None
    scale: float | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    response_format: _Format | None = None
    # Asks for what is not done here, but for the value that asks for nothing.
    n: Literal[1] | None = None
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)
    # Without effect on the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class _Chat(_Common):
    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Any] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    parallel_tool_calls: Any = None


class _Completion(_Common):
    prompt: str | list[int] | list[str]
    echo: Literal[False] | None = None
    logprobs: Literal[0] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


B = TypeVar("B", bound=_Common)


def read_order(raw: bytes, chat: bool, offered: dict[str, Served], limits: Limits, backend: Backend) -> Order:
    """A body -> what is wanted. Renders and tokenises, so it may take a while. Raises ApiError."""
    body: _Chat | _Completion = _read(raw, _Chat) if chat else _read(raw, _Completion)
    served = _served(body.model, offered)
    stream = bool(body.stream)
    if body.stream_options is not None and not stream:
        raise _wrong("stream_options", "is given without stream: true")
    wanted = body.max_tokens
    if isinstance(body, _Chat):
        if body.max_completion_tokens is not None and wanted is not None:
            raise _wrong("max_tokens", "is given beside max_completion_tokens, which is its other name")
        wanted = body.max_completion_tokens or wanted
        prompt = _conversation(body, served)
    else:
        prompt = _text(body.prompt, served)
    ask = Ask(
        adapter=served.adapter,
        scale=_scale(body.scale, served, limits),
        prompt=prompt,
        stops=served.stops,
        max_new_tokens=_room(len(prompt), wanted, limits, backend.context),
        temperature=limits.temperature if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=random.randrange(BIGGEST_SEED) if body.seed is None else body.seed % BIGGEST_SEED,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        schema=_schema(body.response_format),
    )
    _check_ability(ask, backend)
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    return Order(ask, served.name, chat, stream, include_usage, _stops(body.stop))


# --- reading --------------------------------------------------------------------------------------------------------


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _read(raw: bytes, kind: type[B]) -> B:
    try:
        value = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="bad_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="bad_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explained(error, kind) from None


def _explained(error: ValidationError, kind: type[_Common]) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(where, kind.model_fields) or f"Known: {listed(sorted(kind.model_fields), 40)}."
        return ApiError(400, f"{where!r} is not known here. {hint}", code="unknown_field", param=param)
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing", code="missing_field", param=param)
    got = repr(first["input"])
    return _wrong(where, f"{first['msg']}, got {got if len(got) < 80 else got[:80] + '...'}", param)


def _wrong(where: str, what: str, param: str | None = None) -> ApiError:
    return ApiError(400, f"{where}: {what}", code="invalid_value", param=param or where)


def _served(name: str | None, offered: dict[str, Served]) -> Served:
    """The one that is named, else the first. Raises ApiError 404."""
    if name is None:
        return next(iter(offered.values()))
    if name not in offered:
        hint = did_you_mean(name, offered) or f"There are: {listed(offered)}."
        raise ApiError(404, f"there is no model {name[:200]!r}. {hint}", code="model_not_found", param="model")
    return offered[name]


def _scale(wanted: float | None, served: Served, limits: Limits) -> float:
    if served.adapter is None:
        if wanted:
            raise _wrong("scale", f"{served.name} is the base model, which has no adapter to scale")
        return 0.0
    scale = limits.scale if wanted is None else wanted
    if abs(scale) > limits.max_scale:
        raise _wrong("scale", f"is {scale:g}, and from {-limits.max_scale:g} to {limits.max_scale:g} is allowed here")
    return scale


def _stops(value: str | list[str] | None) -> list[str]:
    stops = [value] if isinstance(value, str) else value or []
    if len(stops) > MOST_STOPS or any(not 0 < len(stop) <= MOST_STOP_CHARS for stop in stops):
        raise _wrong("stop", f"at most {MOST_STOPS} texts of 1 to {MOST_STOP_CHARS} characters can stop an answer")
    return stops


def _schema(wanted: _Format | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise _wrong("response_format", "of type json_schema has no json_schema")
    return wanted.json_schema.schema_


def _room(prompt_tokens: int, wanted: int | None, limits: Limits, context: int) -> int:
    """Most tokens of the answer. Raises ApiError where more is wanted than is allowed, or none fits."""
    if wanted is not None and wanted > limits.max_new_tokens:
        raise _wrong("max_tokens", f"is {wanted}, and at most {limits.max_new_tokens} are allowed here")
    if prompt_tokens == 0:
        raise ApiError(400, "the prompt holds no tokens", code="empty_prompt")
    if prompt_tokens >= context:
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens, and prompt and answer together may have {context}",
            code="context_length_exceeded",
        )
    return min(wanted or limits.max_new_tokens, context - prompt_tokens)


def _check_ability(ask: Ask, backend: Backend) -> None:
    """Raise ApiError for what the backend would have to pass over."""
    nothing = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "schema": None}
    for name in sorted(backend.unable):
        if getattr(ask, name) != nothing[name]:
            field = "response_format" if name == "schema" else name
            raise _wrong(field, f"is not possible with the backend {backend.name}")


# --- prompts --------------------------------------------------------------------------------------------------------


def _conversation(body: _Chat, served: Served) -> list[int]:
    """Token ids of the conversation up to where the reply begins, as training renders it. Raises ApiError."""
    try:
        messages = list(read_messages([_as_system(message) for message in body.messages], "messages", "the request"))
        tools = read_tools(body.tools, "the request") if body.tool_choice != "none" else ()
        if messages[-1]["role"] == "assistant":
            raise _wrong("messages", "the last one is from the assistant, so there is nothing to answer")
        if served.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": served.system})
        return encode_prompt(messages, served.tokenizer, tools)
    except DataError as error:
        raise _wrong("messages", error.what.removeprefix("the request: ")) from None
    except LorafitError as error:
        raise _wrong("messages", str(error)) from None


def _as_system(message: Any) -> Any:
    """`developer` is what OpenAI calls `system` now."""
    is_developer = isinstance(message, dict) and message.get("role") == "developer"
    return {**message, "role": "system"} if is_developer else message


def _text(prompt: str | list[int] | list[str], served: Served) -> list[int]:
    """Token ids of running text, as training reads it, or those that are given. Raises ApiError."""
    if isinstance(prompt, list) and prompt and all(isinstance(part, int) for part in prompt):
        known = len(served.tokenizer)
        ids = [int(part) for part in prompt]
        if min(ids) < 0 or max(ids) >= known:
            raise _wrong("prompt", f"token ids are from 0 to {known - 1}")
        return ids
    if isinstance(prompt, list):
        if len(prompt) != 1:
            raise _wrong("prompt", "one prompt a request is answered here")
        prompt = str(prompt[0])
    return [*Marks.of(served.tokenizer).bos, *Tokeniser(served.tokenizer).ids([prompt])[0]]
