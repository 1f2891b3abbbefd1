"""Writing files so that a reader never sees half of one, and reading them with one-line errors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kmixer.errors import InputError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path`, durably and at once, when the block ends without error.

    Raises InputError where the disk is full or the folder cannot be written; `path` is then as before.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise describe_write_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def describe_write_error(error: OSError, path: Path) -> InputError:
    """One line for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"no space left on the disk for {path}; free some, or choose another folder")
    return InputError(f"cannot write {path}: {error.strerror or error}")


def lock(path: Path, what: Path) -> int:
    """Hold a file, made where it is not there, until the handle that is returned is closed or given to `unlock`.

    Raises InputError where another process holds it: that `what` is in use.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise describe_write_error(error, path) from error
        try:
            import fcntl
        except ImportError:  # Windows has no such locks
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between our opening and our holding it, its last holder may have removed it: then it keeps nobody out.
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise InputError(f"{what} is being run by another process; wait for it or stop it") from None
        except FileNotFoundError:
            pass
        os.close(handle)


def unlock(path: Path, handle: int) -> None:
    """Give up a file that is held, and remove it."""
    try:
        path.unlink(missing_ok=True)  # while it is held: afterwards it may be another's
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises InputError, one line, where that fails."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises InputError, one line, where that fails."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not valid JSON (line {error.lineno}: {error.msg}); restore it from a copy"
        ) from None


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> Path:
    """The user's cache folder for kmixer: $XDG_CACHE_HOME/kmixer, or ~/.cache/kmixer."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kmixer"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make what was renamed, made or removed in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
