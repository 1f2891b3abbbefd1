"""Timing counts what it says; ratios are of calls timed in the same round."""

from __future__ import annotations

import pytest

from kmixer.bench.measure import Roofs, Timing, peak_of, time_calls, time_in_turn

CLOCK = "kmixer.bench.measure.time.perf_counter"


def test_the_first_call_is_not_in_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seconds = [0.0], iter([100.0, 1.0, 9.0, 2.0])

    def call() -> None:
        clock[0] += next(seconds)

    monkeypatch.setattr(CLOCK, lambda: clock[0])
    assert time_calls(call, repeats=3) == Timing(first=100.0, median=2.0)


def test_a_call_that_takes_too_long_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def call() -> None:
        calls.append(1)
        clock[0] += 5.0

    monkeypatch.setattr(CLOCK, lambda: clock[0])
    assert time_calls(call, repeats=3, longest=4.0) == Timing(5.0, 5.0)
    assert len(calls) == 1


def test_ratios_are_those_of_calls_timed_in_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down tenfold from round to round, and a second call that takes three times as long."""
    clock, speed, order = [0.0], [1.0], []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        clock[0] += seconds * speed[0]
        if name == "second":
            speed[0] *= 10

    monkeypatch.setattr(CLOCK, lambda: clock[0])
    found = time_in_turn({"first": lambda: call("first", 2.0), "second": lambda: call("second", 6.0)}, 3)
    assert order == ["first", "second"] * 4  # the first round is not counted
    assert found["first"]["relative"] == 1.0
    assert found["second"]["relative"] == pytest.approx(3.0)
    assert found["first"]["seconds"] == pytest.approx(200.0)


def test_a_roof_is_that_of_its_precision() -> None:
    roofs = Roofs(1, 2.0, 3.0, 4.0)
    assert (roofs.matmul("float32"), roofs.matmul("bfloat16")) == (2.0, 3.0)


def test_a_peak_is_measured_in_a_process_of_its_own() -> None:
    assert peak_of("import sys; print(int(sys.argv[1]) + int(sys.argv[2]))", "3", "4") == 7
