"""Folders that an export makes: whole or not at all, and in the place of nothing but an older export."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from kmixer.errors import InputError
from kmixer.files import describe_write_error


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `out` when the block ends without error.

    Raises InputError where that cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".exporting-") as temporary:
            new, old = Path(temporary) / "new", Path(temporary) / "old"
            new.mkdir()
            yield new
            if out.exists():
                out.rename(old)
            new.rename(out)
    except OSError as error:
        raise describe_write_error(error, out) from error


def check_free(out: Path, sign: str, names: Collection[str], *, force: bool) -> None:
    """Raises InputError where the export would destroy something: --force replaces an export and nothing else.

    Args:
        out: the folder to make.
        sign: the file by which an export is known.
        names: all that an export may hold.
    """
    if not out.exists():
        return
    held = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    if not held:
        return
    if sign not in held or held - {*names}:
        raise InputError(f"{out} exists and is not an export alone; choose another --out")
    if not force:
        raise InputError(f"{out} holds an export; add --force to replace it, or choose --out")
