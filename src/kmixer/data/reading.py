"""What a text file holds: UTF-8, raw bytes, or one field of JSON lines or of a table, read in constant memory."""

from __future__ import annotations

import codecs
import contextlib
import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from kmixer.errors import InputError
from kmixer.files import expand_user

Encoding = Literal["utf-8", "bytes"]
Block = str | bytes  # bytes where the encoding is "bytes"

READ_BYTES = 1 << 20
STREAM_BYTES = 1 << 16  # of a text that is worked on while it is read
BYTE_ORDER_MARK = "\ufeff"
TABLES = {".csv": ",", ".tsv": "\t"}
LONGEST_RECORD = 1 << 26  # characters of a line of JSON or a row of a table


def read_blocks(path: Path, encoding: Encoding = "utf-8", field: str | None = None) -> Iterator[Block]:
    """A file in blocks of a megabyte at most: text, bytes, or the texts of one field, a line each.

    A byte order mark at the start of text is left out. Raises InputError naming the file and the place where it
    cannot be read so.
    """
    try:
        with path.open("rb") as file:
            if encoding == "bytes":
                yield from raw_blocks(file, READ_BYTES)
            elif field is None:
                yield from decode_blocks(file, str(path), READ_BYTES)
            elif path.suffix.lower() in TABLES:
                yield from _column(decode_blocks(file, str(path), READ_BYTES), field, path)
            else:
                yield from _json_field(decode_blocks(file, str(path), READ_BYTES), field, path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def decode_blocks(file: BinaryIO, name: str, size: int) -> Iterator[str]:
    """The text of a binary file in blocks of so many bytes at most, each as soon as the file gives it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, first = 0, True
    for block in itertools.chain(raw_blocks(file, size), [b""]):
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name} is not UTF-8 text at byte {offset - held + error.start}; convert it first, for example with "
                'iconv, or train on its bytes: tokenizer.kind = "byte" and data.encoding = "bytes"'
            ) from None
        offset += len(block)
        if first and text:
            text, first = text.removeprefix(BYTE_ORDER_MARK), False
        if text:
            yield text


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """The lines of a text with their ends."""
    rest: list[str] = []
    for block in blocks:
        *whole, last = block.split("\n")
        for line in whole:
            yield "".join([*rest, line, "\n"])
            rest = []
        if last:
            rest.append(last)
    if rest:
        yield "".join(rest)


def _json_field(blocks: Iterable[str], field: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(_bounded(lines_of(blocks), path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep or too long"
            raise InputError(f"{where} is not valid JSON ({message}); data.field reads JSON lines") from None
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            keys = ", ".join(list(value)[:10]) if isinstance(value, dict) else type(value).__name__
            raise InputError(f"{where}: no text under data.field {field!r}; it has {keys}")
        yield _whole(value[field])


def _column(blocks: Iterable[str], field: str, path: Path) -> Iterator[str]:
    lines = _bounded(lines_of(blocks), path)
    limit = csv.field_size_limit(LONGEST_RECORD)
    try:
        rows: Any = csv.DictReader(lines, delimiter=TABLES[path.suffix.lower()])
        if field not in (rows.fieldnames or []):
            raise InputError(f"{path}: no column {field!r} (data.field); it has {', '.join(rows.fieldnames or [])}")
        for row in rows:
            yield _whole(row[field] or "")
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: not a table ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _bounded(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if len(line) > LONGEST_RECORD:
            raise InputError(f"{path}, line {number}: longer than {LONGEST_RECORD:,} characters; cut it")
        yield line


def _whole(text: str) -> str:
    """A text with a line end; half of a surrogate pair, which JSON can write and UTF-8 cannot, is replaced."""
    text = text.encode("utf-8", "replace").decode()
    return text if text.endswith("\n") else text + "\n"


class Joiner:
    """Joins texts of files with a line break where one does not end in it; bytes as they are."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._broken = True

    def __call__(self, file: int, block: Block) -> Block:
        if isinstance(block, bytes) or not block:
            return block
        joined = block if self._broken or file == self._file else "\n" + block
        self._file, self._broken = file, block.endswith("\n")
        return joined


def as_bytes(block: Block) -> bytes:
    """A block as it lies in a file."""
    return block if isinstance(block, bytes) else block.encode()


@contextlib.contextmanager
def text_source(source: str, *, raw: bool) -> Iterator[Iterator[Block]]:
    """The blocks of a text file or, for "-", of standard input as they come; bytes where `raw`.

    Raises InputError where it is no regular file, cannot be read, or is not UTF-8 and should be.
    """
    try:
        if source == "-":
            name, file = "standard input", open_standard_input()
        else:
            name, path = source, expand_user(Path(source))
            if not path.is_file():
                what = "not a regular file; give a file, or - for standard input" if path.exists() else "no such file"
                raise InputError(f"{source}: {what}")
            file = path.open("rb")
        with contextlib.nullcontext(file) if source == "-" else file:
            yield raw_blocks(file, STREAM_BYTES) if raw else decode_blocks(file, name, STREAM_BYTES)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # of what is printed
            raise
        raise InputError(f"cannot read {source}: {error.strerror}") from None


def raw_blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """A binary file in blocks of so many bytes at most, each as soon as the file gives it."""
    read = getattr(file, "read1", file.read)  # of a pipe: what is there, without waiting for more
    return iter(lambda: read(size), b"")


def open_standard_input() -> BinaryIO:
    """Standard input as bytes. Raises InputError where it is closed."""
    if sys.stdin is None:
        raise InputError("standard input is closed; give a file instead of -")
    return sys.stdin.buffer
