"""Requests and answers of OpenAI's completions, as this server takes and gives them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError, one_line, shown
from kmixer.generation.sampling import Sampling
from kmixer.serve.jobs import Piece, PromptRead, Scored

SEEDS = 1 << 63
STOPS, LIKELIEST = 4, 20
Count = Annotated[int, Field(ge=0)]
Tokens = list[Count]


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": one_line(message), "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of a request. What these models have no use for may be given where it changes nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    model: str
    prompt: str | list[str] | Tokens | list[Tokens]
    max_tokens: Count | None = 16
    temperature: float | None = 1.0
    top_p: float | None = None
    top_k: int | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=LIKELIEST)] | None = None
    echo: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    session: str | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    suffix: str | None = None
    logit_bias: dict[str, float] | None = None

    def sampling(self) -> Sampling:
        """How tokens are drawn. Raises InputError for settings out of range."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature, self.top_k, None if self.top_p == 1 else self.top_p)

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def seeds(self) -> tuple[int, ...]:
        """One of every choice: the first is the seed itself."""
        first = secrets.randbits(63) if self.seed is None else self.seed
        return tuple((first + index) % SEEDS for index in range(self.n or 1))

    def prompts(self) -> list[str | Tokens]:
        """One or more."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


def parse_request(body: bytes) -> CompletionRequest:
    """Raises ApiError, 400, that names what is wrong and where."""
    try:
        request = CompletionRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _refused(error) from None
    for name, neutral in (("best_of", 1), ("presence_penalty", 0), ("frequency_penalty", 0)):
        if (given := getattr(request, name)) not in (None, neutral):
            raise ApiError(400, f"{name}: got {shown(given)}; allowed: {neutral}; leave it out", param=name)
    if request.suffix:
        raise ApiError(400, "suffix: these models write what follows alone; leave it out", param="suffix")
    if request.logit_bias:
        raise ApiError(400, "logit_bias: got some; allowed: none; leave it out", param="logit_bias")
    if len(request.stops()) > STOPS or not all(request.stops()):
        raise ApiError(400, f"stop: got {shown(request.stop)}; allowed: up to {STOPS} texts, none empty", param="stop")
    if request.seed is not None and not 0 <= request.seed < SEEDS:
        raise ApiError(400, f"seed: got {request.seed}; allowed: 0 to 2^63 - 1", param="seed")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: goes with stream; leave it out", param="stream_options")
    try:
        request.sampling()
    except InputError as error:
        raise refusal(error) from None
    return request


def refusal(error: InputError) -> ApiError:
    """400 for a message of ours, which begins with the setting that it is about."""
    message = str(error)
    name = message.partition(":")[0]
    return ApiError(400, message, param=name if name in CompletionRequest.model_fields else None)


def _refused(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    if not path:
        return ApiError(400, f"body: {one_line(first['msg'], 200)}; give a JSON object")
    name = path[0]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{shown(name)}: this server has no such setting; leave it out", param=name[:100])
    if first["type"] == "missing":
        return ApiError(400, f"{name}: is missing; give it", param=name)
    if name == "prompt":
        return ApiError(400, "prompt: allowed: a text, texts, a list of tokens, or lists of tokens", param=name)
    return ApiError(
        400, f"{name}: got {shown(first['input'])}; {first['msg'][:1].lower()}{first['msg'][1:]}", param=name
    )


@dataclass
class Answer:
    """What a request is answered: its choices so far, as a whole or in chunks."""

    model: str
    fingerprint: str
    tokenizer: Tokenizer
    request: CompletionRequest
    texts: Sequence[str]  # of the prompts
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        count = len(self.texts) * (self.request.n or 1)
        self._pieces: list[list[str]] = [[] for _ in range(count)]
        self._scored: list[list[Scored]] = [[] for _ in range(count)]
        self._finish: list[str | None] = [None] * count
        self._begun = [False] * count  # with the prompt, where it is echoed
        shared = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        self._shared = json.dumps(shared)[:-1]

    def read(self, prompt: int, event: PromptRead) -> list[Piece]:
        """A prompt was read: what its choices begin with where it is echoed."""
        self.prompt_tokens += event.tokens
        self.cached_tokens += event.cached
        if not self.request.echo:
            return []
        return [Piece(index, self.texts[prompt], event.scored) for index in range(self.request.n or 1)]

    def add(self, prompt: int, piece: Piece) -> None:
        """Keep a piece of a choice for `whole`."""
        index = self._index(prompt, piece)
        self._pieces[index].append(piece.text)
        self._scored[index] += self._moved(prompt, piece)
        self._finish[index] = piece.finish or self._finish[index]
        self.completion_tokens += piece.tokens

    def whole(self) -> bytes:
        """The answer to a request without streaming."""
        choices = [
            {
                "index": index,
                "text": "".join(self._pieces[index]),
                "logprobs": self._logprobs(self._scored[index]),
                "finish_reason": self._finish[index],
            }
            for index in range(len(self._pieces))
        ]
        return f'{self._shared}, "choices": {json.dumps(choices)}, "usage": {json.dumps(self.usage())}}}'.encode()

    def chunk(self, prompt: int, piece: Piece) -> str:
        """A piece of a choice as a line of a stream."""
        self.completion_tokens += piece.tokens
        finish = "null" if piece.finish is None else f'"{piece.finish}"'
        scored = self._moved(prompt, piece)
        logprobs = json.dumps(self._logprobs(scored)) if self.request.logprobs is not None else "null"
        usage = ', "usage": null' if self._tells_usage() else ""
        return (
            f'data: {self._shared}, "choices": [{{"index": {self._index(prompt, piece)}, "text": '
            f'{json.dumps(piece.text)}, "logprobs": {logprobs}, "finish_reason": {finish}}}]{usage}}}\n\n'
        )

    def end(self) -> str:
        """The last lines of a stream."""
        usage = f'data: {self._shared}, "choices": [], "usage": {json.dumps(self.usage())}}}\n\n'
        return f"{usage if self._tells_usage() else ''}data: [DONE]\n\n"

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def _tells_usage(self) -> bool:
        return self.request.stream_options is not None and self.request.stream_options.include_usage

    def _index(self, prompt: int, piece: Piece) -> int:
        return prompt * (self.request.n or 1) + piece.choice

    def _moved(self, prompt: int, piece: Piece) -> list[Scored]:
        """With offsets in the text of the choice, which may begin with the prompt."""
        shift = len(self.texts[prompt]) if self.request.echo and self._begun[self._index(prompt, piece)] else 0
        self._begun[self._index(prompt, piece)] = True
        return [replace(one, offset=one.offset + shift) for one in piece.scored] if shift else list(piece.scored)

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if self.request.logprobs is None:
            return None
        tops = [None if one.logprob is None else self._top(one) for one in scored]
        return {
            "tokens": [self._name(one.token) for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": tops if self.request.logprobs else None,
            "text_offset": [one.offset for one in scored],
        }

    def _top(self, one: Scored) -> dict[str, float | None]:
        return {self._name(token): logprob for token, logprob in one.top} | {self._name(one.token): one.logprob}

    def _name(self, token: int) -> str:
        """A token's text; its number where it is a part of a character."""
        text = self.tokenizer.decode([token])
        return f"<token {token}>" if "\ufffd" in text else text
