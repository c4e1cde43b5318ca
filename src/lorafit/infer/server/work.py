"""Answers under way: who may begin, who waits, who is refused; pieces from a thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from lorafit.errors import LorafitError
from lorafit.infer.server.ask import Ask, Backend, Finish
from lorafit.infer.server.body import ApiError

GONE = 499  # the status that nginx logs when a client has left


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer. tokens: how many it took."""

    text: str
    tokens: int


class Stop:
    """Ends an answer from outside, and says why. To be made in the event loop; the answer's thread reads it."""

    def __init__(self, seconds: float) -> None:
        self._loop, self._set = asyncio.get_running_loop(), asyncio.Event()
        self._deadline = time.monotonic() + seconds
        self.is_set = False
        self.reason: ApiError | None = None  # None: nobody is there to be told

    def set(self, reason: ApiError | None) -> None:
        """End it; the first reason stays. From any thread."""
        if not self.is_set:
            self.reason, self.is_set = reason, True
            self._loop.call_soon_threadsafe(self._set.set)

    @property
    def due(self) -> bool:
        """Whether the answer is to end."""
        if time.monotonic() > self._deadline:
            self.set(late())
        return self.is_set

    async def wait(self) -> None:
        """Until it is set, or its time is over."""
        try:
            await asyncio.wait_for(self._set.wait(), max(0.0, self._deadline - time.monotonic()))
        except TimeoutError:
            self.set(late())


def late() -> ApiError:
    """For a request that took too long."""
    return ApiError(504, "the request took longer than is allowed here", "server_error", "timeout")


def gone() -> ApiError:
    """For nobody: the client has left."""
    return ApiError(GONE, "the client has gone", code="client_gone")


def closing() -> ApiError:
    """For a request that the end of the server cuts off."""
    return ApiError(503, "the server is shutting down", "server_error", "shutting_down")


class Work:
    """The backend's slots, and those that wait for one."""

    def __init__(self, backend: Backend, queue: int) -> None:
        self.backend = backend
        self._queue = queue
        self._slots = asyncio.Semaphore(backend.parallel)
        self._threads = ThreadPoolExecutor(backend.parallel, thread_name_prefix="answer")
        # One thread: tokenizers may not be changed while they are used, and preparing one changes it.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        self._waiting: set[Stop] = set()
        self._running: set[Stop] = set()
        self._closed = False

    @property
    def reader(self) -> ThreadPoolExecutor:
        """Where prompts are made."""
        return self._reader

    @asynccontextmanager
    async def turn(self, stop: Stop) -> AsyncIterator[None]:
        """Hold a slot. Raises ApiError: 429 where too many wait, else the reason why `stop` was set meanwhile."""
        if self._closed:
            raise closing()
        if self._slots.locked() and len(self._waiting) >= self._queue:
            raise ApiError(429, "too many requests are waiting; try again later", "server_error", "queue_full")
        await self._slot(stop)
        self._running.add(stop)
        try:
            yield
        finally:
            self._running.discard(stop)
            self._slots.release()

    async def _slot(self, stop: Stop) -> None:
        """Wait for a slot, first come, first served. Raises ApiError if `stop` is set before."""
        mine, ended = asyncio.ensure_future(self._slots.acquire()), asyncio.ensure_future(stop.wait())
        self._waiting.add(stop)
        try:
            await asyncio.wait({mine, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiting.discard(stop)
            ended.cancel()
            if not mine.done():
                mine.cancel()
        if stop.is_set:
            if mine.done() and not mine.cancelled():
                self._slots.release()
            raise stop.reason or closing()

    async def pieces(self, ask: Ask, stop: Stop) -> AsyncGenerator[Piece | Finish, None]:
        """The parts of an answer and how it ended, under a turn. Raises ApiError.

        The generator ends only once the thread has: its slot is free then.
        """
        loop = asyncio.get_running_loop()
        found: asyncio.Queue[Piece | Finish | Exception] = asyncio.Queue()

        def say(what: Piece | Finish | Exception) -> None:
            loop.call_soon_threadsafe(found.put_nowait, what)

        def take(text: str, tokens: int) -> bool:
            say(Piece(text, tokens))
            return stop.due

        def work() -> None:
            try:
                say(self.backend.answer(ask, take))
            except Exception as error:
                say(error)

        done = loop.run_in_executor(self._threads, work)
        try:
            while True:
                what = await found.get()
                if isinstance(what, Exception):
                    raise _as_api_error(what) from what
                yield what
                if not isinstance(what, Piece):
                    return
        finally:
            stop.set(None)
            await asyncio.shield(done)

    def refuse(self) -> None:
        """Let nobody begin any more, and send away those who wait; answers under way go on."""
        self._closed = True
        for stop in list(self._waiting):
            stop.set(closing())

    def stop_all(self) -> None:
        """End all answers too."""
        self.refuse()
        for stop in list(self._running):
            stop.set(closing())

    def close(self) -> None:
        """Wait for the threads."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._threads.shutdown(wait=True, cancel_futures=True)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LorafitError):
        return ApiError(400, str(error), code="not_possible")
    return ApiError(500, f"answering failed: {type(error).__name__}", "server_error", "internal_error")
