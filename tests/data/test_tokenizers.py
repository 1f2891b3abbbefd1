"""Tokenizers: what goes in comes back, piece by piece too, and survives being saved."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmixer.data.saved_tokenizers import tokenizer_from_json
from kmixer.data.sentence_pieces import SentencePieceTokenizer
from kmixer.data.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from kmixer.errors import InputError


@pytest.fixture(scope="module")
def pieces(text: str) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(text.splitlines(), 300)


@pytest.fixture(scope="module")
def pairs(text: str) -> BytePairTokenizer:
    return BytePairTokenizer.train([text], 400)


def decode_one_by_one(tokenizer: Tokenizer, text: str) -> str:
    decode = tokenizer.decoder()
    return "".join(decode(int(token)) for token in tokenizer.encode(text))


@given(st.text(min_size=1))
def test_characters_and_bytes_come_back(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()  # hypothesis makes lone surrogates, which no file holds
    for tokenizer in (CharTokenizer(text), ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert decode_one_by_one(tokenizer, text) == text


@given(st.text())
def test_byte_pairs_come_back_whatever_the_text(pairs: BytePairTokenizer, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert pairs.decode(pairs.encode(text)) == text
    assert decode_one_by_one(pairs, text) == text


def test_byte_pairs_are_learned_repeatably_and_saved(pairs: BytePairTokenizer, text: str) -> None:
    assert pairs.vocabulary_size == 400
    assert len(pairs.encode(text)) < 0.6 * len(text.encode())
    again = BytePairTokenizer.train([text], 400)
    loaded = tokenizer_from_json(json.loads(json.dumps(pairs.to_json())), "test")
    for other in (again, loaded):
        assert other.encode(text).tolist() == pairs.encode(text).tolist()
    assert loaded.unknown("\ud800 and more") == ["\ud800"]


def test_damaged_or_too_few_byte_pairs_are_one_line() -> None:
    with pytest.raises(InputError, match="the tokenizer's byte pairs cannot be read; restore it from a copy"):
        tokenizer_from_json({"kind": "bpe", "model": "{}"}, "test")
    with pytest.raises(InputError, match="vocabulary_size: got 100; kind 'bpe' has 256 or more"):
        BytePairTokenizer.train(["some text"], 100)


def test_the_character_vocabulary_is_sorted() -> None:
    tokenizer = CharTokenizer("hello world")
    assert tokenizer.characters == " dehlorw"
    assert tokenizer.encode("dew").tolist() == [1, 2, 7]


def test_unknown_characters_are_shown() -> None:
    with pytest.raises(InputError, match=r"does not know 'X', 'é'; it knows ' dehlorw'"):
        CharTokenizer("hello world").encode("hé X")


def test_pieces_come_back_but_for_white_space(pieces: SentencePieceTokenizer, text: str) -> None:
    sample = " ".join(text[:2000].split())
    assert pieces.decode(pieces.encode(sample)) == sample
    assert decode_one_by_one(pieces, sample).strip() == sample


def test_pieces_of_a_text_are_those_of_its_parts(pieces: SentencePieceTokenizer, text: str) -> None:
    """Encoding in blocks cut after white space, as token files do, is encoding the whole."""
    sample, rng = text[:5000], random.Random(0)
    cuts = sorted(rng.sample([i + 1 for i, c in enumerate(sample) if c in " \n"], 20))
    parts = [sample[a:b] for a, b in zip([0, *cuts], [*cuts, len(sample)], strict=True)]
    assert np.concatenate([pieces.encode(part) for part in parts]).tolist() == pieces.encode(sample).tolist()


def test_training_pieces_is_repeatable(pieces: SentencePieceTokenizer, text: str) -> None:
    again = SentencePieceTokenizer.train(text.splitlines(), 300)
    assert again.encode(text).tolist() == pieces.encode(text).tolist()


def test_unknown_pieces_are_shown(pieces: SentencePieceTokenizer) -> None:
    assert pieces.unknown("Hello 日本") == ["日本"]
    assert pieces.unknown("a dictionary") == []


def test_too_little_text_for_the_pieces_is_one_line() -> None:
    with pytest.raises(InputError, match="SentencePiece cannot train 5 pieces") as caught:
        SentencePieceTokenizer.train(["all the letters of the alphabet and then some"], 5)
    assert "\n" not in str(caught.value)


def test_saved_tokenizers_are_the_same(pieces: SentencePieceTokenizer, text: str) -> None:
    sample = text[:500]
    for tokenizer in (CharTokenizer(text), ByteTokenizer(), pieces):
        again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())), "test")
        assert again.encode(sample).tolist() == tokenizer.encode(sample).tolist()
        assert again.vocabulary_size == tokenizer.vocabulary_size


@pytest.mark.parametrize(
    "value", [{}, [], {"kind": "char"}, {"kind": "char", "characters": "aa"}, {"kind": "sentencepiece", "model": "%"}]
)
def test_damaged_tokenizer_files_are_named(value: object) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json does not describe a tokenizer"):
        tokenizer_from_json(value, "tokenizer.json")


def test_a_damaged_piece_model_is_named() -> None:
    with pytest.raises(InputError, match="SentencePiece model cannot be read"):
        tokenizer_from_json({"kind": "sentencepiece", "model": "AAAA"}, "tokenizer.json")
