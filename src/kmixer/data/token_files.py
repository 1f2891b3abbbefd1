"""A corpus as tokens: its text is split, its tokenizer built, and its token files written or opened.

The files of a corpus, split and tokenizer are kept in the user's cache folder under a name made of
all three, and are used again by every run that needs the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kmixer.data.blocks import after_blank, cut_blocks
from kmixer.data.config import DataConfig, Split, TokenizerConfig
from kmixer.data.corpora import Corpus, find_corpus
from kmixer.data.reading import Block, Joiner, as_bytes
from kmixer.data.sentence_pieces import SentencePieceTokenizer, takes_a_sample
from kmixer.data.token_cache import (
    META,
    DamagedError,
    TokenSplit,
    TokenWriter,
    anonymous_file,
    map_tokens,
    open_parts,
    storage,
    write_parts,
)
from kmixer.data.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from kmixer.errors import InputError
from kmixer.files import user_cache

# Part of the name of a folder of token files: another number where the same text would give other tokens.
LAYOUT = 2
# Characters of the training part that a tokenizer is trained on; of a longer one, the beginning of every block.
TRAINING_CHARACTERS = {"bpe": 1 << 26, "sentencepiece": 1 << 24}


@dataclass(frozen=True)
class Dataset:
    """The parts of a tokenised corpus, its tokenizer, and the sha256 of its text."""

    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit | None
    tokenizer: Tokenizer
    sha256: str
    notes: tuple[str, ...] = ()  # lines that a user should see


@dataclass(frozen=True)
class ScannedText:
    """What one reading of a corpus tells of it. Lengths are in characters, or bytes where the corpus is bytes."""

    sha256: str
    characters: str  # all that occur, sorted
    length: int
    lengths: list[int]  # by file


@dataclass(frozen=True)
class Part:
    """Of the joined text start <= i < stop; or files, joined."""

    start: int = 0
    stop: int = 0
    files: frozenset[int] | None = None


def prepare_dataset(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, data_dir: Path | None = None) -> Dataset:
    """Find the corpus, build the tokenizer (or take the one given), and map the token files.

    The character vocabulary is that of the whole corpus; byte pairs and SentencePiece train on the training part.

    Raises:
        InputError: an empty or missing corpus, a split that leaves a part empty, or a text that changes meanwhile.
    """
    _check_encoding(data, tokenizer)
    corpus, text, parts = split_corpus(data, data_dir)
    validation = corpus.validation if data.validation is None else data.validation
    notes = [f"{corpus.name}: {len(corpus.paths):,} files"] if len(corpus.paths) > 1 else []
    if isinstance(tokenizer, TokenizerConfig):
        asked = tokenizer.vocabulary_size
        tokenizer = _build_tokenizer(tokenizer, corpus, parts["train"], text)
        if isinstance(tokenizer, BytePairTokenizer | SentencePieceTokenizer) and tokenizer.vocabulary_size < asked:
            notes.append(f"the text gives no more than {tokenizer.vocabulary_size:,} of the {asked:,} tokens asked for")
    key = [LAYOUT, text.sha256, validation, data.test, data.encoding, tokenizer.to_json()]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    splits, made_again = _open(user_cache() / "tokens" / name, corpus, text, parts, tokenizer)
    if made_again:
        notes.append("the token files in the cache were damaged, and were made again")
    for part, split in splits.items():
        if len(split.tokens) == 0:
            raise InputError(f"the {part} part of the corpus is empty; give more text or another data.validation")
    if unknown := splits["train"].counts.unknown:
        notes.append(f"{unknown:,} tokens of the training part are unknown to the tokenizer: signs it cannot hold")
    return Dataset(splits["train"], splits["validation"], splits.get("test"), tokenizer, text.sha256, tuple(notes))


def split_corpus(data: DataConfig, data_dir: Path | None = None) -> tuple[Corpus, ScannedText, dict[str, Part]]:
    """The corpus of a configuration, what one reading of it tells, and the parts that it is cut into."""
    corpus = find_corpus(data.corpus, data_dir, files=data.files, field=data.field, encoding=data.encoding)
    text = _scan(corpus)
    validation = corpus.validation if data.validation is None else data.validation
    return corpus, text, _split(corpus, text, validation, data.test)


def tokenise(blocks: Iterator[Block], tokenizer: Tokenizer) -> TokenSplit:
    """Any text as tokens, in constant memory: they lie in a temporary file."""
    folder = user_cache()
    with anonymous_file(folder) as file:
        writer, raw = None, False
        for block in blocks:
            raw = raw or isinstance(block, bytes)
            writer = writer or TokenWriter(file, tokenizer, raw=raw)
            writer.add(block)
        if writer is None:
            raise InputError("the text is empty; there is nothing to measure")
        counts = writer.finish()
        return TokenSplit(map_tokens(file, storage(tokenizer.vocabulary_size)), counts)


def count_tokens(split: TokenSplit, vocabulary_size: int) -> Tensor:
    """How often each token occurs (v,), counted in constant memory."""
    counts = torch.zeros(vocabulary_size, dtype=torch.int64)
    for block in split.tokens.split(1 << 22):
        counts += torch.bincount(block.long(), minlength=vocabulary_size)
    return counts


def _check_encoding(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer) -> None:
    kind = tokenizer.kind if isinstance(tokenizer, TokenizerConfig) else tokenizer.to_json()["kind"]
    if data.encoding == "bytes" and kind != "byte":
        raise InputError(f"data.encoding 'bytes' goes with tokenizer.kind 'byte', not {kind!r}")


def _scan(corpus: Corpus) -> ScannedText:
    digest, join = hashlib.sha256(), Joiner()
    seen: set[str] = set()
    lengths = [0] * max(1, len(corpus.paths))
    length = 0
    for file, block in corpus.files():
        lengths[file] += len(block)
        joined = join(file, block)
        length += len(joined)
        digest.update(as_bytes(joined))
        if isinstance(joined, str):
            seen.update(joined)
    if length == 0:
        raise InputError(f"corpus {corpus.name} is empty")
    return ScannedText(digest.hexdigest(), "".join(sorted(seen)), length, lengths)


def _split(corpus: Corpus, text: ScannedText, validation: Split, test: Split | None) -> dict[str, Part]:
    if isinstance(validation, list):
        assert not isinstance(test, float)
        return _split_files(corpus, validation, test or [])
    assert not isinstance(test, list)
    held_out = int((1 - (test or 0)) * text.length)
    cut = int((1 - (test or 0) - validation) * text.length)
    parts = {"train": Part(0, cut), "validation": Part(cut, text.length if test is None else held_out)}
    if test is not None:
        parts["test"] = Part(held_out, text.length)
    return parts


def _split_files(corpus: Corpus, validation: list[str], test: list[str]) -> dict[str, Part]:
    parts = {}
    for name, files in (("validation", validation), ("test", test)):
        unknown = [file for file in files if file not in corpus.names]
        if unknown:
            raise InputError(
                f"data.{name}: {', '.join(unknown)} not in corpus {corpus.name}; it has {', '.join(corpus.names)}"
            )
        if files:
            parts[name] = Part(files=frozenset(corpus.names.index(file) for file in files))
    both = sorted(set(validation) & set(test))
    if both:
        raise InputError(f"data.test: {', '.join(both)} also in data.validation; a file goes into one of them")
    kept = [number for number, name in enumerate(corpus.names) if name not in validation and name not in test]
    if not kept:
        raise InputError("data.validation: it names every file of the corpus; leave one for training")
    return {"train": Part(files=frozenset(kept)), **parts}


def _route(corpus: Corpus, parts: dict[str, Part], sha256: str | None = None) -> Iterator[tuple[str, Block]]:
    """Every block of the corpus with the name of its part. Raises InputError at the end where the sha256 is another."""
    digest, whole, position = hashlib.sha256(), Joiner(), 0
    own = {name: Joiner() for name in parts}
    for file, block in corpus.files():
        joined = whole(file, block)
        digest.update(as_bytes(joined))
        for name, part in parts.items():
            if part.files is None:
                start, stop = max(0, part.start - position), max(0, part.stop - position)
                yield name, joined[start:stop]
            elif file in part.files:
                yield name, own[name](file, block)
        position += len(joined)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise InputError(f"corpus {corpus.name} changed while it was read; start again when nothing writes to it")


def _open(
    folder: Path, corpus: Corpus, text: ScannedText, parts: dict[str, Part], tokenizer: Tokenizer
) -> tuple[dict[str, TokenSplit], bool]:
    """The token files, made where they are not there or damaged; and whether they were damaged."""
    there = (folder / META).exists()
    if there:
        try:
            return open_parts(folder, parts), False
        except DamagedError:
            pass
    write_parts(folder, parts, _route(corpus, parts, text.sha256), tokenizer, raw=corpus.encoding == "bytes")
    try:
        return open_parts(folder, parts), there
    except DamagedError as error:
        raise InputError(f"{folder} does not keep what is written to it ({error}); check the disk") from None


def _build_tokenizer(config: TokenizerConfig, corpus: Corpus, train: Part, text: ScannedText) -> Tokenizer:
    if config.kind == "char":
        return CharTokenizer(text.characters)
    if config.kind == "byte":
        return ByteTokenizer()
    length = train.stop - train.start if train.files is None else sum(text.lengths[file] for file in train.files)
    share = min(1.0, TRAINING_CHARACTERS[config.kind] / max(1, length))

    def blocks(share: float) -> Iterator[str]:
        for _, block in _route(corpus, {"train": train}):
            assert isinstance(block, str)
            yield block[: math.ceil(share * len(block))]

    if config.kind == "bpe":
        return BytePairTokenizer.train(blocks(share), config.vocabulary_size)

    def lines(share: float) -> Iterator[str]:
        return (line for block in cut_blocks(blocks(share), after_blank) for line in block.splitlines())

    required: set[str] = set()
    if share < 1 or takes_a_sample(lines(1.0)):  # a sample may lack a character
        for block in blocks(1.0):
            required.update(block)
    return SentencePieceTokenizer.train(lines(share), config.vocabulary_size, required)
