"""A run folder that trackers follow: what it has recorded, and what is added to it, until it has ended."""

from __future__ import annotations

from typing import Any

from kmixer.errors import InputError
from kmixer.interop.tracking.tracker import Trackers
from kmixer.runs.run_folder import RESULTS, RunFolder


class Following:
    """One run, from its first recorded line on.

    Args:
        run: its folder, which need not hold a run yet.
        name: under which it is shown.
        trackers: of this run alone.
    """

    def __init__(self, run: RunFolder, name: str, trackers: Trackers) -> None:
        self._run, self.name, self._trackers = run, name, trackers
        self._lines: list[dict[str, Any]] | None = None  # that were passed on; None before it has begun

    def look(self) -> bool:
        """Pass on what is new; whether the run has ended, by results or by diverging.

        A run that was resumed from a checkpoint makes steps again that were passed on: so it is shown.
        """
        if not self._run.exists():
            return False
        ended = (self._run.path / RESULTS).is_file() or self._run.diverged()  # asked before the last lines are read
        lines = self._run.read_metrics()
        before = self._lines or []
        if self._lines is None:
            self._begin(None)
        elif lines[: len(before)] != before:
            self._trackers.end()
            common = next(i for i, line in enumerate(before) if i == len(lines) or lines[i] != line)
            self._begin(int(before[common]["step"]) - 1 if common else None)
            before = []
        for line in lines[len(before) :]:
            self._trackers.record(line)
        self._lines = lines
        return ended

    def _begin(self, step: int | None) -> None:
        self._trackers.begin(self.name, self._run.read_recipe().by_key(), step)

    @property
    def begun(self) -> bool:
        """Whether there was anything to show."""
        return self._lines is not None

    def end(self) -> None:
        if self._lines is not None:
            self._trackers.end()


def check_names(names: list[str]) -> None:
    """Raises InputError where two runs would be shown as one."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"two runs are called {twice[0]}; track them one by one, each with an --out of its own")
