"""A run in one .tar.gz file, and back. Unpacking accepts a run's own files and nothing else.

The archive is read by the few lines below and not by `tarfile`, which believes what a header says: a name of a
gigabyte, a sparse file of ten terabytes. All is checked, in constant memory, before anything is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kmixer.errors import InputError, shown
from kmixer.files import (
    DOCUMENT_BYTES,
    LINES_BYTES,
    TOKENIZER_BYTES,
    TOML_BYTES,
    atomic_write,
    describe_write_error,
    is_there,
    open_to_read,
)
from kmixer.models.model_folder import CONFIG, TOKENIZER, WEIGHTS
from kmixer.runs.check import check_run
from kmixer.runs.recipe import AnyRecipe, LanguageRecipe
from kmixer.runs.run_folder import CHECKPOINT, FILES, METRICS, RECIPE, RunFolder

NEEDED = {RECIPE, CONFIG, WEIGHTS}

# Most bytes of a file of a run; of those not named here, DOCUMENT_BYTES.
TENSORS_BYTES = 1 << 36
BYTES = {
    RECIPE: TOML_BYTES,
    TOKENIZER: TOKENIZER_BYTES,
    METRICS: LINES_BYTES,
    WEIGHTS: TENSORS_BYTES,
    CHECKPOINT: TENSORS_BYTES,
}
ARCHIVE_BYTES = 1 << 37
# Weights hardly compress and text does by 10; what gzip makes of zeros is 1,000. The rest is for small archives.
RATIO, RATIO_FREE_BYTES = 100, 1 << 20
# An entry of tar: a header of one block, the content, zeros up to a whole block. Two blocks of zeros are the end.
BLOCK, READ_BYTES = 512, 1 << 16
# What pax adds to a header, times of a fraction of a second for example; names and sizes are not taken from there.
PAX_BYTES = 1 << 12
PAX_REFUSED = (b" path=", b" size=", b" linkpath=", b" GNU.sparse", b" hdrcharset=")


def _needed(recipe: AnyRecipe) -> set[str]:
    """The files without which a run is none: classifiers have no tokenizer."""
    return NEEDED | ({TOKENIZER} if isinstance(recipe, LanguageRecipe) else set())


def pack(run: Path, archive: Path, *, force: bool = False) -> None:
    """Write the files of a run into an archive.

    Raises InputError for a run that `unpack` would not take, a damaged one above all, and for one that is in use.
    """
    folder = RunFolder(run)
    if missing := [name for name in sorted(_needed(folder.read_recipe())) if not (run / name).is_file()]:
        raise InputError(f"{run} cannot be packed: {', '.join(missing)} is missing")
    if Path(os.path.realpath(archive)).is_relative_to(os.path.realpath(run)):
        raise InputError(f"{archive} lies inside the run; choose --out elsewhere")
    if archive.exists() and not force:
        raise InputError(f"{archive} exists; add --force to replace it, or choose --out")
    with folder.held(to_read=True):
        check_run(folder)
        with atomic_write(archive) as file, tarfile.open(fileobj=file, mode="w:gz", dereference=True) as tar:
            for name in FILES:
                path = run / name
                if is_there(path):
                    tar.add(path, arcname=name, recursive=False)


def unpack(archive: Path, run: Path) -> None:
    """Make a run folder from an archive.

    Raises:
        InputError: the archive cannot be read, is larger unpacked than any run, holds anything but the plain files of
            a run (a link, a path with `..`, a pickle), the run in it is damaged, or the folder holds something already.
    """
    target = RunFolder(run)
    target.check_free(force=False)
    with open_to_read(archive, ARCHIVE_BYTES) as file:
        names = [name for name, _ in _entries(archive, file)]
        if not set(names) >= NEEDED or len(set(names)) != len(names):
            raise InputError(f"{archive} is not a run archive: it needs {', '.join(sorted(NEEDED))}, each once")
        with _folder_beside(target.path) as beside, target.held():
            target.check_free(force=False)
            whole = RunFolder(beside / "run")
            for name, blocks in _entries(archive, file):
                with atomic_write(whole.path / name) as output:
                    for block in blocks:
                        output.write(block)
            try:
                missing = _needed(whole.read_recipe()) - set(names)
                if not missing:
                    check_run(whole)
            except InputError as error:
                inside = str(error).replace(str(whole.path), str(archive))
                raise InputError(f"{archive} holds a damaged run: {inside}") from None
            if missing:
                raise InputError(f"{archive} is not a run archive: {', '.join(sorted(missing))} is missing")
            _put(whole.path, target.path)


def _put(whole: Path, run: Path) -> None:
    """Move a folder to its place, which is free or an empty folder: the system refuses to replace anything else."""
    try:
        whole.rename(run)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise InputError(f"{run} was made by another process meanwhile; choose another --out") from None
        raise describe_write_error(error, run) from error


@contextlib.contextmanager
def _folder_beside(run: Path) -> Iterator[Path]:
    """A temporary folder on the disk of a run."""
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=run.parent, prefix=".unpacking-")
    except OSError as error:
        raise describe_write_error(error, run) from error
    with temporary as name:
        yield Path(name)


def _entries(archive: Path, file: BinaryIO) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Name and content of every file in an archive, from its beginning; content that is not asked for is skipped.

    Raises InputError for all that `unpack` refuses in an archive, and at its end where the checksum differs.
    """
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(0)
    stream = _Unzipped(file, RATIO * size + RATIO_FREE_BYTES)
    try:
        while any(header := stream.exactly(BLOCK)):
            entry = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            if entry.type == tarfile.XHDTYPE:
                _skip_pax(stream, entry.size)
                continue
            regular = entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
            if not regular or entry.name not in FILES:
                kind = "file" if regular else "link" if entry.islnk() or entry.issym() else "entry"
                raise InputError(f"it holds the {kind} {shown(entry.name)}, which no run has: refused")
            if not 0 <= entry.size <= (most := BYTES.get(entry.name, DOCUMENT_BYTES)):
                raise InputError(f"its {entry.name} has {entry.size:,} bytes; allowed: {most:,} or fewer")
            content = stream.pieces(entry.size)
            yield entry.name, content
            for _ in content:  # what was not asked for
                pass
            stream.exactly(-entry.size % BLOCK)
        while rest := stream.read(READ_BYTES):  # to the end, where the checksum is
            if any(rest):
                raise InputError("it goes on after its end: refused")
    except InputError as error:
        raise InputError(f"{archive}: {error}") from None
    except (tarfile.HeaderError, EOFError, zlib.error) as error:
        raise InputError(f"{archive} cannot be read as a run archive ({error})") from None


def _skip_pax(stream: _Unzipped, size: int) -> None:
    if not 0 <= size <= PAX_BYTES:
        raise InputError(f"it holds a header of {size:,} bytes; allowed: {PAX_BYTES:,} or fewer")
    header = stream.exactly(size)
    stream.exactly(-size % BLOCK)
    if any(key in header for key in PAX_REFUSED):
        raise InputError("it holds a header with a name or a size of its own, which no run has: refused")


class _Unzipped:
    """The content of a gzip file, in constant memory. Raises InputError past `allowed` bytes."""

    def __init__(self, file: BinaryIO, allowed: int) -> None:
        self.file, self.allowed, self.given = file, allowed, 0
        self.engine = zlib.decompressobj(wbits=31)  # gzip with its header, and its checksum at the end

    def read(self, count: int) -> bytes:
        """Some bytes, at most so many; none at the end."""
        while not self.engine.eof:
            data = self.engine.unconsumed_tail or self.file.read(READ_BYTES)
            piece = self.engine.decompress(data, count)
            if not data and not piece and not self.engine.eof:
                raise EOFError("it was cut short")
            self.given += len(piece)
            if self.given > self.allowed:
                raise InputError(f"it unpacks to more than {RATIO} times its size, as no run does: refused")
            if piece:
                return piece
        if self.engine.unused_data or self.file.read(1):
            raise InputError("it goes on after its end: refused")
        return b""

    def exactly(self, count: int) -> bytes:
        """So many bytes. Raises EOFError where there are fewer."""
        return b"".join(self.pieces(count))

    def pieces(self, count: int) -> Iterator[bytes]:
        """So many bytes in pieces. Raises EOFError where there are fewer."""
        while count:
            piece = self.read(min(count, READ_BYTES))
            if not piece:
                raise EOFError("it was cut short")
            count -= len(piece)
            yield piece
