"""Running a service until it is told to stop: sockets, signals, and how the process ends."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from kmixer.errors import InputError
from kmixer.serve.app import Service

CONNECTIONS = 4096
KEEP_ALIVE, HEAD_SECONDS = 5, 10.0
POLL = 0.02
LAST_SECONDS = 2  # for what is answered but not taken, when all else has ended


class _Impatient(H11Protocol):
    """Closes a connection that does not bring a request's head in time, at its beginning and between requests."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_a_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_idle():
            self._expect_a_head()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_a_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self._is_idle():
            self.transport.close()


class _Server(uvicorn.Server):
    """Leaves signals to us: its own way raises them again at the end, and the process would end with 143."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_service(
    service: Service, app: ASGIApp, host: str, port: int, grace: float, started: Callable[[str], None] | None = None
) -> int:
    """Serve until SIGTERM or SIGINT, or until the engine dies; the exit code: 0, or 1.

    Args:
        grace: seconds in which answers may end after the signal.
        started: called with the address when requests are answered.

    Raises InputError where the address cannot be used.
    """
    return asyncio.run(_serve(service, app, host, port, grace, started))


async def _serve(
    service: Service, app: ASGIApp, host: str, port: int, grace: float, started: Callable[[str], None] | None
) -> int:
    loop = service.loop = asyncio.get_running_loop()
    _allow_files(CONNECTIONS)
    config = uvicorn.Config(
        app, host, port, http=_Impatient, ws="none", lifespan="off", log_config=None, log_level="critical",
        server_header=False, limit_concurrency=CONNECTIONS, timeout_keep_alive=KEEP_ALIVE, access_log=False,
        timeout_graceful_shutdown=LAST_SECONDS, backlog=1024,
    )  # fmt: skip
    server = _Server(config)
    listener = _listen(host, port)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    service.when_failed = lambda: loop.call_soon_threadsafe(stop.set)
    service.engine.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(POLL)
        if started is not None:
            shown = f"[{host}]" if ":" in host else host
            started(f"http://{shown}:{listener.getsockname()[1]}")
        await stop.wait()
        service.engine.close()
        await _until_done(service, grace)
    finally:
        await asyncio.to_thread(service.engine.stop)
        await asyncio.sleep(POLL)  # what it has told at last
        server.should_exit = True
        await serving
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    if service.engine.error is not None:
        print(f"error: the engine has failed: {service.engine.error}", file=sys.stderr)
        return 1
    return 0


async def _until_done(service: Service, grace: float) -> None:
    """Wait until all is answered, at most so many seconds."""
    end = asyncio.get_running_loop().time() + grace
    while service.engine.error is None and (service.engine.active or service.engine.waiting or service.answering):
        if asyncio.get_running_loop().time() > end:
            return
        await asyncio.sleep(POLL)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that hands on what is written to it at once. Raises InputError where there can be none."""
    listener = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio goes by the protocol
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((host, port))
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen on {host} port {port} ({reason}); choose another") from None
    listener.set_inheritable(False)
    return listener


def _allow_files(count: int) -> None:
    """A file for every connection, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256 if hard == resource.RLIM_INFINITY else min(count + 256, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
