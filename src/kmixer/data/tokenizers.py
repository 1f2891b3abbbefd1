"""Tokenizers: characters, bytes, byte pairs, and SentencePiece unigram pieces. Saved as JSON inside the run.

`encode` gives an int64 array; `unknown` the parts of a text that have no token; `decode` a string;
`decoder()` a `StreamDecoder`, which takes one token at a time and returns the text it completes; `encoder()` one that
takes a text block by block, of any length and with any lines, in constant memory.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import io
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from kmixer.data.blocks import BOUNDED_WORD, Cut, after_blank, before_word, cut_blocks, cut_line
from kmixer.errors import InputError

Tokens = npt.NDArray[np.int64]
Kind = Literal["char", "byte", "bpe", "sentencepiece"]

Encoder = Callable[[str, bool], Tokens]  # a block of text, and whether it is the last, to the tokens that are known

# SentencePiece reads its training text into memory: past this many lines it takes a sample of them.
MAX_TRAINING_LINES = 1_000_000
# Bytes of a line that SentencePiece leaves out of training; characters of the parts that such a line is cut into.
LONGEST_LINE, LINE_PART = 4192, 1000
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
        byte_of = {character: byte for byte, character in enumerate(_characters_of_bytes())}
        self._bytes = [bytes(byte_of[character] for character in piece) for piece in pieces]

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
        library.train_from_iterator(_few_long_words(cut_blocks(blocks, before_word), LONG_WORDS["bpe"]), trainer)
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

    def encoder(self) -> Encoder:
        return _BlockEncoder(self.encode, before_word)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bpe", "model": self._description}


_LONG_WORD = re.compile(rf"\S{{{LONG_WORD + 1},}}")


def _few_long_words(blocks: Iterable[str], characters: int) -> Iterator[str]:
    """The same text, without the long words that come after so many characters of such words."""
    left = characters

    def keep(word: re.Match[str]) -> str:
        nonlocal left
        left -= len(word[0])
        return word[0] if left > 0 else " "

    for block in blocks:
        yield _LONG_WORD.sub(keep, block)


def _characters_of_bytes() -> list[str]:
    """The printable character that stands for each byte in byte-level pairs: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + index) for index in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


class SentencePieceTokenizer:
    """Unigram pieces (Kudo 2018). White space is folded: tabs, newlines and repeated spaces come back as one space."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise InputError("the tokenizer's SentencePiece model cannot be read; restore it from a copy") from None

    @classmethod
    def train(cls, lines: Iterable[str], vocabulary_size: int, required: Iterable[str] = ()) -> SentencePieceTokenizer:
        """Train on lines of text. The vocabulary may come out smaller than asked for on small texts.

        `required` are characters that must have a piece, for lines that are a sample of the text.
        """
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_few_long_words(_training_lines(lines), LONG_WORDS["sentencepiece"]),
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
                required_chars=_normalised(required),
                input_sentence_size=MAX_TRAINING_LINES,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise InputError(
                f"SentencePiece cannot train {vocabulary_size} pieces on this text: {_reason(str(error))}"
            ) from None
        return cls(model.getvalue())

    @property
    def vocabulary_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def unknown_token(self) -> int:
        return int(self._processor.unk_id())

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

    def encoder(self) -> Encoder:
        return _PieceEncoder(self)

    def _inside(self) -> SentencePieceTokenizer:
        """The same pieces for a text that goes on inside a word: no space is put before it.

        Protocol buffers merge: what is appended, add_dummy_prefix = false in the normaliser, replaces what was said.
        """
        return SentencePieceTokenizer(self._model + b"\x1a\x02\x18\x00")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "sentencepiece", "model": base64.b64encode(self._model).decode()}


class _PieceEncoder:
    """Encodes up to the last blank, or up to anywhere in a word without end."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer, self._continuing = tokenizer, tokenizer._inside()
        self._rest, self._inside_word = "", False

    def __call__(self, block: str, final: bool) -> Tokens:
        text = self._rest + block
        end = len(text) if final else after_blank(text)
        ready, self._rest = text[:end], text[end:]
        if not ready:
            return np.zeros(0, dtype=np.int64)
        inside = self._inside_word and not ready[0].isspace()
        self._inside_word = ready[-1] not in " \n"
        return (self._continuing if inside else self._tokenizer).encode(ready)


def takes_a_sample(lines: Iterable[str]) -> bool:
    """Whether SentencePiece is trained on a part of these lines only."""
    count = characters = 0
    for line in _training_lines(lines):
        count += 1
        characters += sum(len(word) for word in _LONG_WORD.findall(line))
    return count > MAX_TRAINING_LINES or characters >= LONG_WORDS["sentencepiece"]


def _training_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines that SentencePiece takes all of: none too long, none with the sign it keeps for itself."""
    for line in lines:
        line = line.replace("\N{LOWER FIVE EIGHTHS BLOCK}", " ").replace("\0", " ")
        if len(line.encode()) <= LONGEST_LINE:
            yield line
        else:
            yield from cut_line(line, LINE_PART)


def _normalised(characters: Iterable[str]) -> str:
    """The characters that SentencePiece makes of these."""
    import sentencepiece

    normaliser = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc")
    made = {part for character in characters for part in normaliser.Normalize(character)}
    return "".join(sorted(made - set(" \u2581")))


def _reason(message: str) -> str:
    """What the library means; its own words name its source code."""
    if needed := re.search(r"required_chars\. (\d+) vs (\d+)", message):
        return f"its characters alone need {needed[2]}; give tokenizer.vocabulary_size = {needed[2]} or more"
    if "sentences_.empty()" in message:
        return "it holds no words"
    return re.sub(r"^.*\] ?", "", " ".join(message.split())) or "it is too short or too uniform"


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
