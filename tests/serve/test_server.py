"""The server as its clients meet it: the openai package, sockets that behave and that do not, signals."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import kmixer
from kmixer.measure.surprise import Surprise
from tests.serve import conftest
from tests.serve.conftest import NAME, Server, serving

openai = pytest.importorskip("openai", reason="the openai package is not installed")

PROMPT = "KING RICHARD:\nNow is the winter of our discontent"
ASKED: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "temperature": 0.8, "max_tokens": 30}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def client_of(server: Server, **settings: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": "none", "max_retries": 0, **settings})


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return client_of(server)


def answer(server: Server, path: str, body: bytes | None = None, method: str | None = None, **headers: str) -> Any:
    """Code, headers and body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, body, named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as given:
            return given.status, given.headers, given.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def post(server: Server, path: str, method: str | None = None, **body: Any) -> Any:
    code, _, content = answer(server, path, json.dumps(body).encode(), method, Content_Type="application/json")
    return code, json.loads(content)


def health(server: Server) -> dict[str, Any]:
    return json.loads(answer(server, "/health")[2])  # type: ignore[no-any-return]


def wait_until(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_completions_streamed_and_whole_are_the_models(client: Any, model: kmixer.LanguageModel) -> None:
    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "kmixer"
    whole = client.completions.create(**ASKED, seed=7)
    assert PROMPT + whole.choices[0].text == model.generate(PROMPT, 30, temperature=0.8, seed=7)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (len(PROMPT), 30, 79)
    assert whole.choices[0].finish_reason == "length"
    assert whole.system_fingerprint.startswith(f"kmixer-{kmixer.__version__}-")
    chunks = list(client.completions.create(**ASKED, seed=7, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    stopped = client.completions.create(**ASKED, seed=7, stop=[whole.choices[0].text[9:12]])
    assert stopped.choices[0].text == whole.choices[0].text[:9]
    assert stopped.choices[0].finish_reason == "stop"
    several = client.completions.create(**{**ASKED, "prompt": [PROMPT, "ROMEO:\n"]}, seed=7, n=2, echo=True)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == PROMPT + whole.choices[0].text
    by_tokens = client.completions.create(**{**ASKED, "prompt": model.tokenizer.encode(PROMPT).tolist()}, seed=7)
    assert by_tokens.choices[0].text == whole.choices[0].text


def test_log_probabilities_of_a_text_are_its_loss(client: Any, model: kmixer.LanguageModel) -> None:
    text = (PROMPT + "\nMade glorious summer by this sun of York;\n") * 12
    scored = client.completions.create(model=NAME, prompt=text, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert scored.text == text
    first, *rest = scored.logprobs.token_logprobs
    assert first is None
    assert model.tokenizer is not None
    nats = Surprise(model)(model.tokenizer.encode(text))[1:]
    assert -sum(rest) == pytest.approx(nats.sum(), rel=1e-5)
    assert scored.logprobs.tokens == list(text)
    assert scored.logprobs.text_offset == list(range(len(text)))


def test_errors_are_the_clients_exceptions(client: Any) -> None:
    cases = [
        (openai.BadRequestError, {"temperature": -1}, "temperature: got -1.0; allowed"),
        (openai.BadRequestError, {"prompt": "é"}, "prompt: the tokenizer does not know 'é'"),
        (openai.BadRequestError, {"prompt": ""}, "prompt: got no token"),
        (openai.BadRequestError, {"prompt": [65]}, "prompt: got token 65; allowed: 0 to 64"),
        (openai.BadRequestError, {"max_tokens": 5000}, "max_tokens: got 5000; allowed: 4096"),
        (openai.BadRequestError, {"n": 65}, "prompt: got 1 of n = 65; allowed: 1 to 64"),
        (openai.BadRequestError, {"extra_body": {"session": "a b"}}, "session: got 'a b'; allowed"),
        (openai.NotFoundError, {"model": "other"}, f"model: got 'other'; allowed: {NAME}"),
    ]
    for kind, more, message in cases:
        with pytest.raises(kind) as refused:
            client.completions.create(**{**ASKED, **more})
        assert refused.value.body["message"].startswith(message)
    with pytest.raises(openai.NotFoundError, match="these models have no chat template; use /v1/completions"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a"}])


def test_sixty_at_once_get_what_each_gets_alone(client: Any) -> None:
    def ask(seed: int) -> str:
        return str(client.completions.create(**ASKED, seed=seed).choices[0].text)

    seeds = [7 if index % 2 else index for index in range(60)]
    with ThreadPoolExecutor(60) as threads:
        texts = list(threads.map(ask, seeds))
    alone = {seed: ask(seed) for seed in {*seeds[:6], 7}}
    assert all(text == alone[seed] for seed, text in zip(seeds, texts, strict=True) if seed in alone)


def test_sessions_go_on_fork_travel_and_end(server: Server, client: Any) -> None:
    def say(name: str, prompt: str, **more: Any) -> Any:
        return client.completions.create(**{**ASKED, "prompt": prompt, "seed": 3, **more}, extra_body={"session": name})

    first = say("a", PROMPT)
    assert post(server, "/v1/sessions/a/fork", to="b")[0] == 201
    assert post(server, "/v1/sessions/a/fork", to="b")[0] == 409
    second = say("a", "\nAnd")
    assert second.usage.prompt_tokens == 4
    assert say("b", "\nAnd").choices[0].text == second.choices[0].text
    about = json.loads(answer(server, "/v1/sessions/a")[2])
    assert about["tokens"] == len(PROMPT) + 30 + 4 + 30
    code, headers, content = answer(server, "/v1/sessions/a/state")
    assert (code, headers["content-type"]) == (200, "application/octet-stream")
    stream = {"Content_Type": "application/octet-stream"}
    assert answer(server, "/v1/sessions/c/state", content, "PUT", **stream)[0] == 200
    assert say("c", "x").choices[0].text == say("a", "x").choices[0].text
    code, _, refused = answer(server, "/v1/sessions/c/state", content[:-9], "PUT", **stream)
    assert (code, json.loads(refused)["error"]["message"][:7]) == (400, "state: ")
    assert answer(server, "/v1/sessions/c", method="DELETE")[0] == 200
    assert answer(server, "/v1/sessions/c")[0] == 404
    whole = client.completions.create(**{**ASKED, "prompt": PROMPT + first.choices[0].text + "\nAnd"}, seed=3)
    assert whole.choices[0].text == second.choices[0].text
    with client.completions.create(**{**ASKED, "max_tokens": 4000}, stream=True, extra_body={"session": "b"}) as busy:
        next(iter(busy))
        with pytest.raises(openai.ConflictError):
            say("b", "x")
    wait_until(lambda: not json.loads(answer(server, "/v1/sessions/b")[2])["busy"], 5)


def test_a_client_that_leaves_frees_its_row(server: Server, client: Any) -> None:
    with client.completions.create(**{**ASKED, "max_tokens": 4000}, stream=True) as stream:
        next(iter(stream))
        assert health(server)["active"] == 1
    wait_until(lambda: health(server)["active"] == 0, 1)


def test_bodies_hosts_and_kinds_are_checked(server: Server) -> None:
    body = json.dumps(ASKED).encode()
    assert answer(server, "/v1/completions", body, Content_Type="text/plain")[0] == 415
    assert answer(server, "/v1/completions", body, Content_Type="application/json", Host="evil.example")[0] == 400
    assert answer(server, "/v1/completions", body, Content_Type="application/json", Host="localhost:1")[0] == 200
    assert answer(server, "/v1/completions", method="GET")[0] == 405
    assert answer(server, "/nowhere")[0] == 404
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    for how in (f"Content-Length: {2 << 20}\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n"):
        with socket.create_connection((host, int(port))) as sock, contextlib.suppress(ConnectionError):
            sock.settimeout(10)
            sock.sendall((head + how).encode())
            if how.startswith("T"):
                for _ in range(20):
                    sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 413"), "not before it is read to its end"


def test_clients_that_do_not_behave_harm_nobody(server: Server, client: Any) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**ASKED, "max_tokens": 3000, "stream": True}).encode()
    good = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    ways = [b"", b"\x16\x03\x01garbage\r\n\r\n", b"GET", good[:-5], good, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9000]
    expected = client.completions.create(**ASKED, seed=7).choices[0].text
    with contextlib.ExitStack() as stack:
        socks = []
        for index in range(60):
            sock = stack.enter_context(socket.create_connection((host, int(port))))
            with contextlib.suppress(ConnectionError):
                sock.sendall(ways[index % len(ways)])
            socks.append(sock)
            if index % 3 == 0:  # hangs up
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
        begun = time.monotonic()
        for _ in range(3):
            assert client.completions.create(**ASKED, seed=7).choices[0].text == expected
        assert time.monotonic() - begun < 20
    wait_until(lambda: health(server)["active"] == 0, 10)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_metrics_are_prometheus(server: Server, client: Any) -> None:
    client.completions.create(**ASKED)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=answer(server, "/metrics")[2], capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_metrics_count(server: Server, client: Any) -> None:
    def values() -> dict[str, float]:
        lines = answer(server, "/metrics")[2].decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    before = values()
    client.completions.create(**{**ASKED, "prompt": "MENENIUS:\n" * 30})
    client.completions.create(**{**ASKED, "prompt": "MENENIUS:\n" * 30})
    added = {name: value - before.get(name, 0.0) for name, value in values().items()}
    assert added["kmixer_generated_tokens_total"] == 60
    assert (
        added['kmixer_prompt_tokens_total{source="read"}'] + added['kmixer_prompt_tokens_total{source="cached"}'] == 600
    )
    assert added['kmixer_requests_total{code="200",route="/v1/completions"}'] == 2
    assert added["kmixer_first_token_seconds_count"] == 2
    assert {"kmixer_active_streams", "kmixer_waiting_requests", "kmixer_prefix_state_bytes", "kmixer_session_bytes",
            "kmixer_step_seconds_count", "kmixer_token_seconds_count"} <= added.keys()  # fmt: skip


def test_with_a_key_two_rows_and_a_short_line() -> None:
    origin = "https://one.example"
    with serving("--rows", "2", "--waiting", "2", "--cors", origin, KMIXER_API_KEY="sesame-123") as server:
        with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
            client_of(server, api_key="other").models.list()
        code, headers, _ = answer(server, "/metrics")
        assert (code, headers["www-authenticate"]) == (401, "Bearer")
        assert answer(server, "/health")[0] == 200
        preflight = {"Origin": origin, "Access_Control_Request_Method": "POST"}
        assert answer(server, "/v1/completions", method="OPTIONS", **preflight)[0] == 200
        assert (
            answer(server, "/v1/completions", method="OPTIONS", **{**preflight, "Origin": "https://x.example"})[0]
            == 400
        )
        client = client_of(server, api_key="sesame-123")
        full: list[str] = []

        def ask(seed: int, retrying: Any) -> str | None:
            try:
                return str(retrying.completions.create(**{**ASKED, "max_tokens": 1500}, seed=seed).choices[0].text)
            except openai.RateLimitError as error:
                full.append(error.response.headers["retry-after"])
                return None

        with ThreadPoolExecutor(12) as threads:
            texts = list(threads.map(lambda seed: ask(seed, client), range(12)))
        assert full
        assert {*full} == {"1"}
        assert len(full) + sum(text is not None for text in texts) == 12
        with ThreadPoolExecutor(8) as threads:
            patient = client_of(server, api_key="sesame-123", max_retries=20)
            texts = list(threads.map(lambda seed: ask(seed, patient), range(8)))
        assert all(texts), "8 of 8"
        # A stream that runs is ended whole when the server is told to stop.
        chunks: list[str] = []
        begun = threading.Event()

        def follow() -> None:
            for chunk in client.completions.create(**{**ASKED, "max_tokens": 3000}, stream=True, seed=1):
                chunks.append(chunk.choices[0].text)
                begun.set()

        reader = threading.Thread(target=follow)
        reader.start()
        assert begun.wait(20)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: health(server)["status"] == "stopping" or not reader.is_alive(), 5)
        if reader.is_alive():
            with pytest.raises(openai.InternalServerError, match="the server is stopping"):
                client.completions.create(**ASKED)
        assert server.process.wait(20) == 0
        reader.join(10)
        assert len("".join(chunks)) == 3000


def test_what_is_not_done_within_the_grace_is_told_so() -> None:
    with serving("--grace", "0.1", "--max-tokens", "1000000") as server:
        stream = client_of(server).completions.create(**{**ASKED, "max_tokens": 1_000_000}, stream=True)
        next(iter(stream))
        begun = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        assert server.process.wait(20) == 0
        assert time.monotonic() - begun < 10


def test_when_the_engine_dies_the_process_ends_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "import kmixer.serve.engine as e\ndef fail(self): raise RuntimeError('no more')\ne.Engine._write = fail\n"
    monkeypatch.setattr(conftest, "COMMAND", broken + conftest.COMMAND)
    with serving() as server:
        with pytest.raises(openai.InternalServerError, match="engine has failed: RuntimeError: no more"):
            client_of(server).completions.create(**ASKED)
        assert server.process.wait(20) == 1
