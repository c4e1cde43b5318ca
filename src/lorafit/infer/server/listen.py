"""The socket and the life of the server: uvicorn from the first connection to the last answer."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from lorafit.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from lorafit.infer.server.work import Work

SIGNALS = (signal.SIGINT, signal.SIGTERM)
IDLE_S = 15  # for which a connection without a request is kept
SPARE_CONNECTIONS = 64  # beside those that are answered or wait
LAST_S = 10.0  # after the grace: for threads to see that they are to end


def addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    """What a host name means, as `socket.getaddrinfo` gives it. Raises ConfigError."""
    try:
        return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is no address of this machine: {error}", "Give 127.0.0.1") from None


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach a host name, by whatever address. Raises ConfigError."""
    found = {str(address[4][0]).partition("%")[0] for address in addresses(host, 0)}
    return all(ipaddress.ip_address(one).is_loopback for one in found)


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that holds the port and does not listen yet. Raises ConfigError where the port cannot be had."""
    family, kind, protocol, _, address = addresses(host, port)[0]
    with socket.socket(family, kind, protocol) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind(address)
            # A second server may bind beside a first that does not listen yet.
            made.listen(0)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port}: {error.strerror or error}",
                "Choose another with --port; 0 takes a free one",
            ) from None
        yield made


class _Signal(KeyboardInterrupt):
    """A signal on its way up; no library takes it for an error of its own, as it might an Exception."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While this holds, SIGINT and SIGTERM end the block, so that what was begun is cleaned up. Raises Interrupted.

    Elsewhere than in the main thread Python allows no handlers, and nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Signal(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    except _Signal as caught:
        raise stopped(caught.number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped(number: int) -> Interrupted:
    """What a signal comes to."""
    return Interrupted(f"stopped by {signal.Signals(number).name}", "", number)


class Listener:
    """Serves an application until a signal comes or `stop` is called."""

    def __init__(self, app: ASGIApp, work: Work, grace_s: float, most_requests: int) -> None:
        config = uvicorn.Config(
            app, http="h11", ws="none", loop="asyncio", lifespan="off", log_config=None, log_level=logging.CRITICAL,
            access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=IDLE_S,
            limit_concurrency=most_requests + SPARE_CONNECTIONS, timeout_graceful_shutdown=round(grace_s + LAST_S),
        )  # fmt: skip
        self._server, self._work, self._grace_s = _Uvicorn(config), work, grace_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.signal = 0

    def run(self, at: socket.socket, ready: Callable[[], None]) -> None:
        """Listen, call `ready`, and serve. Returns when all answers have ended. Raises Interrupted on a signal."""
        asyncio.run(self._run(at, ready))
        if self.signal:
            raise stopped(self.signal)

    def stop(self) -> None:
        """End it, from any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._stop, 0)

    async def _run(self, at: socket.socket, ready: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._server.ready = ready
        with self._signals_caught(self._loop):
            try:
                await self._server.serve(sockets=[at])
            finally:
                self._work.stop_all()
                await asyncio.to_thread(self._work.close)

    @contextmanager
    def _signals_caught(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Let signals stop the server, in the main thread; the handlers before come back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _stop(self, number: int) -> None:
        """Take no more requests; end those under way after the grace, and at once when told so a second time."""
        again = self._server.should_exit
        self.signal = self.signal or number
        self._server.should_exit = True
        self._work.refuse()
        task = asyncio.ensure_future(self._end_after(0.0 if again else self._grace_s))
        self._tasks.add(task)

    async def _end_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._work.stop_all()


class _Uvicorn(uvicorn.Server):
    """Without signal handlers of its own, and with a word when it listens."""

    ready: Callable[[], None]

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave them to the listener."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self.ready()
