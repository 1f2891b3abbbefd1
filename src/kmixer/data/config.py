"""Configuration of the data: which text, how it is split, and how it is cut into tokens."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from kmixer.config import StrictConfig
from kmixer.data.tokenizers import ByteTokenizer, Kind


class DataConfig(StrictConfig):
    """A corpus and its split."""

    corpus: str  # a registered name, a text file, or a folder of text files
    # A fraction of the characters at the end, or the files that are held out. None: the corpus's own split.
    validation: Annotated[float, Field(gt=0, lt=1)] | Annotated[list[str], Field(min_length=1)] | None = None


class TokenizerConfig(StrictConfig):
    """A tokenizer. Training replaces `vocabulary_size` by what the corpus gave (char, sentencepiece)."""

    kind: Kind
    vocabulary_size: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "byte" and self.vocabulary_size != ByteTokenizer.vocabulary_size:
            raise ValueError(f"vocabulary_size: got {self.vocabulary_size}; kind 'byte' has 256")
        return self
