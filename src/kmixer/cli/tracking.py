"""How a training shows itself in trackers beside the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kmixer.cli.progress import TerminalReporter
from kmixer.experiments.sweep import SWEEP
from kmixer.files import is_regular_file, plain_text
from kmixer.interop.tracking.tracker import Trackers, open_trackers
from kmixer.runs.run_folder import RunFolder
from kmixer.training.task import Task


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


def names_in(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def name_of(run: Path) -> str:
    """The name of a run in trackers: its folder's, of a run of a sweep SWEEP/ARM/seed-S."""
    whole = run.resolve()
    parts = 3 if is_regular_file(whole.parent.parent / SWEEP) else 1
    return plain_text("/".join(whole.parts[-parts:]))
