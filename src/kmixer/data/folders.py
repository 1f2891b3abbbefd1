"""Which files of a folder are its text."""

from __future__ import annotations

import errno
from fnmatch import fnmatchcase
from pathlib import Path

from kmixer.errors import InputError

TEXT_SUFFIXES = {".md", ".txt"}
RECORD_SUFFIXES = {".csv", ".jsonl", ".ndjson", ".tsv"}  # with a field


def text_files(folder: Path, pattern: str | None = None, *, records: bool = False) -> list[Path]:
    """The files of a folder and the folders below it, in order: endings in either case, linked folders too.

    Hidden files and folders are left out, and what is reached twice, through a link, counts once. A pattern such as
    "*.py" takes the place of the endings: of the name, or of the path below the folder where it has a slash.

    Raises InputError where there are none.
    """
    suffixes = RECORD_SUFFIXES if records else TEXT_SUFFIXES

    def chosen(path: Path) -> bool:
        if pattern is None:
            return path.suffix.lower() in suffixes
        name = path.relative_to(folder).as_posix() if "/" in pattern else path.name
        return fnmatchcase(name.lower(), pattern.lower())

    files = sorted(path for path in _walk(folder) if chosen(path))
    if not files:
        what = f"files that match {pattern}" if pattern else f"{' or '.join(sorted(suffixes))} files"
        more = "" if pattern else '; data.files = "*.py", say, takes others'
        raise InputError(f"corpus {folder}: the folder holds no {what}{more}")
    return files


def _walk(folder: Path) -> list[Path]:
    """Every regular file that is not hidden, once; what lies there itself comes before what a link leads to."""
    files: list[Path] = []
    links = [folder]
    seen: set[tuple[int, int]] = set()
    while links:
        pending, links = links, []
        while pending:
            path = pending.pop()
            try:
                status = path.stat()
                identity = status.st_dev, status.st_ino
                if identity in seen:
                    continue
                if path.is_file():
                    seen.add(identity)
                    files.append(path)
                elif path.is_dir():
                    seen.add(identity)
                    inside = sorted(item for item in path.iterdir() if not item.name.startswith("."))
                    links += [item for item in inside if item.is_symlink()]
                    pending += [item for item in reversed(inside) if not item.is_symlink()]
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP):  # a link to nothing or to itself, or a file just gone
                    continue
                raise InputError(f"cannot read {path}: {error.strerror}") from None
    return files
