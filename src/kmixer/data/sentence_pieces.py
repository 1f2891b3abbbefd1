"""SentencePiece unigram pieces: the tokenizer, the text it is trained on, and its work block by block."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from kmixer.data.blocks import after_blank, cut_line
from kmixer.data.tokenizers import A_LONG_WORD, LONG_WORDS, Encoder, StreamDecoder, Tokens, few_long_words
from kmixer.errors import InputError

# SentencePiece reads its training text into memory: past this many lines it takes a sample of them.
MAX_TRAINING_LINES = 1_000_000
# Bytes of a line that SentencePiece leaves out of training; characters of the parts that such a line is cut into.
LONGEST_LINE, LINE_PART = 4192, 1000


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
                sentence_iterator=few_long_words(_training_lines(lines), LONG_WORDS["sentencepiece"]),
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
        characters += sum(len(word) for word in A_LONG_WORD.findall(line))
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
