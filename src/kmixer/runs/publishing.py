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
def hold(target: Path, *, to_read: bool = False) -> Iterator[None]:
    """Keep other processes away from a run, end what a killed one has left undone, and remove what is not published.

    Who only reads needs no right to write where the run lies: without it no process of theirs can change the run.
    Raises InputError where another process holds it.
    """
    if to_read and not os.access(target.parent, os.W_OK):
        yield
        return
    beside = target.with_name(f".{target.name}.lock")
    handle = lock(beside, target)
    try:
        recover(target)
        yield
    finally:
        try:
            _remove_staged(target)
        finally:
            unlock(beside, handle)


def stage(target: Path) -> Path:
    """A fresh hidden folder for a run that has still to prove that it works.

    Raises InputError where the run that is there could not be replaced.
    """
    _remove_staged(target)
    _check_replaceable(target)
    folder = _staged_folders(target)[0 if (target / RECIPE).is_file() else 1]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        raise describe_write_error(error, target) from error
    return folder


def _check_replaceable(target: Path) -> None:
    """Raises InputError where putting one file after another in its place could fail half-way."""
    checkpoints = target / CHECKPOINTS
    for changed in (target, checkpoints):
        if changed.is_dir() and not os.access(changed, os.W_OK):
            raise InputError(f"cannot write {changed}: Permission denied")
    for name in FILES:
        if (target / name).is_dir():
            raise InputError(f"{target / name} is a folder where a run has a file; move it away")
    if checkpoints.exists() and not checkpoints.is_dir():
        raise InputError(f"{checkpoints} is a file where a run has a folder; move it away")
    if checkpoints.is_dir() and checkpoints.stat().st_dev != target.stat().st_dev:
        raise InputError(f"{checkpoints} lies on another disk than the run, which cannot be replaced at once; move it")


def publish(folder: Path, target: Path) -> None:
    """Put a staged run in its place; a run that is there is replaced, and the user's files beside it stay."""
    try:
        if folder.parent != target:
            folder.rename(target)
            sync_folder(target.parent)
            return
        sync_folder(folder)
        folder.rename(target / PROVEN)
        sync_folder(target)
    except OSError as error:
        raise describe_write_error(error, target) from error
    _replace(target)


def recover(target: Path) -> None:
    """End the replacement that a killed process began, and remove what one staged. For who holds the run."""
    # Until it was changed, a replaced run was renamed, and a kill could leave it beside its place.
    before = target.with_name(f".{target.name}.old")
    if (before / RECIPE).is_file() and not target.exists():
        before.rename(target)
    _remove_staged(target)
    _replace(target)


def is_torn(target: Path) -> bool:
    """Whether a process was killed while it replaced the run, so that `recover` is called for."""
    return any((target / name).is_dir() for name in (PROVEN, MOVING)) or (
        not target.exists() and (target.with_name(f".{target.name}.old") / RECIPE).is_file()
    )


def _replace(target: Path) -> None:
    proven, moving = target / PROVEN, target / MOVING
    try:
        if proven.is_dir():
            for name in FILES:
                if not (proven / name).is_file():
                    (target / name).unlink(missing_ok=True)
            sync_folder(target)
            proven.rename(moving)
        if moving.is_dir():
            for name in FILES:
                if (moving / name).is_file():
                    (target / name).parent.mkdir(exist_ok=True)
                    (moving / name).replace(target / name)
            for changed in (target / CHECKPOINTS, target):
                if changed.is_dir():
                    sync_folder(changed)
            _remove(moving)
            with contextlib.suppress(OSError):  # it holds files of the user's, or the new run's checkpoint
                (target / CHECKPOINTS).rmdir()
    except OSError as error:
        raise describe_write_error(error, target) from error


def _staged_folders(target: Path) -> tuple[Path, Path]:
    """Where a run is staged: inside the run that it replaces, or beside its empty place."""
    return target / STAGED, target.with_name(f".{target.name}{STAGED}")


def _remove_staged(target: Path) -> None:
    for folder in _staged_folders(target):
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
