"""kmixer track: the curves of runs in somebody else's tracker."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from kmixer.cli.options import TrackOut
from kmixer.errors import InputError
from kmixer.experiments.sweep import SWEEP, runs_by_arm
from kmixer.files import is_regular_file, plain_text
from kmixer.interop.tracking.following import Following, check_names
from kmixer.interop.tracking.tracker import check_libraries, open_trackers
from kmixer.runs.run_folder import RunFolder

SECONDS_BETWEEN_LOOKS = 2.0


def track(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders and sweeps.")],
    to: Annotated[str, typer.Option(metavar="LIBRARY,...", help="tensorboard, trackio or wandb.")],
    out: TrackOut = Path("tracking"),
    follow: Annotated[bool, typer.Option("--follow", help="Go on until every run has ended; Ctrl-C stops.")] = False,
) -> None:
    """Show what runs have recorded, in a tracker: a copy, made anew every time; metrics.jsonl stays the record.

    Example: kmixer track runs/shakespeare-quick-seed42 --to tensorboard
    """
    libraries = check_libraries(names_in(to))
    if not libraries:
        raise InputError("--to: got no library; allowed: tensorboard, trackio, wandb")
    paths = [path for _, paths in runs_by_arm(runs) for path in paths]
    check_names([name_of(path) for path in paths])
    followed = [Following(RunFolder(path), name_of(path), open_trackers(libraries, out, warn)) for path in paths]
    try:
        while len([run for run in followed if run.look()]) < len(followed) and follow:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        pass
    finally:
        for run in followed:
            run.end()
    shown = [run.name for run in followed if run.begun]
    print(f"{len(shown)} of {len(followed)} runs shown in {', '.join(libraries)}, below {out}: {', '.join(shown)}")


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
