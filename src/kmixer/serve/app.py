"""The HTTP application: its routes, and what they take and answer."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import kmixer
from kmixer.data.tokenizers import Tokenizer, first_of
from kmixer.errors import InputError, one_line, shown
from kmixer.models.causal_lm import CausalLM
from kmixer.native import kernels
from kmixer.serve.answering import Answering, Mail
from kmixer.serve.engine import ClosedError, Engine, FullError
from kmixer.serve.guard import Guard, route_of
from kmixer.serve.jobs import Event, Job
from kmixer.serve.metrics import Metrics
from kmixer.serve.protocol import Answer, ApiError, CompletionRequest, Tokens, parse_request, refusal
from kmixer.serve.sessions import BusyError, MissingError, Sessions, Standing, check_name
from kmixer.serve.state_files import from_bytes, to_bytes
from kmixer.tensor_files import digest_of

BODY_SECONDS = 30.0
FEW = 16  # prompts that a request may have in any case
LONG_TEXT = 1 << 14  # characters that are made tokens beside the loop
STOPPING = "the server is stopping; try another, or again later"


@dataclass(frozen=True)
class Limits:
    """What a server takes."""

    rows: int = 64
    waiting: int = 256
    prefix_memory: int = 1 << 26
    session_memory: int = 1 << 26
    max_tokens: int = 4096
    max_prompt_tokens: int = 65536
    max_body: int = 1 << 20


class Service:
    """A model that is served: what the routes work with.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        name: that requests ask for.
        limits: what is taken.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        name: str,
        limits: Limits,
    ) -> None:
        self.model, self.tokenizer, self.name, self.limits = model, tokenizer, name, limits
        self.metrics = Metrics()
        self.answering = 0  # requests that are being answered
        self.when_failed: Callable[[], object] = lambda: None  # called on the engine's thread when it dies
        self.loop: asyncio.AbstractEventLoop | None = None
        self.engine = Engine(
            model,
            tokenizer,
            rows=limits.rows,
            waiting=limits.waiting,
            prefix_memory=limits.prefix_memory,
            publish=self._publish,
            meter=self.metrics,
            failed=lambda: self.when_failed(),
        )
        self.sessions = Sessions(limits.session_memory)
        self.initial = Standing(model.initial_state(1))
        weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        self.digest = digest_of(weights, model.config.model_dump(mode="json"))
        self.fingerprint = f"kmixer-{kmixer.__version__}-{self.digest[:12]}-{kernel_build()}"
        self.metrics.watch(
            {
                "kmixer_active_streams": ("Answers being read or written.", lambda: self.engine.active),
                "kmixer_waiting_requests": ("Requests in line.", lambda: self.engine.waiting),
                "kmixer_prefix_state_bytes": ("Of kept states of prefixes.", lambda: self.engine.prefixes.nbytes),
                "kmixer_session_bytes": ("Of the states of sessions.", lambda: self.sessions.nbytes),
            }
        )

    def _publish(self, events: list[tuple[Job, Event]]) -> None:
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_deliver, events)

    async def read_body(self, request: Request, kind: str) -> bytes:
        """The body, counted while it is read."""
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != kind:
            raise ApiError(415, f"content type: got {shown(given)}; allowed: {kind}")
        parts, size = [], 0
        limit = self.limits.max_body
        try:
            async with asyncio.timeout(BODY_SECONDS):
                if (request.headers.get("content-length") or "0").isdigit():
                    _check_size(int(request.headers.get("content-length") or 0), limit)
                async for part in request.stream():
                    _check_size(size := size + len(part), limit)
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, f"body: it took more than {BODY_SECONDS:.0f} seconds; send it faster") from None
        return b"".join(parts)

    async def tokens_of(self, prompt: str | Tokens, *, may_be_empty: bool) -> tuple[int, ...]:
        """Tokens of a prompt. Raises ApiError for one that the model cannot read."""
        if isinstance(prompt, str):
            long = len(prompt) > LONG_TEXT
            tokens = await asyncio.to_thread(self._encode, prompt) if long else self._encode(prompt)
        else:
            tokens = tuple(prompt)
            if tokens and max(tokens) >= self.model.vocabulary_size:
                raise ApiError(
                    400,
                    f"prompt: got token {max(tokens)}; allowed: 0 to {self.model.vocabulary_size - 1}",
                    param="prompt",
                )
        if not tokens and not may_be_empty:
            raise ApiError(400, "prompt: got no token; give one character or more", param="prompt")
        if len(tokens) > self.limits.max_prompt_tokens:
            raise ApiError(
                400,
                f"prompt: got {len(tokens):,} tokens; allowed: {self.limits.max_prompt_tokens:,} (--max-prompt-tokens)",
                param="prompt",
                code="context_length_exceeded",
            )
        return tokens

    def _encode(self, text: str) -> tuple[int, ...]:
        if unknown := self.tokenizer.unknown(text):
            message = f"prompt: the tokenizer does not know {first_of(unknown)}; leave them out"
            raise ApiError(400, message, param="prompt")
        return tuple(self.tokenizer.encode(text).tolist())

    async def completions(self, request: Request) -> Response:
        asked = parse_request(await self.read_body(request, "application/json"))
        self._check_open()
        self._check_model(asked.model)
        if (asked.max_tokens or 0) > self.limits.max_tokens:
            raise ApiError(
                400, f"max_tokens: got {asked.max_tokens}; allowed: {self.limits.max_tokens}", param="max_tokens"
            )
        prompts, n = asked.prompts(), asked.n or 1
        rows = self.engine.rows
        if not 1 <= len(prompts) * n <= max(rows, FEW):
            most = max(rows, FEW)
            raise ApiError(400, f"prompt: got {len(prompts)} of n = {n}; allowed: 1 to {most} in all", param="prompt")
        if n > rows:
            raise ApiError(400, f"n: got {n}; allowed: 1 to {rows}", param="n")
        if asked.session is not None and (len(prompts) > 1 or n > 1):
            raise ApiError(400, "session: goes with one prompt and n = 1", param="session")
        tokens = [await self.tokens_of(prompt, may_be_empty=asked.session is not None) for prompt in prompts]
        texts = [
            prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) if asked.echo else ""
            for prompt in prompts
        ]
        answer = Answer(self.name, self.fingerprint, self.tokenizer, asked, texts)
        return self._submit(asked, tokens, answer)

    def _submit(self, asked: CompletionRequest, tokens: list[tuple[int, ...]], answer: Answer) -> Response:
        """Give the engine its jobs."""
        session = asked.session
        begin = None if session is None else self.sessions.begin(session, self.initial)
        mail = Mail()
        jobs: list[Job] = []
        try:
            for index, prompt in enumerate(tokens):
                job = Job(
                    prompt,
                    16 if asked.max_tokens is None else asked.max_tokens,
                    asked.sampling(),
                    asked.seeds(),
                    mail.of(index),
                    asked.stops(),
                    asked.logprobs,
                    bool(asked.echo) and asked.logprobs is not None,
                    begin,
                )
                self.engine.submit(job)
                jobs.append(job)
        except BaseException:
            for job in jobs:
                self.engine.cancel(job)
            if session is not None:
                self.sessions.end(session, None)
            raise
        return Answering(self, session, jobs, mail, answer)

    async def models(self, request: Request) -> Response:
        about = {"id": self.name, "object": "model", "created": 0, "owned_by": "kmixer"}
        if name := request.path_params.get("name"):
            self._check_model(name)
            return JSONResponse(about)
        return JSONResponse({"object": "list", "data": [about]})

    async def session(self, request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "DELETE":
            self.sessions.drop(name)
            return JSONResponse({"id": name, "object": "session", "deleted": True})
        return JSONResponse(self.sessions.about(name))

    async def fork(self, request: Request) -> Response:
        name = request.path_params["name"]
        body = await self.read_body(request, "application/json")
        to = _name_in(body)
        if not self._is_new(to):
            raise ApiError(409, f"session {to}: there is one already; drop it, or choose another name", param="to")
        self.sessions.fork(name, to)
        return JSONResponse(self.sessions.about(to), status_code=201)

    async def state(self, request: Request) -> Response:
        name = request.path_params["name"]
        if request.method != "PUT":
            content = to_bytes(self.sessions.standing(name), self.digest)
            return Response(content, media_type="application/octet-stream")
        content = await self.read_body(request, "application/octet-stream")
        check_name(name)
        self.sessions.put(name, from_bytes(content, self.digest, self.model))
        return JSONResponse(self.sessions.about(name))

    async def health(self, request: Request) -> Response:
        engine = self.engine
        status = "ok" if not engine.closed else "stopping" if engine.error is None else "failed"
        about = {"status": status, "active": engine.active, "waiting": engine.waiting, "rows": engine.rows}
        return JSONResponse(about, status_code=200 if status == "ok" else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        page = PAGE.replace('data-model="MODEL"', f'data-model="{html.escape(self.name)}"')
        return HTMLResponse(page, headers={"Content-Security-Policy": page_policy()})

    async def chat(self, request: Request) -> Response:
        raise ApiError(404, "these models have no chat template; use /v1/completions", code="not_found")

    def _is_new(self, name: str) -> bool:
        check_name(name)
        try:
            self.sessions.about(name)
        except MissingError:
            return True
        return False

    def _check_open(self) -> None:
        if self.engine.closed:
            raise ApiError(503, STOPPING, "server_error", headers={"Retry-After": "5"})

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404, f"model: got {shown(name)}; allowed: {self.name}", param="model", code="model_not_found"
            )


PAGE = files("kmixer.serve").joinpath("page.html").read_text(encoding="utf-8")


def build_app(service: Service, *, key: str | None, hosts: list[str] | None, cors: list[str]) -> ASGIApp:
    """The application around a service whose engine runs."""
    routes = [
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/v1/sessions/{name}", service.session, methods=["GET", "DELETE"]),
        Route("/v1/sessions/{name}/fork", service.fork, methods=["POST"]),
        Route("/v1/sessions/{name}/state", service.state, methods=["GET", "PUT"]),
        Route("/health", service.health),
        Route("/metrics", service.show_metrics),
        Route("/", service.page),
    ]
    handlers: dict[Any, Any] = {
        ApiError: _answer_error,
        InputError: _answer_input_error,
        HTTPException: _answer_http_error,
        ClientDisconnect: _answer_nobody,
        Exception: _answer_defect,
    }
    app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)
    app = Guard(app, hosts=hosts, key=key, count=lambda route, code: service.metrics.requests.labels(route, code).inc())
    if cors:
        headers = ["authorization", "content-type"]
        app = CORSMiddleware(
            app, allow_origins=cors, allow_methods=["GET", "POST", "PUT", "DELETE"], allow_headers=headers
        )
    return app


def page_policy() -> str:
    """What the page may do: its own script and style, and requests to this server."""

    def allowed(tag: str) -> str:
        content = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def kernel_build() -> str:
    """Which build of the compiled kernels runs here."""
    library = kernels()
    return "torch" if library is None else Path(library._name).name.partition(".")[0].removeprefix("_kernels_")


def _deliver(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.deliver(event)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ApiError(413, f"body: got more than {limit:,} bytes, the most that are taken (--max-body); send fewer")


def _name_in(body: bytes) -> str:
    """The name of a session in the body of a fork."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.keys() != {"to"} or not isinstance(value["to"], str):
        raise ApiError(400, 'to: give the name of the new session, as {"to": "NAME"}', param="to")
    return value["to"]


async def _answer_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _answer_input_error(request: Request, error: InputError) -> Response:
    return await _answer_error(request, as_api_error(error))


def as_api_error(error: InputError) -> ApiError:
    """The answer to an input that is refused."""
    if isinstance(error, FullError):
        return ApiError(429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers={"Retry-After": "1"})
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), "server_error", headers={"Retry-After": "5"})
    if isinstance(error, MissingError):
        return ApiError(404, str(error), param="session", code="not_found")
    if isinstance(error, BusyError):
        return ApiError(409, str(error), "conflict_error", param="session", code="conflict")
    return refusal(error)


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    what = {404: "there is no such route; the ones there are: /v1/completions, /v1/models, /v1/sessions/{id}, /health"}
    message = what.get(error.status_code, f"{request.method} is not for this route")
    return JSONResponse(ApiError(error.status_code, message, code="not_found").body, error.status_code, error.headers)


async def _answer_nobody(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)


async def _answer_defect(request: Request, error: Exception) -> Response:
    message = one_line(f"{type(error).__name__}: {error}", 300)
    print(f"error: {request.method} {route_of(request.url.path)}: {message}", file=sys.stderr)
    return JSONResponse(ApiError(500, "a defect of the server, which its log names", "server_error").body, 500)
