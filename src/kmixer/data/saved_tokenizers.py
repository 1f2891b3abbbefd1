"""Tokenizers as JSON, as they lie inside a run."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from kmixer.data.sentence_pieces import SentencePieceTokenizer
from kmixer.data.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from kmixer.errors import InputError


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
