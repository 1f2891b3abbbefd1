"""Token files on disk: written in one pass over a text, and opened only as they were written.

A folder holds NAME.bin for every part, and meta.json with their counts and digests and a digest of itself. A reader
takes a copy of its own while it checks, so that nothing which happens to the files later reaches it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kmixer.data.reading import Block, as_bytes
from kmixer.data.sentence_pieces import SentencePieceTokenizer
from kmixer.data.tokenizers import ByteTokenizer, Tokenizer
from kmixer.errors import InputError
from kmixer.files import atomic_write, describe_write_error, open_to_read, read_json_object, write_json

META = "meta.json"
ABANDONED_SECONDS = 24 * 3600
COPY_BYTES = 1 << 20


class DamagedError(Exception):
    """Token files are not what was written."""


@dataclass(frozen=True)
class Counts:
    """How much text a part is, in several units."""

    tokens: int = 0
    characters: int | None = 0  # None of raw bytes
    bytes: int = 0
    words: int = 0  # between white space
    unknown: int = 0  # tokens that stand for what the tokenizer does not know


@dataclass(frozen=True)
class TokenSplit:
    """Tokens (n,) of one part of a corpus, mapped from a file, and what they were made from."""

    tokens: Tensor  # uint8, int16 or int32
    counts: Counts

    @property
    def characters(self) -> int | None:
        return self.counts.characters

    @property
    def bytes(self) -> int:
        return self.counts.bytes

    @property
    def words(self) -> int:
        return self.counts.words

    @property
    def tokens_per_character(self) -> float | None:
        return len(self.tokens) / self.counts.characters if self.counts.characters else None

    @property
    def tokens_per_byte(self) -> float:
        return len(self.tokens) / self.counts.bytes

    @property
    def tokens_per_word(self) -> float:
        return len(self.tokens) / max(1, self.counts.words)


class TokenWriter:
    """Encodes a text block by block into a file, and counts."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, *, raw: bool = False) -> None:
        self._file, self._tokenizer, self._encode = file, tokenizer, tokenizer.encoder()
        self._dtype = storage(tokenizer.vocabulary_size)
        self._digest = hashlib.sha256()
        self._raw = raw
        self._tokens = self._characters = self._bytes = self._words = self._unknown = 0
        self._inside_word = False

    def add(self, block: Block) -> None:
        """The next block of the text."""
        if not block:
            return
        if isinstance(block, bytes):
            assert isinstance(self._tokenizer, ByteTokenizer)
            self._put(self._tokenizer.encode(block))
        else:
            self._put(self._encode(block, False))
        self._characters += len(block)
        self._bytes += len(as_bytes(block))
        self._words += len(block.split()) - (self._inside_word and not block[:1].isspace())
        self._inside_word = not block[-1:].isspace()

    def finish(self) -> Counts:
        """Write what was held back. The counts of the whole."""
        self._put(self._encode("", True))
        characters = None if self._raw else self._characters
        return Counts(self._tokens, characters, self._bytes, self._words, self._unknown)

    def sha256(self) -> str:
        """Of the file."""
        return self._digest.hexdigest()

    def _put(self, tokens: Any) -> None:
        if isinstance(self._tokenizer, SentencePieceTokenizer):
            self._unknown += int((tokens == self._tokenizer.unknown_token).sum())
        stored = tokens.astype(self._dtype).tobytes()
        self._digest.update(stored)
        self._file.write(stored)
        self._tokens += len(tokens)


def write_parts(
    folder: Path, names: Iterable[str], blocks: Iterator[tuple[str, Block]], tokenizer: Tokenizer, *, raw: bool
) -> None:
    """Token files of parts whose blocks come in any order, and then meta.json, each put in its place at once.

    The folder's name says what its files hold, so that processes which write it at the same time write the same.
    """
    _remove_abandoned(folder)
    parts = {}
    with contextlib.ExitStack() as stack:
        writers = {
            name: TokenWriter(stack.enter_context(atomic_write(folder / f"{name}.bin")), tokenizer, raw=raw)
            for name in names
        }
        for name, block in blocks:
            writers[name].add(block)
        for name, writer in writers.items():
            parts[name] = {**asdict(writer.finish()), "sha256": writer.sha256()}
    meta = {"dtype": storage(tokenizer.vocabulary_size).name, "parts": parts}
    write_json(folder / META, {**meta, "sha256": _digest(meta)})


def open_parts(folder: Path, names: Iterable[str]) -> dict[str, TokenSplit]:
    """The parts of a folder, read through a copy that is checked. Raises DamagedError where they are not as written."""
    try:
        try:
            meta = read_json_object(folder / META)
        except InputError as error:
            raise DamagedError(folder / META) from error
        said = meta.pop("sha256")
        if said != _digest(meta):
            raise DamagedError(folder / META)
        splits = {}
        for name in names:
            counts = dict(meta["parts"][name])
            digest = counts.pop("sha256")
            tokens = _copied(folder / f"{name}.bin", np.dtype(meta["dtype"]), digest)
            splits[name] = TokenSplit(tokens, Counts(**counts))
            if len(tokens) != counts["tokens"]:
                raise DamagedError(folder / META)
        return splits
    except InputError:  # a full disk
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(folder) from error


def map_tokens(file: BinaryIO, dtype: np.dtype[Any]) -> Tensor:
    """The tokens of a file that nobody else can change, mapped."""
    file.flush()
    count = os.fstat(file.fileno()).st_size // dtype.itemsize
    if count == 0:
        return torch.from_numpy(np.zeros(0, dtype=dtype))
    return torch.from_numpy(np.memmap(file, dtype=dtype, mode="c", shape=(count,)))


def anonymous_file(folder: Path) -> BinaryIO:
    """A temporary file without a name, in a folder or, where that cannot be written, in the usual one."""
    writable = os.access(folder, os.W_OK)
    return tempfile.TemporaryFile(dir=folder if writable else None)  # type: ignore[return-value]


def storage(vocabulary_size: int) -> np.dtype[Any]:
    """The type of stored tokens."""
    if vocabulary_size <= 1 << 8:
        return np.dtype(np.uint8)
    return np.dtype(np.int16 if vocabulary_size <= 1 << 15 else np.int32)


def _copied(path: Path, dtype: np.dtype[Any], sha256: str) -> Tensor:
    """The tokens of a file, copied while they are checked."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(open_to_read(path))
        except InputError as error:
            raise DamagedError(path) from error
        file = stack.enter_context(anonymous_file(path.parent))
        while block := source.read(COPY_BYTES):
            digest.update(block)
            try:
                file.write(block)
            except OSError as error:
                raise describe_write_error(error, path) from error
        if digest.hexdigest() != sha256:
            raise DamagedError(path)
        try:
            return map_tokens(file, dtype)
        except OSError as error:
            raise describe_write_error(error, path) from error


def _digest(meta: Any) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _remove_abandoned(folder: Path) -> None:
    """Remove what a killed process left behind."""
    for left in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process has just finished it
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()
