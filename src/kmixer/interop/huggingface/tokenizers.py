"""Tokenizers of all four kinds as the tokenizers library and transformers have them: equal tokens, equal text."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kmixer.data.tokenizers import Tokenizer, characters_of_bytes
from kmixer.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library
    from transformers import PreTrainedTokenizerFast

# What fills rows: a token of its own, as an existing one would vanish from decoded text.
PADDING = "<|pad|>"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what stands for a space in pieces
UNKNOWN = " \N{DOUBLE QUESTION MARK} "  # what SentencePiece decodes an unknown piece to


def library_of(tokenizer: Tokenizer) -> Library:
    """The tokenizer as one of the tokenizers library, with a token more: the one that fills rows up.

    Raises InputError for one of a kind that it does not know.
    """
    from tokenizers import AddedToken

    described = tokenizer.to_json()
    make = {"char": _characters, "byte": _bytes, "bpe": _byte_pairs, "sentencepiece": _pieces}.get(described["kind"])
    if make is None:
        raise InputError(f"tokenizer: got kind {described['kind']!r}; allowed: char, byte, bpe, sentencepiece")
    library = make(tokenizer, described)
    library.add_special_tokens([AddedToken(padding_of(library), special=True, normalized=False)])
    return library


def padding_of(library: Library) -> str:
    """The text of the token that fills rows, which is no token of the model's."""
    taken, name = library.get_vocab(with_added_tokens=False), PADDING
    while name in taken:
        name = f"<{name}>"
    return name


def settings_of(tokenizer: Tokenizer, padding: str) -> dict[str, Any]:
    """What tokenizer_config.json holds beside the class; under "kmixer" the tokenizer as a run holds it."""
    return {
        "pad_token": padding,
        "eos_token": padding,  # some tools insist on one
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that spells the name of a token is a text
        "kmixer": tokenizer.to_json(),
    }


def tokenizer_for(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers has it. A character that has no token raises where kmixer's raises."""
    from transformers import PreTrainedTokenizerFast

    library = library_of(tokenizer)
    padding = library.id_to_token(tokenizer.vocabulary_size)
    assert padding is not None
    return PreTrainedTokenizerFast(tokenizer_object=library, **settings_of(tokenizer, padding))


def _characters(tokenizer: Tokenizer, described: dict[str, Any]) -> Library:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    # Without a token for unknown words the model raises at one.
    vocabulary = {character: index for index, character in enumerate(described["characters"])}
    library = Library(models.WordLevel(vocabulary, unk_token=""))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    library.decoder = decoders.Fuse()
    return library


def _bytes(tokenizer: Tokenizer, described: dict[str, Any]) -> Library:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    library = Library(models.BPE({character: byte for byte, character in enumerate(characters_of_bytes())}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return library


def _byte_pairs(tokenizer: Tokenizer, described: dict[str, Any]) -> Library:
    from tokenizers import Tokenizer as Library

    return Library.from_str(described["model"])


def _pieces(tokenizer: Tokenizer, described: dict[str, Any]) -> Library:
    import sentencepiece
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library

    model = base64.b64decode(described["model"])
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    pieces = [(processor.id_to_piece(index), processor.get_score(index)) for index in range(processor.vocab_size())]
    library = Library(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=False))
    table = b"".join(_fields(b"".join(_fields(model, NORMALISER)), TABLE))
    folding = [normalizers.Replace(Regex(" +"), " "), normalizers.Strip()]
    library.normalizer = normalizers.Sequence([*([normalizers.Precompiled(table)] if table else []), *folding])
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    shown = decoders.Replace(processor.id_to_piece(processor.unk_id()), UNKNOWN)
    library.decoder = decoders.Sequence([shown, decoders.Metaspace(replacement=SPACE, prepend_scheme="always")])
    return library


# Numbers of fields in SentencePiece's model: how text is normalised, and in there the table of what becomes what.
NORMALISER, TABLE = 3, 2


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """The contents of a protocol buffer's fields of a number, those that are messages or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(message, at)
            continue
        length, at = {1: (8, at), 5: (4, at)}.get(kind) or _varint(message, at)
        if kind == 2 and key >> 3 == wanted:
            yield message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of as many bytes as it needs, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at
