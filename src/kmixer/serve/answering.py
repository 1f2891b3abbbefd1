"""Sending what the engine writes to one client, whole or as a stream, for as long as the client is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kmixer.serve.engine import Engine
from kmixer.serve.guard import send_error
from kmixer.serve.jobs import Ended, Event, Job, Piece, PromptRead
from kmixer.serve.protocol import Answer, ApiError
from kmixer.serve.sessions import Sessions

# What a client takes nothing of for so long is not for it any more.
SEND_SECONDS = 60.0


class Mail:
    """Events of the jobs of one request, in order."""

    def __init__(self) -> None:
        self._events: list[tuple[int, Event]] = []
        self._news = asyncio.Event()
        self.gone = False

    def of(self, index: int) -> Callable[[Event], None]:
        """What takes the events of a job; on the loop's thread."""

        def deliver(event: Event) -> None:
            self._events.append((index, event))
            self._news.set()

        return deliver

    def leave(self) -> None:
        """The client has left."""
        self.gone = True
        self._news.set()

    async def take(self) -> list[tuple[int, Event]]:
        """What has come, one event or more; nothing where the client has left."""
        await self._news.wait()
        self._news.clear()
        events, self._events = self._events, []
        return [] if self.gone else events


class Service(Protocol):
    """What answers are taken from."""

    engine: Engine
    sessions: Sessions
    answering: int


class Answering(Response):
    """The answer to a request for completions, while it is written."""

    def __init__(self, service: Service, session: str | None, jobs: list[Job], mail: Mail, answer: Answer) -> None:
        self._service, self._session = service, session
        self._jobs, self._mail, self._answer = jobs, mail, answer
        self._left = len(jobs)
        self._sends_since: float | None = None
        self._late = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.answering += 1
        watch = asyncio.ensure_future(self._watch(receive))
        slow = asyncio.ensure_future(self._give_up_on_the_slow(asyncio.current_task()))
        try:
            await (self._stream if self._answer.request.stream else self._whole)(self._timely(send))
        except asyncio.CancelledError:
            if not self._late:
                raise  # else the connection is closed, as the answer is not whole
        finally:
            slow.cancel()
            self._service.answering -= 1
            watch.cancel()
            for job in self._jobs:
                self._service.engine.cancel(job)
            self._end_session(None)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._mail.leave()

    def _timely(self, send: Send) -> Send:
        """The same, with note of when it began."""

        async def sending(message: Message) -> None:
            self._sends_since = asyncio.get_running_loop().time()
            await send(message)
            self._sends_since = None

        return sending

    async def _give_up_on_the_slow(self, task: asyncio.Task[None] | None) -> None:
        """End the answering where nothing was taken for too long; a look now and then is cheap."""
        while True:
            await asyncio.sleep(SEND_SECONDS / 4)
            since = self._sends_since
            if task is not None and since is not None and asyncio.get_running_loop().time() - since > SEND_SECONDS:
                self._late = True
                task.cancel()
                return

    async def _whole(self, send: Send) -> None:
        answer = self._answer
        while self._left:
            events = await self._mail.take()
            if self._mail.gone:
                return
            for prompt, event in events:
                for piece in self._pieces(prompt, event):
                    answer.add(prompt, piece)
                if error := _error_in(event):
                    await send_error(error, send)
                    return
        body = answer.whole()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        answer, started = self._answer, False
        while self._left:
            events = await self._mail.take()
            if self._mail.gone:
                return
            lines = []
            for prompt, event in events:
                lines += [answer.chunk(prompt, piece) for piece in self._pieces(prompt, event)]
                if error := _error_in(event):
                    if not started and not lines:
                        await send_error(error, send)
                        return
                    lines.append(f"data: {json.dumps(error.body)}\n\n")
                    self._left = 0
                    break
            else:
                if not self._left:
                    lines.append(answer.end())
            if not lines:
                continue
            if not started:
                started = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            body = "".join(lines).encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _pieces(self, prompt: int, event: Event) -> list[Piece]:
        """What an event adds to the choices of a prompt."""
        if isinstance(event, PromptRead):
            return self._answer.read(prompt, event)
        if isinstance(event, Piece):
            return [event]
        self._left -= 1
        if event.error is None:
            self._end_session(event)
        return []

    def _end_session(self, event: Ended | None) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            self._service.sessions.end(session, None if event is None else event.standing)


def _error_in(event: Event) -> ApiError | None:
    if not isinstance(event, Ended) or event.error is None:
        return None
    stopping = event.error.startswith("the server is stopping")
    return ApiError(503 if stopping else 500, event.error, "server_error")
