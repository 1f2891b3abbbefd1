"""Engines and servers for tests: in this process where that will do, else as a process of their own."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import kmixer
from kmixer.generation.sampling import Sampling

pytest.importorskip("starlette", reason="kmixer[serve] is not installed")
pytest.importorskip("prometheus_client", reason="kmixer[serve] is not installed")

from kmixer.serve.engine import Engine
from kmixer.serve.jobs import Ended, Event, Job, Piece, PromptRead, Scored

NAME = "shakespeare-small"
COMMAND = "import sys; from kmixer.cli.main import run; sys.exit(run(sys.argv[1:]))"


@pytest.fixture(scope="session")
def model() -> kmixer.LanguageModel:
    return kmixer.load(NAME)


@pytest.fixture(scope="session")
def copying() -> kmixer.LanguageModel:
    return kmixer.load(f"{NAME}-copy")


@dataclass
class Asked:
    """A job and what has come of it."""

    job: Job
    events: queue.Queue[Event]
    seen: list[Event] = field(default_factory=list)

    def wait(self, seconds: float = 60.0) -> Asked:
        while not (self.seen and isinstance(self.seen[-1], Ended)):
            self.seen.append(self.events.get(timeout=seconds))
        return self

    @property
    def pieces(self) -> list[Piece]:
        return [event for event in self.seen if isinstance(event, Piece)]

    @property
    def texts(self) -> list[str]:
        return ["".join(p.text for p in self.pieces if p.choice == index) for index in range(len(self.job.seeds))]

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def scored(self) -> list[Scored]:
        return [one for piece in self.pieces for one in piece.scored]

    @property
    def read(self) -> PromptRead:
        assert isinstance(self.seen[0], PromptRead)
        return self.seen[0]

    @property
    def ended(self) -> Ended:
        assert isinstance(self.seen[-1], Ended)
        return self.seen[-1]


Ask = Callable[..., Asked]


@contextlib.contextmanager
def running(model: kmixer.LanguageModel, **settings: Any) -> Iterator[tuple[Engine, Ask]]:
    """An engine, and a function that asks it and does not wait."""
    assert model.tokenizer is not None
    engine = Engine(model, model.tokenizer, **settings)

    def ask(prompt: str | tuple[int, ...], tokens: int = 20, seed: int = 7, **more: Any) -> Asked:
        assert model.tokenizer is not None
        given = tuple(model.tokenizer.encode(prompt).tolist()) if isinstance(prompt, str) else prompt
        events: queue.Queue[Event] = queue.Queue()
        sampling = more.pop("sampling", Sampling(0.8))
        seeds = more.pop("seeds", (seed,))
        job = Job(given, tokens, sampling, seeds, events.put, **more)
        engine.submit(job)
        return Asked(job, events)

    engine.start()
    try:
        yield engine, ask
    finally:
        engine.stop()


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def end(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextlib.contextmanager
def serving(*arguments: str, model: str = NAME, **environment: str) -> Iterator[Server]:
    """`kmixer serve` on a free port."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", model, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http://" in line, "the server did not start"
        yield Server(process, line.split(" at ")[1].split(" (")[0])
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
