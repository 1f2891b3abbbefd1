"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kmixer.serve.engine import Meter

# Seconds.
FIRST = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
TOKEN = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)


class Metrics(Meter):
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("kmixer_requests", "Requests.", ["route", "code"], registry=registry)
        prompts = Counter("kmixer_prompt_tokens", "Tokens of prompts, by source.", ["source"], registry=registry)
        self._read, self._cached = prompts.labels("read"), prompts.labels("cached")
        self._generated = Counter("kmixer_generated_tokens", "Tokens written.", registry=registry)
        self._first = Histogram(
            "kmixer_first_token_seconds",
            "From prompt to first token.",
            buckets=FIRST,
            registry=registry,
        )
        self._pace = Histogram("kmixer_token_seconds", "Of a token of one answer.", buckets=TOKEN, registry=registry)
        self._step = Histogram("kmixer_step_seconds", "Of a step of all rows.", buckets=TOKEN, registry=registry)

    def watch(self, values: dict[str, tuple[str, Callable[[], float]]]) -> None:
        """Gauges by name, each with what it says and a function that reads it."""
        for name, (about, value) in values.items():
            Gauge(name, about, registry=self._registry).set_function(value)

    def read(self, tokens: int, cached: int) -> None:
        self._read.inc(tokens)
        self._cached.inc(cached)

    def wrote(self, tokens: int) -> None:
        self._generated.inc(tokens)

    def first(self, seconds: float) -> None:
        self._first.observe(seconds)

    def pace(self, seconds: float) -> None:
        self._pace.observe(seconds)

    def step(self, seconds: float) -> None:
        self._step.observe(seconds)

    def text(self) -> bytes:
        """In the text format."""
        return generate_latest(self._registry)
