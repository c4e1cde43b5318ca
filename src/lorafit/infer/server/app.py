"""The HTTP side: OpenAI's paths on Starlette.

Starlette chooses the path; what answers is written against ASGI itself, since an answer has to hear of its client's
going while it waits, reads a prompt, or streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafit.infer.server import reply
from lorafit.infer.server.ask import Served, UntilStop
from lorafit.infer.server.body import ApiError, Limits, Order, read_order
from lorafit.infer.server.guard import BODY_SECONDS, TOO_LARGE, Guard, as_response, check_json
from lorafit.infer.server.work import GONE, Piece, Stop, Work, gone, late

Log = Callable[[str], None]
SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
SHOWN_CHARS = 80  # of a path, in the log
DRAINED_BYTES, DRAIN_SECONDS = 1 << 24, 5.0  # of a body that is too large, before it is refused
SEND_SECONDS = 30.0  # for a client to take a part of an answer


class Service:
    """What all requests share."""

    def __init__(
        self, offered: dict[str, Served], work: Work, limits: Limits, guard: Guard, timeout_s: float, log: Log
    ) -> None:
        self.offered, self.work, self.limits, self.guard = offered, work, limits, guard
        self.timeout_s, self.log = timeout_s, log
        self.created = int(time.time())

    @property
    def app(self) -> ASGIApp:
        """As an ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: _http_error, ApiError: _api_error, Exception: self._our_fault}
        return _Guarded(Starlette(routes=routes, exception_handlers=handlers), self)

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        return _json(reply.models(self.offered.values(), self.created))

    async def _model(self, request: Request) -> Response:
        served = self.offered.get(request.path_params["name"])
        if served is None:
            raise ApiError(404, "there is no such model; GET /v1/models lists them", code="model_not_found")
        return _json(reply.model(served, self.created))

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, chat: bool) -> Response:
        """Read and check the request; the answer is made while it is sent."""
        check_json(request.scope["headers"])
        stop = Stop(self.timeout_s)
        raw = await self._body(request)
        loop = asyncio.get_running_loop()
        order = await loop.run_in_executor(
            self.work.reader, read_order, raw, chat, self.offered, self.limits, self.work.backend
        )
        return _Answer(order, stop, self)

    async def _our_fault(self, request: Request, error: Exception) -> Response:
        self.log(f"failed: {error!r}")
        return await _api_error(request, ApiError(500, "the server failed", "server_error", "internal_error"))

    async def _body(self, request: Request) -> bytes:
        """All of it, up to the limit. Raises ApiError."""
        raw = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    raw += part
                    if len(raw) > self.guard.max_body_bytes:
                        await _drain(request.receive)
                        raise self.guard.too_large()
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="timeout") from None
        except ClientDisconnect:
            raise gone() from None
        return bytes(raw)


class _Guarded:
    """Refuses what may not go on, and says in one line what became of every request."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.perf_counter(), 0
        scope["lorafit"] = ""  # what an answer has to say of itself

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._service.guard.check(scope["path"], scope["headers"])
        except ApiError as error:
            if error.status == TOO_LARGE and b"expect" not in dict(scope["headers"]):
                await _drain(receive)
            await _send_error(error, noting)
        else:
            await self._app(scope, receive, noting)
        seconds = time.perf_counter() - started
        asked = f"{_shown(scope['method'])} {_shown(scope['path'])}"
        self._service.log(f"{asked} {status or 'gone'}{scope['lorafit']} {seconds:.2f} s")


class _Answer(Response):
    """An answer that is computed while it is sent."""

    def __init__(self, order: Order, stop: Stop, service: Service) -> None:
        self._order, self._stop, self._service = order, stop, service
        self._head, self._cut = reply.Head.of(order), UntilStop(order.stop)
        self._texts: list[str] = []
        self._tokens, self._finish = 0, ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(_until_gone(receive, self._stop))
        told = _Told(send)
        try:
            async with self._service.work.turn(self._stop):
                if self._order.stream:
                    await self._stream(told)
                else:
                    await self._whole(told)
        except ApiError as error:
            if error.status == 500:
                self._service.log(f"failed: {error.__cause__!r}")
            await told.error(error)
        finally:
            watch.cancel()
            ended = f" {self._finish}" if self._finish else " not finished"
            scope["lorafit"] = f" {self._order.model!r} {len(self._order.ask.prompt)}+{self._tokens} tokens{ended}"

    async def _whole(self, told: _Told) -> None:
        await self._pieces(None)
        text = "".join(self._texts) + self._cut.rest()
        await told.whole(reply.dumped(self._head.whole(text, self._finish, self._tokens)))

    async def _stream(self, told: _Told) -> None:
        begun = False

        async def say(text: str) -> None:
            nonlocal begun
            begun = begun or await told.begin(self._head.first())
            if text:
                await told.event(self._head.piece(text))

        await self._pieces(say)
        await say(self._cut.rest())
        await told.end(self._head.last(self._finish, self._tokens))

    async def _pieces(self, say: Callable[[str], Awaitable[None]] | None) -> None:
        """Take the answer, up to a stop string. Raises ApiError where it was ended from outside."""
        async with aclosing(self._service.work.pieces(self._order.ask, self._stop)) as pieces:
            async for piece in pieces:
                if not isinstance(piece, Piece):
                    self._end(piece)
                    break
                self._tokens += piece.tokens
                text = self._cut.push(piece.text)
                self._texts.append(text)
                if say is not None and (text or piece.tokens):
                    await say(text)
                if self._cut.found:
                    self._finish = "stop"
                    return

    def _end(self, finish: str) -> None:
        """finish: as the backend tells it. Raises ApiError."""
        if finish == "taken":
            raise self._stop.reason or late()
        self._finish = finish


class _Told:
    """What of an answer has been sent. A client that does not take it is one that has gone: it would hold its slot."""

    def __init__(self, send: Send) -> None:
        self._to, self._begun = send, False

    async def whole(self, body: bytes) -> None:
        await _send(self._send, 200, [(b"content-type", b"application/json")], body)

    async def begin(self, events: list[bytes]) -> bool:
        self._begun = True
        await self._send({"type": "http.response.start", "status": 200, "headers": SSE})
        for one in events:
            await self.event(one)
        return True

    async def event(self, one: bytes) -> None:
        await self._send({"type": "http.response.body", "body": one, "more_body": True})

    async def end(self, events: list[bytes]) -> None:
        await self._send({"type": "http.response.body", "body": b"".join(events), "more_body": False})

    async def error(self, error: ApiError) -> None:
        """As a response of its own; as an event, without a [DONE], where the answer has begun; to nobody not at all."""
        if error.status == GONE:
            return
        if self._begun:
            await self.end([reply.event(error.body)])
        else:
            await _send_error(error, self._send)

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._to(message)
        except TimeoutError:
            raise gone() from None


async def _drain(receive: Receive) -> None:
    """Read on for a little: a client that is cut off while it sends does not see why."""
    left = DRAINED_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return


async def _until_gone(receive: Receive, stop: Stop) -> None:
    """End the answer when its client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stop.set(gone())


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    length = [] if any(name == b"content-length" for name, _ in headers) else [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
    await send({"type": "http.response.body", "body": body})


async def _send_error(error: ApiError, send: Send) -> None:
    await _send(send, *as_response(error))


def _json(value: Any) -> Response:
    return Response(reply.dumped(value), media_type="application/json")


async def _api_error(request: Request, error: ApiError) -> Response:
    status, headers, body = as_response(error)
    named = {name.decode(): value.decode() for name, value in headers}
    return Response(body, status, named)


async def _http_error(request: Request, error: HTTPException) -> Response:
    sentence = {404: "there is no such path here", 405: "this path does not take that method"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    message = sentence.get(error.status_code, str(error.detail))
    return await _api_error(request, ApiError(error.status_code, message, code=code))


def _shown(path: str) -> str:
    return ascii(path[:SHOWN_CHARS])[1:-1]
