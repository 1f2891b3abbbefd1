"""Writing files so that a reader never sees half of one, and reading what others may have written: strictly."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from kmixer.errors import InputError, one_line, shown

# Bounds on files that others may have written. The largest of ours: results.json of many runs, 0.2 MB; a vocabulary
# of byte pairs, a few MB; metrics.jsonl with the levels of many layers, 1 MB.
TOML_BYTES = 1 << 20
DOCUMENT_BYTES = 1 << 24
TOKENIZER_BYTES = 1 << 26
LINES_BYTES = 1 << 28
NESTING = 32
INTEGER_DIGITS = 40  # operations of a training run have 20
KEY_DOTS = 256
LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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


@contextlib.contextmanager
def open_to_read(path: Path, limit: int | None = None) -> Iterator[BufferedReader]:
    """A regular file, of at most `limit` bytes where one is given, open for reading.

    Raises InputError, one line, where it is missing, too large, or anything else: opening a FIFO would wait for ever
    and reading a device would not end.
    """
    try:
        # O_NONBLOCK: a FIFO without a writer opens at once, and is then refused.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode):
                raise InputError(f"{path} is {_kind_of(about.st_mode)}, not a regular file")
            if limit is not None and about.st_size > limit:
                raise InputError(f"{path} has {about.st_size:,} bytes; allowed: {limit:,} or fewer")
            yield file
    except OSError as error:
        raise describe_read_error(error, path) from None


def _kind_of(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def describe_read_error(error: OSError, path: Path) -> InputError:
    """One line for a failed read."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing")
    if error.errno == errno.ENAMETOOLONG:
        return InputError(f"cannot read {shown(str(path))}: the name is too long")
    if error.errno == errno.EISDIR:
        return InputError(f"{path} is a folder, not a regular file")
    return InputError(f"cannot read {path}: {error.strerror or error}")


def is_regular_file(path: Path) -> bool:
    """Whether a path names a regular file. Raises InputError where that cannot be known: a name too long, no right."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise _unusable(error, path) from None


def _unusable(error: OSError | ValueError, path: Path) -> InputError:
    return (
        describe_read_error(error, path) if isinstance(error, OSError) else InputError(f"{shown(str(path))}: {error}")
    )


def is_there(path: Path) -> bool:
    """Whether anything has this name, a link that leads nowhere too: what is not there is not the same as damaged."""
    return os.path.lexists(path)


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. Raises InputError, one line, where that fails."""
    with open_to_read(path, limit) as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # it grew after it was opened, or tells no size (as files of /proc)
        raise InputError(f"{path} has more than {limit:,} bytes, which are the most that are allowed")
    return content


def read_text(path: Path, limit: int = DOCUMENT_BYTES) -> str:
    """A UTF-8 file. Raises InputError, one line, where that fails."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (at byte {error.start:,})") from None


def read_json(path: Path, limit: int = DOCUMENT_BYTES) -> Any:
    """A JSON file. Raises InputError, one line, where that fails."""
    return parse_json(read_text(path, limit), str(path))


def read_json_object(path: Path, limit: int = DOCUMENT_BYTES) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InputError, one line, where that fails."""
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {_said(value)}, not a JSON object; restore it from a copy")
    return value


def read_json_lines(path: Path, limit: int = LINES_BYTES) -> list[dict[str, Any]]:
    """A file of JSON objects, one a line; a last line without its end is left out, as it is still being written.

    Raises InputError, one line that names the line, where that fails.
    """
    whole, _, _ = read_text(path, limit).rpartition("\n")
    lines = []
    for number, line in enumerate(whole.split("\n") if whole else (), start=1):
        value = parse_json(line, f"{path}, line {number}")
        if not isinstance(value, dict):
            raise InputError(f"{path}, line {number}: holds {_said(value)}, not a JSON object; restore it from a copy")
        lines.append(value)
    return lines


def parse_json(text: str, source: str) -> Any:
    """What a JSON text holds. Raises InputError, one line, for one that is none, is too deep, or has huge numbers."""
    try:
        value = json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{source} is not valid JSON (line {error.lineno}: {error.msg}); restore it from a copy"
        ) from None
    except ValueError as error:
        raise InputError(f"{source} is not valid JSON here ({error}); restore it from a copy") from None
    except RecursionError:
        raise InputError(_too_deep(source)) from None
    _check_depth(value, source)
    if LONE_SURROGATE.search(text):  # half a pair, which no UTF-8 can hold, or a whole one, which is a sign
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{source} is not valid JSON: it holds half a surrogate pair; restore it") from None
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file. Raises InputError, one line, where that fails."""
    return parse_toml(read_text(path, TOML_BYTES), str(path))


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """What a TOML text holds. Raises InputError, one line, for one that is none, is too deep, or has huge numbers."""
    try:
        return toml_values(text, source)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source} is not valid TOML: {one_line(str(error))}") from None


def toml_values(text: str, source: str) -> dict[str, Any]:
    """The same, but raises TOMLDecodeError for a text that is no TOML."""
    # A key of n parts costs tomllib n^2 steps.
    if any(part.count(".") > KEY_DOTS for part in re.split(r"[,=\n]", text)):
        raise InputError(f"{source}: more than {KEY_DOTS} dots in a row; keys and sentences have fewer")
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # of int(): Python reads no number of more than 4,300 digits
        raise InputError(f"{source} is not valid TOML here: it holds a number of too many digits") from None
    except RecursionError:
        raise InputError(_too_deep(source)) from None
    _check_depth(value, source)
    return value


def _integer(digits: str) -> int:
    if len(digits) > INTEGER_DIGITS:
        raise ValueError(f"it holds a number of {len(digits):,} digits; allowed: {INTEGER_DIGITS}")
    return int(digits)


def _check_depth(value: Any, source: str) -> None:
    """Raises InputError where lists and objects are nested more deeply than anything that kmixer writes."""
    level, depth = [value], 0
    while level:
        if depth > NESTING:
            raise InputError(_too_deep(source))
        parts = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [part for items in parts for part in items if isinstance(part, dict | list)]
        depth += 1


def _too_deep(source: str) -> str:
    return f"{source} is nested more than {NESTING} deep; restore it from a copy"


def _said(value: Any) -> str:
    return "a list" if isinstance(value, list) else shown(value, 40)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in constant memory. Raises InputError where it cannot be read."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_cache() -> Path:
    """The user's cache folder for kmixer: $XDG_CACHE_HOME/kmixer, or ~/.cache/kmixer.

    Raises InputError where there is neither.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else expand_user(Path("~/.cache"))) / "kmixer"


def expand_user(path: Path) -> Path:
    """The path with `~` or `~name` at its start replaced. Raises InputError where there is no such home folder."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise InputError(
            f"{path}: there is no home folder {path.parts[0]}; give the whole path, or set HOME (for the cache: "
            "XDG_CACHE_HOME)"
        ) from None


def plain_text(name: str) -> str:
    """A file name that UTF-8 can hold: bytes of it that are no UTF-8 are spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()


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
