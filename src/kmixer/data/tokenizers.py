"""Tokenizers: what every one offers; characters, bytes and byte pairs. `sentence_pieces` is beside.

`encode` gives an int64 array; `unknown` the parts of a text that have no token; `decode` a string;
`decoder()` a `StreamDecoder`, which takes one token at a time and returns the text it completes; `encoder()` one that
takes a text block by block, of any length and with any lines, in constant memory.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from kmixer.data.blocks import BOUNDED_WORD, Cut, before_word, cut_blocks
from kmixer.errors import InputError

Tokens = npt.NDArray[np.int64]
Kind = Literal["char", "byte", "bpe", "sentencepiece"]

Encoder = Callable[[str, bool], Tokens]  # a block of text, and whether it is the last, to the tokens that are known

# Training takes memory, and SentencePiece more than linear time, for words past this length, which hardly repeat: so
# many characters of them are read, by kind.
LONG_WORD = 64
LONG_WORDS = {"bpe": 1 << 22, "sentencepiece": 1 << 20}


class StreamDecoder(Protocol):
    """Text of tokens that come one by one: all answers together are `decode` of all tokens."""

    def __call__(self, token: int) -> str:
        """The text that this token completes; often empty where a character has several tokens."""
        ...

    def end(self) -> str:
        """What the last tokens left open: U+FFFD for a character that was cut."""
        ...


class Tokenizer(Protocol):
    """What every tokenizer offers."""

    @property
    def vocabulary_size(self) -> int: ...

    def encode(self, text: str) -> Tokens: ...

    def unknown(self, text: str) -> list[str]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...

    def decoder(self) -> StreamDecoder: ...

    def encoder(self) -> Encoder: ...

    def to_json(self) -> dict[str, Any]: ...


class _BlockEncoder:
    """Encodes what a cut function lets go, and holds the rest back."""

    def __init__(self, encode: Callable[[str], Tokens], cut: Cut) -> None:
        self._encode, self._cut, self._rest = encode, cut, ""

    def __call__(self, block: str, final: bool) -> Tokens:
        text = self._rest + block
        end = len(text) if final else self._cut(text)
        self._rest = text[end:]
        return self._encode(text[:end]) if end else np.zeros(0, dtype=np.int64)


def lone_surrogates(text: str) -> list[str]:
    """The characters of a text that UTF-8 cannot hold."""
    return sorted({character for character in text if "\ud800" <= character <= "\udfff"})


def first_of(unknown: list[str]) -> str:
    """The first ten of what a tokenizer does not know, for an error."""
    return ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")


class CharTokenizer:
    """One token a character; the vocabulary is sorted by code point."""

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        self._codes = np.frombuffer(self.characters.encode("utf-32-le"), dtype=np.uint32)

    @property
    def vocabulary_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tokens:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        tokens = np.searchsorted(self._codes, codes).clip(max=max(0, len(self._codes) - 1))
        if len(codes) and not (len(self._codes) and np.array_equal(self._codes[tokens], codes)):
            raise InputError(
                f"the tokenizer does not know {first_of(self.unknown(text))}; it knows {self.characters!r}"
            )
        return tokens.astype(np.int64)

    def unknown(self, text: str) -> list[str]:
        return sorted(set(text) - set(self.characters))

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.characters[token] for token in tokens)

    def decoder(self) -> StreamDecoder:
        return _CharDecoder(self.characters)

    def encoder(self) -> Encoder:
        return lambda block, final: self.encode(block)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters}


class ByteTokenizer:
    """One token a byte of UTF-8; 256 tokens. Bytes that are not UTF-8 decode to U+FFFD."""

    vocabulary_size = 256

    def encode(self, text: str | bytes) -> Tokens:
        raw = text if isinstance(text, bytes) else text.encode()
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)

    def unknown(self, text: str) -> list[str]:
        return lone_surrogates(text)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(int(token) for token in tokens).decode(errors="replace")

    def decoder(self) -> StreamDecoder:
        return _BytesDecoder([bytes([byte]) for byte in range(256)])

    def encoder(self) -> Encoder:
        return lambda block, final: self.encode(block)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


class BytePairTokenizer:
    """Byte pairs (Sennrich et al. 2016) over the bytes of UTF-8: every text has tokens and comes back as it was.

    A word longer than `LONGEST_WORD` characters counts as several.
    """

    def __init__(self, description: str) -> None:
        import tokenizers

        self._description = description
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(description)
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"the tokenizer's byte pairs cannot be read; restore it from a copy ({error})") from None
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        pieces = sorted(vocabulary, key=lambda piece: vocabulary[piece])
        byte_of = {character: byte for byte, character in enumerate(characters_of_bytes())}
        # What the tokens stand for.
        self.pieces = [bytes(byte_of[character] for character in piece) for piece in pieces]

    @classmethod
    def train(cls, blocks: Iterable[str], vocabulary_size: int) -> BytePairTokenizer:
        """Train on blocks of text. The vocabulary may come out smaller than asked for on small texts."""
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Library

        if vocabulary_size < 256:
            raise InputError(f"tokenizer.vocabulary_size: got {vocabulary_size}; kind 'bpe' has 256 or more")
        library = Library(models.BPE())
        bounded = pre_tokenizers.Split(Regex(BOUNDED_WORD), "isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence([bounded, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        library.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, show_progress=False, initial_alphabet=alphabet)
        library.train_from_iterator(few_long_words(cut_blocks(blocks, before_word), LONG_WORDS["bpe"]), trainer)
        return cls(library.to_str())

    @property
    def vocabulary_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> Tokens:
        return np.array(self._tokenizer.encode(text).ids, dtype=np.int64)

    def unknown(self, text: str) -> list[str]:
        return lone_surrogates(text)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")

    def decoder(self) -> StreamDecoder:
        return _BytesDecoder(self.pieces)

    def encoder(self) -> Encoder:
        return _BlockEncoder(self.encode, before_word)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bpe", "model": self._description}


A_LONG_WORD = re.compile(rf"\S{{{LONG_WORD + 1},}}")


def few_long_words(blocks: Iterable[str], characters: int) -> Iterator[str]:
    """The same text, without the long words that come after so many characters of such words."""
    left = characters

    def keep(word: re.Match[str]) -> str:
        nonlocal left
        left -= len(word[0])
        return word[0] if left > 0 else " "

    for block in blocks:
        yield A_LONG_WORD.sub(keep, block)


def characters_of_bytes() -> list[str]:
    """The printable character that stands for each byte in byte-level pairs: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + index) for index in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


class _CharDecoder:
    def __init__(self, characters: str) -> None:
        self._characters = characters

    def __call__(self, token: int) -> str:
        return self._characters[token]

    def end(self) -> str:
        return ""


class _BytesDecoder:
    def __init__(self, bytes_of: list[bytes]) -> None:
        self._bytes_of = bytes_of
        self._incremental = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, token: int) -> str:
        return self._incremental.decode(self._bytes_of[token])

    def end(self) -> str:
        return self._incremental.decode(b"", final=True)
