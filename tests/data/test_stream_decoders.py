"""Decoding one token at a time gives what decoding all at once does, whatever the tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from kmixer.data.sentence_pieces import SentencePieceTokenizer
from kmixer.data.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer

KINDS = ("char", "byte", "bpe", "sentencepiece", "sentencepiece with bytes", "sentencepiece that keeps spaces")


def trained(text: str, **options: object) -> SentencePieceTokenizer:
    """Pieces as another program would have trained them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, vocab_size=400, minloglevel=2, **options
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module")
def tokenizers(text: str) -> dict[str, Tokenizer]:
    made: list[Tokenizer] = [
        CharTokenizer(text),
        ByteTokenizer(),
        BytePairTokenizer.train([text], 400),
        SentencePieceTokenizer.train(text.splitlines(), 300),
        trained(text, byte_fallback=True),
        trained(text, remove_extra_whitespaces=False, normalization_rule_name="identity"),
    ]
    return dict(zip(KINDS, made, strict=True))


def streamed(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    decoder = tokenizer.decoder()
    return "".join(map(decoder, tokens)) + decoder.end()


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_joined_are_the_text_of_all_tokens(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size - 1), max_size=12))
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_prompt_and_what_follows_are_one_text(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size - 1), max_size=12))
    decoder = tokenizer.decoder()
    answers = [decoder(token) for token in tokens]
    answers.append(decoder.end())
    assert "".join(answers) == tokenizer.decode(tokens)
    if kind in ("char", "sentencepiece"):  # nothing is ever cut: every answer is final when it is given
        for count in range(len(tokens)):
            assert "".join(answers[:count]) == tokenizer.decode(tokens[:count])


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_cut_character_is_shown_at_the_end(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    tokens = tokenizer.encode("a☃").tolist()
    assert streamed(tokenizer, tokens) == "a☃"
    assert streamed(tokenizer, tokens[:-1]) == tokenizer.decode(tokens[:-1]) == "a\N{REPLACEMENT CHARACTER}"


def test_an_unknown_piece_is_the_sign_that_decode_gives(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    tokens = tokenizer.encode("the ☃ of").tolist()
    assert 0 in tokens
    assert "<unk>" not in streamed(tokenizer, tokens)
    assert streamed(tokenizer, tokens) == tokenizer.decode(tokens)
