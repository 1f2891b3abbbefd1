"""What stands before every route: hosts, the key, headers that are sent with everything, and the count of requests."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kmixer.errors import shown
from kmixer.serve.protocol import ApiError

# What needs no key: whether the server is there, and the page, which holds nothing and asks for the key.
OPEN = ("/health", "/")
ROUTES = ("/", "/health", "/metrics", "/v1/completions", "/v1/chat/completions", "/v1/models")
# The code of a request that was not answered, as its client had left.
CLIENT_LEFT = 499
HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Guard:
    """Lets through what may be answered.

    Args:
        app: what answers.
        hosts: names that a request may ask for; None: any.
        key: what it has to show; None: nothing.
        count: takes the route and the code of every answer.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Iterable[str] | None, key: str | None, count: Callable[[str, int], None]
    ) -> None:
        self._app, self._count = app, count
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        code = CLIENT_LEFT

        async def counted(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        try:
            if (problem := self._problem(scope)) is None:
                await self._app(scope, receive, counted)
            else:
                await send_error(problem, counted)
        finally:
            self._count(route_of(scope["path"]), code)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = _name_of(headers.get(b"host", b"").decode("latin-1"))
        if self._hosts is not None and host not in self._hosts:
            return ApiError(
                400, f"host: got {shown(host)}; allowed: {', '.join(sorted(self._hosts))}; or --allowed-host"
            )
        if self._key is None or scope["path"] in OPEN:
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key):
            return None
        return ApiError(
            401,
            "key: it is missing or another; send the header 'Authorization: Bearer KEY'",
            "authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def send_error(error: ApiError, send: Send) -> None:
    """Answer with an error."""
    body = json.dumps(error.body).encode()
    headers: list[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
    ]
    start: dict[str, Any] = {"type": "http.response.start", "status": error.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def route_of(path: str) -> str:
    """The route of a path, of which there are few."""
    if path in ROUTES:
        return path
    for prefix in ("/v1/models/", "/v1/sessions/"):
        if path.startswith(prefix):
            rest = path.removeprefix(prefix).partition("/")[2]
            return f"{prefix}{{id}}" + (f"/{rest}" if rest in ("state", "fork") else "")
    return "other"


def _name_of(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
