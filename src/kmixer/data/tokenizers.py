"""Tokenizers: characters, bytes, byte pairs, and SentencePiece unigram pieces. Saved as JSON inside the run.

`encode` gives an int64 array; `unknown` the parts of a text that have no token; `decode` a string;
`decoder()` a `StreamDecoder`, which takes one token at a time and returns the text it completes.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import io
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from kmixer.errors import InputError

Tokens = npt.NDArray[np.int64]
Kind = Literal["char", "byte", "bpe", "sentencepiece"]

# SentencePiece reads its training text into memory: past this many lines it takes a sample of them.
MAX_TRAINING_LINES = 1_000_000


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

    def to_json(self) -> dict[str, Any]: ...


def lone_surrogates(text: str) -> list[str]:
    """The characters of a text that UTF-8 cannot hold."""
    return sorted({character for character in text if "\ud800" <= character <= "\udfff"})


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
            unknown = self.unknown(text)
            shown = ", ".join(map(repr, unknown[:10])) + (", ..." if len(unknown) > 10 else "")
            raise InputError(f"the tokenizer does not know {shown}; it knows {self.characters!r}")
        return tokens.astype(np.int64)

    def unknown(self, text: str) -> list[str]:
        return sorted(set(text) - set(self.characters))

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join(self.characters[token] for token in tokens)

    def decoder(self) -> StreamDecoder:
        return _CharDecoder(self.characters)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters}


class ByteTokenizer:
    """One token a byte of UTF-8; 256 tokens. Bytes that are not UTF-8 decode to U+FFFD."""

    vocabulary_size = 256

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def unknown(self, text: str) -> list[str]:
        return lone_surrogates(text)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(int(token) for token in tokens).decode(errors="replace")

    def decoder(self) -> StreamDecoder:
        return _BytesDecoder([bytes([byte]) for byte in range(256)])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


class BytePairTokenizer:
    """Byte pairs (Sennrich et al. 2016) over the bytes of UTF-8: every text has tokens and comes back as it was."""

    def __init__(self, description: str) -> None:
        import tokenizers

        self._description = description
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(description)
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"the tokenizer's byte pairs cannot be read; restore it from a copy ({error})") from None
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        pieces = sorted(vocabulary, key=lambda piece: vocabulary[piece])
        byte_of = {character: byte for byte, character in enumerate(_characters_of_bytes())}
        self._bytes = [bytes(byte_of[character] for character in piece) for piece in pieces]

    @classmethod
    def train(cls, blocks: Iterable[str], vocabulary_size: int) -> BytePairTokenizer:
        """Train on blocks of text. The vocabulary may come out smaller than asked for on small texts."""
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocabulary_size < 256:
            raise InputError(f"tokenizer.vocabulary_size: got {vocabulary_size}; kind 'bpe' has 256 or more")
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, show_progress=False, initial_alphabet=alphabet)
        library.train_from_iterator(blocks, trainer)
        return cls(library.to_str())

    @property
    def vocabulary_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> Tokens:
        return np.array(self._tokenizer.encode(text).ids, dtype=np.int64)

    def unknown(self, text: str) -> list[str]:
        return lone_surrogates(text)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self._bytes[token] for token in tokens).decode(errors="replace")

    def decoder(self) -> StreamDecoder:
        return _BytesDecoder(self._bytes)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bpe", "model": self._description}


def _characters_of_bytes() -> list[str]:
    """The printable character that stands for each byte in byte-level pairs: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + index) for index in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


class SentencePieceTokenizer:
    """Unigram pieces (Kudo 2018). White space is folded: newlines come back as single spaces."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise InputError("the tokenizer's SentencePiece model cannot be read; restore it from a copy") from None

    @classmethod
    def train(cls, lines: Iterable[str], vocabulary_size: int) -> SentencePieceTokenizer:
        """Train on lines of text. The vocabulary may come out smaller than asked for on small texts."""
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocabulary_size,
                character_coverage=1.0,
                split_digits=False,
                byte_fallback=False,
                hard_vocab_limit=False,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                unk_id=0,
                input_sentence_size=MAX_TRAINING_LINES,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise InputError(f"SentencePiece cannot train {vocabulary_size} pieces on this text: {error}") from None
        return cls(model.getvalue())

    @property
    def vocabulary_size(self) -> int:
        return int(self._processor.vocab_size())

    def encode(self, text: str) -> Tokens:
        return np.array(self._processor.encode(text), dtype=np.int64)

    def unknown(self, text: str) -> list[str]:
        text = text.encode("utf-8", "replace").decode()
        pieces = self._processor.encode(text, out_type=str)
        tokens = self._processor.encode(text)
        return sorted({p for p, token in zip(pieces, tokens, strict=True) if token == self._processor.unk_id()})

    def decode(self, tokens: Iterable[int]) -> str:
        return str(self._processor.decode([int(token) for token in tokens]))

    def decoder(self) -> StreamDecoder:
        return _PieceDecoder(self._processor)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "sentencepiece", "model": base64.b64encode(self._model).decode()}


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


class _PieceDecoder:
    """The library's own decoding, so that spaces at the beginning and unknown pieces come out as `decode` has them.

    It depends on what came before only by whether that was any text, and by bytes of the same character: a piece is
    decoded after the first tokens that gave text, and bytes wait for the piece that ends them.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._first: list[int] = []  # the tokens up to the first text
        self._first_text = ""
        self._bytes: list[int] = []

    def __call__(self, token: int) -> str:
        if self._processor.is_byte(token):
            self._bytes.append(token)
            return ""
        return self._decode([token])

    def end(self) -> str:
        return self._decode([])

    def _decode(self, tokens: list[int]) -> str:
        tokens, self._bytes = self._bytes + tokens, []
        text = str(self._processor.decode(self._first + tokens))[len(self._first_text) :]
        if not self._first_text:
            self._first += tokens
            self._first_text = text
        return text


def tokenizer_from_json(value: Any, source: str) -> Tokenizer:
    """The tokenizer that `to_json` described. Raises InputError naming `source` where it cannot be read."""
    match value:
        case {"kind": "char", "characters": str(characters)} if len(set(characters)) == len(characters) > 0:
            return CharTokenizer(characters)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "bpe", "model": str(model)}:
            return BytePairTokenizer(model)
        case {"kind": "sentencepiece", "model": str(model)}:
            try:
                return SentencePieceTokenizer(base64.b64decode(model, validate=True))
            except binascii.Error:
                pass
    raise InputError(
        f"{source} does not describe a tokenizer (kind: char, byte, bpe or sentencepiece); restore it from a copy"
    )
