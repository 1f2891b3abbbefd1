"""A corpus as memory-mapped token files: written once in constant memory, then read without copying.

The files of a corpus, split and tokenizer are kept in the user's cache folder under a name made of
all three, and are used again by every run that needs the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kmixer.data.config import DataConfig, Split, TokenizerConfig
from kmixer.data.corpora import Corpus, find_corpus
from kmixer.data.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer
from kmixer.errors import InputError
from kmixer.files import atomic_write, read_json, user_cache, write_json

PARTS = ("train", "validation", "test")
ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class TokenSplit:
    """Tokens (n,) of one part of a corpus, mapped from a file, and what they were made from."""

    tokens: Tensor  # uint8, int16 or int32
    characters: int
    bytes: int
    words: int  # between white space

    @property
    def tokens_per_character(self) -> float:
        return len(self.tokens) / self.characters

    @property
    def tokens_per_byte(self) -> float:
        return len(self.tokens) / self.bytes

    @property
    def tokens_per_word(self) -> float:
        return len(self.tokens) / max(1, self.words)


@dataclass(frozen=True)
class Dataset:
    """The parts of a tokenised corpus, its tokenizer, and the sha256 of its text."""

    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit | None
    tokenizer: Tokenizer
    sha256: str


class _Part(NamedTuple):
    """Characters start <= i < stop of these files, joined."""

    names: list[str] | None
    start: int
    stop: int | None


def prepare_dataset(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, data_dir: Path | None = None) -> Dataset:
    """Find the corpus, build the tokenizer (or take the one given), and map the token files.

    The character vocabulary is that of the whole corpus; byte pairs and SentencePiece train on the training part.

    Raises:
        InputError: an empty or missing corpus, or a split that leaves a part empty.
    """
    corpus = find_corpus(data.corpus, data_dir)
    sha256 = corpus.sha256()
    validation = corpus.validation if data.validation is None else data.validation
    parts, characters = _split(corpus, validation, data.test)
    if isinstance(tokenizer, TokenizerConfig):
        tokenizer = _build_tokenizer(tokenizer, corpus, parts, characters)
    key = json.dumps([sha256, validation, data.test, tokenizer.to_json()], sort_keys=True)
    folder = user_cache() / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not _is_whole(folder):
        _write(folder, {name: _read(corpus, part) for name, part in parts.items()}, tokenizer)
    meta = read_json(folder / "meta.json")
    mapped = {name: _map(folder, name, meta) for name in parts}
    return Dataset(mapped["train"], mapped["validation"], mapped.get("test"), tokenizer, sha256)


def count_tokens(split: TokenSplit, vocabulary_size: int) -> Tensor:
    """How often each token occurs (v,), counted in constant memory."""
    counts = torch.zeros(vocabulary_size, dtype=torch.int64)
    for block in split.tokens.split(1 << 22):
        counts += torch.bincount(block.long(), minlength=vocabulary_size)
    return counts


def _split(corpus: Corpus, validation: Split, test: Split | None) -> tuple[dict[str, _Part], str]:
    """The parts, and the sorted characters of the whole corpus."""
    seen: set[str] = set()
    length = 0
    for text in corpus.read():
        seen.update(text)
        length += len(text)
    if length == 0:
        raise InputError(f"corpus {corpus.name} is empty")
    if isinstance(validation, list):
        assert not isinstance(test, float)
        return _split_files(corpus, validation, test or []), "".join(sorted(seen))
    assert not isinstance(test, list)
    held_out = int((1 - (test or 0)) * length)
    cut = int((1 - (test or 0) - validation) * length)
    parts = {"train": _Part(None, 0, cut), "validation": _Part(None, cut, None if test is None else held_out)}
    if test is not None:
        parts["test"] = _Part(None, held_out, None)
    return parts, "".join(sorted(seen))


def _split_files(corpus: Corpus, validation: list[str], test: list[str]) -> dict[str, _Part]:
    parts = {}
    for name, files in (("validation", validation), ("test", test)):
        unknown = [file for file in files if file not in corpus.names]
        if unknown:
            raise InputError(
                f"data.{name}: {', '.join(unknown)} not in corpus {corpus.name}; it has {', '.join(corpus.names)}"
            )
        if files:
            parts[name] = _Part(files, 0, None)
    both = sorted(set(validation) & set(test))
    if both:
        raise InputError(f"data.test: {', '.join(both)} also in data.validation; a file goes into one of them")
    kept = [name for name in corpus.names if name not in validation and name not in test]
    if not kept:
        raise InputError("data.validation: it names every file of the corpus; leave one for training")
    return {"train": _Part(kept, 0, None), **parts}


def _read(corpus: Corpus, part: _Part) -> Iterator[str]:
    position = 0
    for text in corpus.read(part.names):
        start, stop = part.start - position, len(text) if part.stop is None else part.stop - position
        position += len(text)
        if stop > 0 and start < len(text):
            yield text[max(0, start) : stop]


def _build_tokenizer(config: TokenizerConfig, corpus: Corpus, parts: dict[str, _Part], characters: str) -> Tokenizer:
    if config.kind == "char":
        return CharTokenizer(characters)
    if config.kind == "byte":
        return ByteTokenizer()
    blocks = _cut_at_whitespace(_read(corpus, parts["train"]))
    if config.kind == "bpe":
        return BytePairTokenizer.train(blocks, config.vocabulary_size)
    lines = (line for block in blocks for line in block.splitlines())
    return SentencePieceTokenizer.train(lines, config.vocabulary_size)


def _cut_at_whitespace(blocks: Iterable[str]) -> Iterator[str]:
    """The same text in blocks that begin and end between words, so that each encodes by itself."""
    rest = ""
    for block in blocks:
        text = rest + block
        cut = max(text.rfind("\n"), text.rfind(" ")) + 1
        if cut:
            yield text[:cut]
        rest = text[cut:]
    if rest:
        yield rest


def _write(folder: Path, parts: dict[str, Iterator[str]], tokenizer: Tokenizer) -> None:
    """Token files and then meta.json, each put in its place at once.

    The folder's name says what its files hold, so that processes which write it at the same time write the same.
    """
    for left in folder.glob(".*.tmp"):  # by a process that was killed
        with contextlib.suppress(FileNotFoundError):  # another process has just finished it
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()
    dtype = _storage(tokenizer.vocabulary_size)
    meta: dict[str, Any] = {"dtype": dtype.name}
    for name, blocks in parts.items():
        counts = {"tokens": 0, "characters": 0, "bytes": 0, "words": 0}
        with atomic_write(folder / f"{name}.bin") as file:
            for text in _cut_at_whitespace(blocks):
                tokens = tokenizer.encode(text)
                file.write(tokens.astype(dtype).tobytes())
                counts["tokens"] += len(tokens)
                counts["characters"] += len(text)
                counts["bytes"] += len(text.encode())
                counts["words"] += len(text.split())
        meta[name] = counts
    write_json(folder / "meta.json", meta)


def _is_whole(folder: Path) -> bool:
    """Whether the token files are there as they were written; what is damaged is made again."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        size = np.dtype(meta["dtype"]).itemsize
        return all(
            "words" in meta[name] and (folder / f"{name}.bin").stat().st_size == meta[name]["tokens"] * size
            for name in PARTS
            if name in meta
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _map(folder: Path, name: str, meta: Any) -> TokenSplit:
    counts = meta[name]
    path = folder / f"{name}.bin"
    if counts["tokens"] == 0:
        raise InputError(f"the {name} part of the corpus is empty; give more text or another data.validation")
    array = np.memmap(path, dtype=meta["dtype"], mode="c", shape=(counts["tokens"],))
    return TokenSplit(torch.from_numpy(array), counts["characters"], counts["bytes"], counts["words"])


def _storage(vocabulary_size: int) -> np.dtype[Any]:
    if vocabulary_size <= 1 << 8:
        return np.dtype(np.uint8)
    return np.dtype(np.int16 if vocabulary_size <= 1 << 15 else np.int32)
