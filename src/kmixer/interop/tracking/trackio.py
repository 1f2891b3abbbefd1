"""trackio: a database below OUT/trackio; `TRACKIO_DIR=OUT/trackio trackio show` shows it."""

from __future__ import annotations

import contextlib
import contextvars
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = "kmixer"
# What its database has beside the values of a step.
OWN = ("step", "timestamp")


class Trackio:
    """A `Tracker`. What is in the database already is not sent again: trackio would keep both."""

    def begin(self, name: str, config: Mapping[str, Any], step: int | None) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self._stored: set[tuple[int, str]] = set()
        with _quiet():
            there = SQLiteStorage.get_project_db_path(PROJECT).exists()
            if step is None and there:
                for run in trackio.Api().runs(PROJECT):
                    if run.name == name:
                        run.delete()
            elif there:
                for row in SQLiteStorage.get_logs(PROJECT, run=name):
                    self._stored |= {(row["step"], key) for key in row if key not in OWN}
            # In a context of its own a run does not end the one that was begun before it.
            self._run = contextvars.copy_context().run(
                trackio.init,
                project=PROJECT,
                name=name,
                config=dict(config),
                resume="never" if step is None else "allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        new = {key: value for key, value in values.items() if (step, key) not in self._stored}
        if new:
            self._run.log(new, step=step)

    def end(self) -> None:
        with _quiet():
            self._run.finish()


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Without what trackio prints of itself among the lines of a training."""
    return contextlib.redirect_stdout(io.StringIO())


def open_tracker(out: Path) -> Trackio:
    os.environ.setdefault("TRACKIO_DIR", str((out / "trackio").absolute()))  # read when it is imported
    return Trackio()
