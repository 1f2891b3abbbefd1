"""How a run takes its place: whole, by one process at a time, and without a touch to the user's own files.

A new run is written into a hidden folder. Where no run is at its place, the folder is renamed to it. Where one is, the
hidden folder lies inside it, and the files are put in the old ones' places one by one:

    .kmixer-new      the run is being made; the old one is whole
    .kmixer-ready    it has shown that it works; the old run's files that it does not have are removed
    .kmixer-moving   its files are moved to their places, each taking that of the old one at once

From the first renaming on, what is left of these steps is done by whoever holds the run next: a process may be killed
before and after every one of them. Files are named one by one, so none of the user's is ever moved or removed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kmixer.errors import InputError
from kmixer.files import describe_write_error, lock, sync_folder, unlock
from kmixer.runs.layout import CHECKPOINT, FILES, MOVING, PROVEN, RECIPE, STAGED, written_in_part

CHECKPOINTS = Path(CHECKPOINT).parent


@contextlib.contextmanager
def hold(place: Path, *, to_read: bool = False) -> Iterator[None]:
    """Keep other processes away from a run, end what a killed one has left undone, and remove what is not published.

    Who only reads needs no right to write where the run lies: without it no process of theirs can change the run.
    Raises InputError where another process holds it.
    """
    if to_read and not os.access(place.parent, os.W_OK):
        yield
        return
    beside = place.with_name(f".{place.name}.lock")
    handle = lock(beside, place)
    try:
        recover(place)
        yield
    finally:
        try:
            _remove_staged(place)
        finally:
            unlock(beside, handle)


def stage(place: Path) -> Path:
    """A fresh hidden folder for a run that has still to prove that it works.

    Raises InputError where the run that is there could not be replaced.
    """
    _remove_staged(place)
    _check_replaceable(place)
    folder = _staged_folders(place)[0 if (place / RECIPE).is_file() else 1]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        raise describe_write_error(error, place) from error
    return folder


def _check_replaceable(place: Path) -> None:
    """Raises InputError where putting one file after another in its place could fail half-way."""
    checkpoints = place / CHECKPOINTS
    for changed in (place, checkpoints):
        if changed.is_dir() and not os.access(changed, os.W_OK):
            raise InputError(f"cannot write {changed}: Permission denied")
    for name in FILES:
        if (place / name).is_dir():
            raise InputError(f"{place / name} is a folder where a run has a file; move it away")
    if checkpoints.exists() and not checkpoints.is_dir():
        raise InputError(f"{checkpoints} is a file where a run has a folder; move it away")
    if checkpoints.is_dir() and checkpoints.stat().st_dev != place.stat().st_dev:
        raise InputError(f"{checkpoints} lies on another disk than the run, which cannot be replaced at once; move it")


def publish(folder: Path, place: Path) -> None:
    """Put a staged run in its place; a run that is there is replaced, and the user's files beside it stay."""
    try:
        if folder.parent != place:
            folder.rename(place)
            sync_folder(place.parent)
            return
        sync_folder(folder)
        folder.rename(place / PROVEN)
        sync_folder(place)
    except OSError as error:
        raise describe_write_error(error, place) from error
    _replace(place)


def recover(place: Path) -> None:
    """End the replacement that a killed process began, and remove what one staged. For who holds the run."""
    # Until it was changed, a replaced run was renamed, and a kill could leave it beside its place.
    before = place.with_name(f".{place.name}.old")
    if (before / RECIPE).is_file() and not place.exists():
        before.rename(place)
    _remove_staged(place)
    _replace(place)


def is_torn(place: Path) -> bool:
    """Whether a process was killed while it replaced the run, so that `recover` is called for."""
    return any((place / name).is_dir() for name in (PROVEN, MOVING)) or (
        not place.exists() and (place.with_name(f".{place.name}.old") / RECIPE).is_file()
    )


def _replace(place: Path) -> None:
    proven, moving = place / PROVEN, place / MOVING
    try:
        if proven.is_dir():
            for name in FILES:
                if not (proven / name).is_file():
                    (place / name).unlink(missing_ok=True)
            sync_folder(place)
            proven.rename(moving)
        if moving.is_dir():
            for name in FILES:
                if (moving / name).is_file():
                    (place / name).parent.mkdir(exist_ok=True)
                    (moving / name).replace(place / name)
            for changed in (place / CHECKPOINTS, place):
                if changed.is_dir():
                    sync_folder(changed)
            _remove(moving)
            with contextlib.suppress(OSError):  # it holds files of the user's, or the new run's checkpoint
                (place / CHECKPOINTS).rmdir()
    except OSError as error:
        raise describe_write_error(error, place) from error


def _staged_folders(place: Path) -> tuple[Path, Path]:
    """Where a run is staged: inside the run that it replaces, or beside its empty place."""
    return place / STAGED, place.with_name(f".{place.name}{STAGED}")


def _remove_staged(place: Path) -> None:
    for folder in _staged_folders(place):
        if folder.is_dir():
            try:
                _remove(folder)
            except OSError as error:
                raise describe_write_error(error, folder) from error


def _remove(folder: Path) -> None:
    """Remove a hidden folder and a run's own files in it."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for path in written_in_part(folder):
        path.unlink(missing_ok=True)
    if (folder / CHECKPOINTS).is_dir():
        (folder / CHECKPOINTS).rmdir()
    folder.rmdir()
