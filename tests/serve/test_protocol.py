"""Requests that are taken and refused, and answers in OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kmixer.data.tokenizers import ByteTokenizer
from kmixer.generation.sampling import Sampling
from kmixer.serve.jobs import Piece, PromptRead, Scored
from kmixer.serve.protocol import Answer, ApiError, CompletionRequest, parse_request

GOOD = {"model": "m", "prompt": "a"}


def parse(**more: Any) -> CompletionRequest:
    return parse_request(json.dumps({**GOOD, **more}).encode())


def test_what_is_left_out_has_openais_values() -> None:
    request = parse(seed=None, top_p=1, best_of=1, presence_penalty=0, suffix=None, logit_bias={}, user="me")
    assert request.max_tokens == 16
    assert request.sampling() == Sampling(1.0)
    assert request.stops() == ()
    assert parse(stop="x").stops() == ("x",)
    assert parse(seed=3, n=2).seeds() == (3, 4)
    assert parse(seed=2**63 - 1, n=2).seeds() == (2**63 - 1, 0)
    assert parse().seeds() != parse().seeds()
    for prompt, prompts in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])):
        assert parse(prompt=prompt).prompts() == prompts


REFUSED = [
    ({"foo": 1}, "foo", "'foo': this server has no such setting"),
    ({"prompt": None}, "prompt", "prompt: allowed"),
    ({"prompt": [-1]}, "prompt", "prompt: allowed"),
    ({"prompt": [1, "a"]}, "prompt", "prompt: allowed"),
    ({"model": 3}, "model", "model: got 3"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens: got -1"),
    ({"max_tokens": True}, "max_tokens", "max_tokens: got True"),
    ({"max_tokens": 1.5}, "max_tokens", "max_tokens: got 1.5"),
    ({"temperature": -1}, "temperature", "temperature: got -1.0; allowed"),
    ({"top_p": 0}, "top_p", "top_p: got 0.0; allowed"),
    ({"top_k": 0}, "top_k", "top_k: got 0; allowed"),
    ({"n": 0}, "n", "n: got 0"),
    ({"logprobs": 21}, "logprobs", "logprobs: got 21"),
    ({"stop": ["a"] * 5}, "stop", "stop: got"),
    ({"stop": ""}, "stop", "stop: got"),
    ({"stop": [""]}, "stop", "stop: got"),
    ({"seed": -1}, "seed", "seed: got -1"),
    ({"seed": 2**63}, "seed", "seed: got"),
    ({"best_of": 2}, "best_of", "best_of: got 2"),
    ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty: got 0.5"),
    ({"suffix": "x"}, "suffix", "suffix: these models"),
    ({"logit_bias": {"1": 2}}, "logit_bias", "logit_bias: got some"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options: goes with stream"),
    ({"stream_options": {"x": 1}, "stream": True}, "stream_options", None),
]


@pytest.mark.parametrize(("more", "param", "message"), REFUSED)
def test_what_is_not_understood_is_named(more: dict[str, Any], param: str, message: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        parse(**more)
    error = refused.value.body["error"]
    assert refused.value.status == 400
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert str(error["message"]).startswith(message or "")
    assert "\n" not in str(error["message"])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": NaN}', b'{"a":' * 5000])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse_request(body)
    assert refused.value.status == 400


def answer(**more: Any) -> Answer:
    return Answer("m", "f", ByteTokenizer(), parse(**more), ["ab"])


EVENTS = [
    Piece(0, "c", (Scored(99, 0, -0.5, ((99, -0.5), (7, -1.0))),)),
    Piece(1, "x"),
    Piece(0, "", (Scored(0xC3, 1, -2.0, ((65, -0.1),)),), "stop", 2),
    Piece(1, "y", (), "length", 2),
]


@pytest.mark.parametrize("echo", [False, True])
def test_the_chunks_of_a_stream_are_the_whole(echo: bool) -> None:
    settings = {"n": 2, "echo": echo, "logprobs": 1}
    first = PromptRead(2, 1, (Scored(97, 0, None), Scored(98, 1, -3.0, ((97, -0.1),))) if echo else ())
    whole = answer(**settings)
    for piece in (*whole.read(0, first), *EVENTS):
        whole.add(0, piece)
    expected = json.loads(whole.whole())
    streamed = answer(**settings, stream=True, stream_options={"include_usage": True})
    lines = "".join(streamed.chunk(0, piece) for piece in (*streamed.read(0, first), *EVENTS)) + streamed.end()
    parts = [line.removeprefix("data: ") for line in lines.split("\n\n")]
    assert parts[-2:] == ["[DONE]", ""]
    *chunks, usage = [json.loads(part) for part in parts[:-2]]
    assert usage["usage"] == expected["usage"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    for choice in expected["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [one for piece in mine for one in piece["logprobs"][key]] == choice["logprobs"][key]
    logprobs = expected["choices"][0]["logprobs"]
    before = 2 if echo else 0
    assert logprobs["tokens"][before:] == ["c", "<token 195>"]
    assert logprobs["text_offset"][before:] == [before, before + 1]
    assert logprobs["top_logprobs"][-1] == {"A": -0.1, "<token 195>": -2.0}
