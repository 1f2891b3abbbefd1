"""How training shows itself: a live line on a terminal, plain lines elsewhere; and in trackers."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from kmixer.cli.track import name_of, names_in, warn
from kmixer.errors import one_line
from kmixer.experiments.sweep import SweepRun
from kmixer.interop.tracking.tracker import Trackers, open_trackers
from kmixer.runs.run_folder import RunFolder
from kmixer.training.task import Measured, Task
from kmixer.training.trainer import Reporter

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_SWEEP_LINES = 60.0
SECONDS_BETWEEN_LOOKS = 3.0


class TerminalReporter(Reporter):
    """Prints evaluations as lines, and progress as a live bar or as a line every ten seconds."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.bar = Progress(
            TextColumn("step {task.completed:>6.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=Console(highlight=False),
            transient=True,
            disable=not self.live,
        )
        self.task: TaskID | None = None
        self.steps, self.unit = 0, ""
        self.last_line = time.monotonic()

    def __enter__(self) -> TerminalReporter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def begun_from(self, source: Path, fresh: Sequence[str], changed: Sequence[str]) -> None:
        parts = [f"begins with the weights of {source}", f"fresh: {', '.join(by_layer(fresh)) or 'nothing'}", *changed]
        self._print(one_line("; ".join(parts)))

    def warned(self, line: str) -> None:
        warn(line)

    def started(self, task: Task, run: Path, parameters: int, step: int) -> None:
        config = task.recipe.training
        self.steps, self.unit = config.steps, task.unit
        self.task = self.bar.add_task("", total=config.steps, completed=step)
        *lines, last = task.describe()
        self._print(f"{task.recipe.name}: {parameters:,} parameters")
        for line in lines:
            self._print(line)
        self._print(
            f"{last}, {config.optimizer}, {config.precision}, seed {config.seed}; run folder {run}"
            + (f"; resuming after step {step}" if step else "")
        )

    def trained(self, step: int, loss: float, units_per_second: float, seconds_left: float) -> None:
        text = f"loss {loss:.3f}  {units_per_second:,.0f} {self.unit}/s  {_duration(seconds_left)} left"
        if self.live:
            assert self.task is not None
            self.bar.update(self.task, completed=step, description=text)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self._print(f"step {step:>6}/{self.steps}  {text}")

    def evaluated(self, step: int, measured: Sequence[Measured], is_best: bool) -> None:
        figures = "  ".join(f"validation {evaluation.summary()}" for evaluation in measured)
        self._print(f"step {step:>6}/{self.steps}  {figures}{'  best so far' if is_best else ''}")

    def _print(self, text: str) -> None:
        if self.live:
            self.bar.console.print(text, markup=False)
        else:
            print(text, flush=True)


class TrackingReporter(TerminalReporter):
    """Passes on what is recorded as well, of a run that is resumed from its first line on."""

    def __init__(self, trackers: Trackers, *, resume: bool) -> None:
        super().__init__()
        self.trackers, self.resume = trackers, resume
        self.begun = False

    def started(self, task: Task, run: Path, parameters: int, step: int) -> None:
        super().started(task, run, parameters, step)
        self.begun = True
        self.trackers.begin(name_of(run), task.recipe.by_key(), step if self.resume else None)
        for line in RunFolder(run).read_metrics() if self.resume else ():
            self.trackers.record(line)

    def recorded(self, line: dict[str, Any]) -> None:
        self.trackers.record(line)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self.begun:
            self.trackers.end()


def open_reporter(track: str | None, out: Path, *, resume: bool) -> TerminalReporter:
    """What `kmixer train` tells of itself with; `track` are names of libraries with commas between them.

    Raises InputError for a library that is not known or not installed.
    """
    if not (names := names_in(track or "")):
        return TerminalReporter()
    return TrackingReporter(open_trackers(names, out, warn), resume=resume)


def by_layer(names: Sequence[str]) -> list[str]:
    """Names of tensors, those that differ in the number of their layer alone as one: blocks.{2,5}.gate."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        before, layer, after = match.groups() if match else (name, "", "")
        layers.setdefault((before, after), []).append(layer)
    return [
        before + (numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}") + after
        for (before, after), numbers in layers.items()
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class SweepReporter:
    """How a sweep shows itself: a live bar per running run on a terminal, a line per minute elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.live = sys.stdout.isatty()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:>6.0f}/{task.total:.0f}"),
            console=Console(highlight=False),
            transient=True,
            disable=not self.live,
        )
        self.tasks: dict[str, TaskID] = {}
        self.began, self.steps_before = time.monotonic(), -1
        self.last_line = float("-inf")
        self.ended = -1

    def __enter__(self) -> SweepReporter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def report(self, runs: list[SweepRun]) -> None:
        ended = sum(run.status not in ("waiting", "running") for run in runs)
        # Looking reads the metrics of every run that has not ended, so it is not done twice a second.
        pause = SECONDS_BETWEEN_LOOKS if self.live else SECONDS_BETWEEN_SWEEP_LINES
        if ended == self.ended and time.monotonic() - self.last_line < pause:
            return
        self.ended, self.last_line = ended, time.monotonic()
        steps = {run.name: run.steps if run.status not in ("waiting", "running") else run.step() for run in runs}
        if self.live:
            self._draw(runs, steps, ended)
        else:
            running = ", ".join(f"{run.name} {steps[run.name]}/{run.steps}" for run in runs if run.status == "running")
            print(f"{self.folder}: {ended} of {len(runs)} runs ended; {self._left(runs, steps)}; {running}", flush=True)

    def _draw(self, runs: list[SweepRun], steps: dict[str, int], ended: int) -> None:
        if "" not in self.tasks:
            self.tasks[""] = self.bar.add_task("", total=sum(run.steps for run in runs))
        text = f"{ended} of {len(runs)} runs, {self._left(runs, steps)}"
        self.bar.update(self.tasks[""], completed=sum(steps.values()), description=text)
        for run in runs:
            if run.status == "running" and run.name not in self.tasks:
                self.tasks[run.name] = self.bar.add_task(run.name, total=run.steps)
            if run.name in self.tasks:
                self.bar.update(self.tasks[run.name], completed=steps[run.name], visible=run.status == "running")

    def _left(self, runs: list[SweepRun], steps: dict[str, int]) -> str:
        done = sum(steps.values())
        if self.steps_before < 0:
            self.steps_before = done
        made = done - self.steps_before
        if made == 0:
            return "time left not known yet"
        left = (sum(run.steps for run in runs) - done) * (time.monotonic() - self.began) / made
        return f"about {_duration(left)} left"
