"""A tracker that keeps what it is told, and a run to track."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kmixer.cli.progress import TrackingReporter
from kmixer.interop.tracking.series import series_of
from kmixer.interop.tracking.tracker import open_trackers
from kmixer.training.loop import train
from tests.training.test_loop import CrashError, make_recipe

Curves = dict[str, list[tuple[int, float]]]


class Recording:
    """What a tracker was told, call by call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, name: str, config: Mapping[str, Any], step: int | None) -> None:
        self.calls.append(("begin", name, dict(config), step))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("log", step, dict(values)))

    def end(self) -> None:
        self.calls.append(("end",))

    def logged(self) -> list[tuple[int, dict[str, float]]]:
        return [(call[1], call[2]) for call in self.calls if call[0] == "log"]


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curves_of(run: Path) -> Curves:
    """What the record says: (step, value) by series."""
    curves: Curves = {}
    for line in lines_of(run):
        for name, value in series_of(line).items():
            curves.setdefault(name, []).append((line["step"], value))
    return curves


class Crashing(TrackingReporter):
    """Dies after a step, as a killed process does: nobody tells the trackers."""

    crash: int

    def trained(self, step: int, loss: float, units_per_second: float, seconds_left: float) -> None:
        if step == self.crash:
            raise CrashError


def tracked_run(library: str, run: Path, corpus: Path, out: Path, *, crash: int | None = None) -> None:
    """A training that is tracked; with `crash`, one that dies after so many steps and is resumed."""
    recipe = make_recipe(corpus, log_every=1)
    if crash is not None:
        reporter = Crashing(open_trackers([library], out, pytest.fail), resume=False)
        reporter.crash = crash
        with pytest.raises(CrashError):
            train(recipe, run, reporter=reporter)
    with TrackingReporter(open_trackers([library], out, pytest.fail), resume=crash is not None) as reporter:
        train(recipe, run, reporter=reporter, resume=crash is not None)
