"""The documents of a corpus: every file of a folder, or every record of JSON lines or a table, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kmixer.data.config import DataConfig
from kmixer.data.corpora import Corpus
from kmixer.data.reading import Block, Joiner
from kmixer.data.token_files import Part, split_corpus
from kmixer.data.tokenizers import ByteTokenizer, Tokenizer
from kmixer.errors import InputError


def held_out_documents(data: DataConfig, tokenizer: Tokenizer, data_dir: Path | None = None) -> Iterator[Tensor]:
    """Tokens (n,) int64 of every document of the validation part, in its order.

    Joined they are the validation part, but for the line breaks that a tokenizer reads together with what is around
    them. Where the part is a fraction of the text, it begins inside a document, and what is left of that is the first.

    Raises:
        InputError: a corpus of one text, in which nothing says where a document ends.
    """
    corpus, _, parts = split_corpus(data, data_dir)
    if corpus.field is None and len(corpus.paths) < 2:
        raise InputError(
            f"documents: corpus {corpus.name} is one text, which does not say where a document ends; allowed: a folder "
            "of files, or JSON lines or a table with data.field"
        )
    for _, blocks in itertools.groupby(_held_out_blocks(corpus, parts["validation"]), key=lambda part: part[0]):
        tokens = _encoded((block for _, block in blocks), tokenizer)
        if len(tokens):
            yield torch.from_numpy(tokens).long()


def _held_out_blocks(corpus: Corpus, part: Part) -> Iterator[tuple[int, Block]]:
    """Blocks of a part, with the number of the document that they are of."""
    join, position, document, before = Joiner(), 0, -1, -1
    for file, block in corpus.files():
        if corpus.field is not None or file != before:  # a block of a field is a record
            document, before = document + 1, file
        joined = join(file, block)
        position += len(joined) - len(block)  # a line break between files is of none of them
        if part.files is None:
            start, stop = max(0, part.start - position), max(0, part.stop - position)
            yield document, block[start:stop]
        elif file in part.files:
            yield document, block
        position += len(block)


def _encoded(blocks: Iterator[Block], tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of a document by itself."""
    encode = tokenizer.encoder()
    pieces = []
    for block in blocks:
        if isinstance(block, bytes):
            assert isinstance(tokenizer, ByteTokenizer)
            pieces.append(tokenizer.encode(block))
        elif block:
            pieces.append(encode(block, False))
    return np.concatenate([*pieces, encode("", True)])
