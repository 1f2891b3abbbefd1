"""What every tracker offers, and how one is opened by its name; its library is imported then and not before."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from kmixer.errors import InputError, check_choice, one_line
from kmixer.interop.tracking.series import series_of

# The libraries, and what installs them.
LIBRARIES = {"tensorboard": "'kmixer[track]'", "trackio": "trackio", "wandb": "wandb"}


class Tracker(Protocol):
    """Where the curves of one run are shown.

    After `begin` it is given all that the run has recorded, from its first line, and leaves out what it has already.
    """

    def begin(self, name: str, config: Mapping[str, Any], step: int | None) -> None:
        """A run is shown under a name, with the values of its recipe by their keys.

        Args:
            name: parts of it may be separated by "/".
            config: the recipe.
            step: the last of the record, which a resumed run goes on from: what was shown of later steps is made
                again. None: nothing that was shown under this name is kept.
        """
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step by their series; several calls for one step have different series."""
        ...

    def end(self) -> None:
        """Everything is written."""
        ...


class Trackers:
    """Several trackers of one run, none of which can stop what it follows: one that fails is told of and left out.

    Args:
        trackers: by the name of the library.
        warn: is told in one line what failed.
    """

    def __init__(self, trackers: Mapping[str, Tracker], warn: Callable[[str], None]) -> None:
        self._trackers, self._warn = dict(trackers), warn

    def begin(self, name: str, config: Mapping[str, Any], step: int | None) -> None:
        self._call(lambda tracker: tracker.begin(name, config, step))

    def record(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        step, values = int(line["step"]), series_of(line)
        self._call(lambda tracker: tracker.log(step, values))

    def end(self) -> None:
        self._call(lambda tracker: tracker.end())

    def _call(self, action: Callable[[Tracker], None]) -> None:
        for library, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # whatever a foreign library raises
                del self._trackers[library]
                self._warn(one_line(f"tracking by {library} failed and ends here: {type(error).__name__}: {error}"))


def check_libraries(names: Iterable[str]) -> list[str]:
    """The names of libraries, each once. Raises InputError for one that is not known or not installed."""
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        check_choice("tracker", name, LIBRARIES)
        if importlib.util.find_spec(name) is None:
            raise InputError(f"tracking by {name} needs its library: pip install {LIBRARIES[name]}")
    return wanted


def open_trackers(names: Iterable[str], out: Path, warn: Callable[[str], None]) -> Trackers:
    """Trackers of one run by the names of their libraries, which write below a folder. Raises as `check_libraries`."""
    trackers: dict[str, Tracker] = {}
    for name in check_libraries(names):
        trackers[name] = importlib.import_module(f"kmixer.interop.tracking.{name}").open_tracker(out)
    return Trackers(trackers, warn)
