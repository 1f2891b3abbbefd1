"""Scoring a text: the surprise of every line or token given everything before, in constant memory.

Tokens of a line are those of the line by itself, with its line end. The first token of a text has nothing before it
and no surprise. Lines of different length compare by their bits per byte: nats / (ln 2 x bytes), line end included.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kmixer.data.blocks import LONGEST_WAIT
from kmixer.data.reading import Block, as_bytes
from kmixer.data.tokenizers import ByteTokenizer, CharTokenizer, Encoder, Tokenizer, Tokens
from kmixer.errors import InputError
from kmixer.measure.surprise import Surprise
from kmixer.models.causal_lm import CausalLM

SHOWN_CHARACTERS = 500  # of a line


@dataclass(frozen=True)
class Line:
    """One line of a text and its surprise."""

    number: int  # from 1
    text: str  # its beginning, without the line end
    bytes: int  # with the line end
    tokens: int  # with a surprise
    nats: float  # of all of them

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "line": self.number,
            "bits_per_byte": self.bits_per_byte,
            "nats": self.nats,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "text": self.text,
        }


@dataclass(frozen=True)
class ScoredToken:
    """One token of a text and its surprise."""

    line: int
    text: str
    nats: float | None  # None of the first

    def to_json(self) -> dict[str, Any]:
        return {"line": self.line, "token": self.text, "nats": self.nats}


@dataclass(frozen=True)
class _Piece:
    """A line or a part of one."""

    content: Block
    line: int
    ends: bool  # the line


class Summary:
    """Sums over the lines of a text, and the most surprising of them; of lines that are not blank.

    Args:
        top: how many of those to keep.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._heap: list[tuple[float, int, Line]] = []
        self.lines = self.tokens = self.bytes = 0
        self.nats = 0.0

    def add(self, line: Line) -> None:
        self.lines += 1
        self.tokens += line.tokens
        self.bytes += line.bytes
        self.nats += line.nats
        if not line.text.strip():  # a line end alone: its one byte weighs as much as a whole line
            return
        entry = (line.bits_per_byte, -line.number, line)
        if len(self._heap) < self._top:
            heapq.heappush(self._heap, entry)
        elif self._top:
            heapq.heappushpop(self._heap, entry)

    def most_surprising(self) -> list[Line]:
        """The lines of the most bits per byte, the most surprising first."""
        return [line for _, _, line in sorted(self._heap, reverse=True)]

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def to_json(self) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "nats": self.nats,
            "nats_per_token": self.nats_per_token,
            "bits_per_byte": self.bits_per_byte,
        }


def score_lines(
    model: CausalLM, tokenizer: Tokenizer, blocks: Iterator[Block], window: int | None = None
) -> Iterator[Line]:
    """The lines of a text, each as soon as it is known.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        blocks: the text; bytes for a byte tokenizer, if it is no text.
        window: see `Surprise`.

    Raises:
        InputError: characters that the tokenizer does not know, with the number of their line.
    """
    surprise = Surprise(model, window)
    size, tokens, nats, text = 0, 0, 0.0, ""
    for pieces, encoded in _encoded(tokenizer, blocks):
        counts = [len(part) for part in encoded]
        values = surprise(np.concatenate(encoded))
        known = ~np.isnan(values)
        stops = np.cumsum([0, *counts])
        sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))[stops]
        numbers = np.cumsum(np.concatenate([[0], known]))[stops]
        for index, piece in enumerate(pieces):
            size += len(as_bytes(piece.content))
            nats += float(sums[index + 1] - sums[index])
            tokens += int(numbers[index + 1] - numbers[index])
            text += _shown(piece.content, SHOWN_CHARACTERS - len(text))
            if piece.ends:
                yield Line(piece.line, text, size, tokens, nats)
                size, tokens, nats, text = 0, 0, 0.0, ""


def score_tokens(
    model: CausalLM, tokenizer: Tokenizer, blocks: Iterator[Block], window: int | None = None
) -> Iterator[ScoredToken]:
    """The tokens of a text, each as soon as it is known; see `score_lines`."""
    surprise = Surprise(model, window)
    for pieces, encoded in _encoded(tokenizer, blocks):
        values = iter(surprise(np.concatenate(encoded)).tolist())
        for piece, tokens in zip(pieces, encoded, strict=True):
            for token in tokens.tolist():
                nats = next(values)
                yield ScoredToken(piece.line, tokenizer.decode([token]), None if math.isnan(nats) else nats)


def _encoded(tokenizer: Tokenizer, blocks: Iterator[Block]) -> Iterator[tuple[list[_Piece], list[Tokens]]]:
    """Lines, or parts of one, with the tokens of each."""
    inside: Encoder | None = None  # of a line that comes in parts
    whole = isinstance(tokenizer, CharTokenizer | ByteTokenizer)
    for pieces in _pieces(blocks, 1 if whole else LONGEST_WAIT):
        encoded: list[Tokens] = []
        for piece in pieces:
            try:
                if isinstance(piece.content, bytes):
                    if not isinstance(tokenizer, ByteTokenizer):
                        raise InputError("bytes go with a byte tokenizer; give text")
                    tokens = tokenizer.encode(piece.content)
                elif whole or (piece.ends and inside is None):
                    tokens = tokenizer.encode(piece.content)
                else:
                    inside = inside or tokenizer.encoder()
                    tokens = inside(piece.content, piece.ends)
                    inside = None if piece.ends else inside
            except InputError as error:
                raise InputError(f"line {piece.line}: {error}") from None
            encoded.append(tokens)
        yield pieces, encoded


def _pieces(blocks: Iterator[Block], hold: int) -> Iterator[list[_Piece]]:
    """The lines of every block; a line whose end has not come is held back until it has `hold` characters."""
    line = 1
    held: Block | None = None
    begun = False  # a line of which parts were given
    for block in blocks:
        block = block if held is None else held + block  # type: ignore[operator]
        held = None
        pieces = []
        for content in _lines(block):
            ends = content[-1:] in ("\n", b"\n")
            if not ends and len(content) < hold:
                held = content
                continue
            pieces.append(_Piece(content, line, ends))
            line, begun = line + ends, not ends
        if pieces:
            yield pieces
    if held is not None or begun:
        yield [_Piece("" if held is None else held, line, True)]


def _lines(block: Block) -> list[Any]:
    """The lines of a block with their ends."""
    newline: Any = b"\n" if isinstance(block, bytes) else "\n"
    *whole, last = block.split(newline)
    return [*(line + newline for line in whole), *([last] if last else [])]


def _shown(content: Block, characters: int) -> str:
    if characters <= 0:
        return ""
    text = content[: 4 * characters].decode(errors="replace") if isinstance(content, bytes) else content
    return text.rstrip("\r\n")[:characters]
