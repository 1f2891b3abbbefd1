"""Configuration of the data: which text, how it is split, and how it is cut into tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kmixer.config import StrictConfig, Vocabulary
from kmixer.data.reading import Encoding
from kmixer.data.tokenizers import ByteTokenizer, Kind

Split = float | list[str]


class DataConfig(StrictConfig):
    """A corpus and its split: training part, validation part, test part, in this order in the text."""

    corpus: Annotated[str, Field(min_length=1)]  # a registered name, a file, or a folder of files
    files: Annotated[str, Field(min_length=1)] | None = None  # of a folder: a pattern such as "*.py"
    field: Annotated[str, Field(min_length=1)] | None = None  # of JSON lines or a table: where the text is
    encoding: Encoding = "utf-8"  # bytes: files as they are, for kind "byte"; splits then count bytes
    # A fraction of the characters at the end, or the files that are held out. None: the corpus's own split.
    validation: Split | None = None
    # Held out from training and from the choice of a checkpoint, and measured once, when training ends.
    test: Split | None = None

    @model_validator(mode="before")
    @classmethod
    def _splits(cls, values: Any) -> Any:
        for key in ("validation", "test"):
            split = values.get(key) if isinstance(values, dict) else None
            fraction = isinstance(split, float) and 0 < split < 1
            files = isinstance(split, list) and len(split) > 0 and all(isinstance(name, str) for name in split)
            if split is not None and not fraction and not files:
                raise ValueError(f"{key}: got {split!r}; allowed: a fraction between 0 and 1, or a list of file names")
        return values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.field is not None and self.encoding == "bytes":
            raise ValueError(f"field {self.field!r} with encoding 'bytes'; a field holds text: leave encoding out")
        if self.test is None:
            return self
        if type(self.test) is not type(self.validation):
            raise ValueError(
                f"test {self.test!r} with validation {self.validation!r}; give both as fractions or both as files"
            )
        if isinstance(self.test, float) and isinstance(self.validation, float) and self.test + self.validation >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave nothing for training")
        return self


class TokenizerConfig(StrictConfig):
    """A tokenizer. `vocabulary_size` is replaced by what there is: 256 bytes, or what the corpus gave in training."""

    kind: Kind
    vocabulary_size: Vocabulary

    @model_validator(mode="before")
    @classmethod
    def _count_bytes(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "byte":
            return {**values, "vocabulary_size": ByteTokenizer.vocabulary_size}
        return values


Augmentation = Literal["none", "shift", "shift_and_flip", "deit"]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class ImageDataConfig(StrictConfig):
    """Labelled images and their split: the rest of the fractions is the training part."""

    dataset: Annotated[str, Field(min_length=1)]  # digits, a name of a file NAME.npz, or a path to one
    validation: Annotated[float, Field(gt=0, lt=1)]
    test: Fraction = 0.0  # 0 where the dataset has a test part of its own
    augment: Augmentation = "none"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave nothing for training")
        return self


class SequenceDataConfig(StrictConfig):
    """Labelled token sequences; see `kmixer.data.sequences`."""

    dataset: Literal["listops", "listops-short", "scifar", "imdb"]
    length: Annotated[int, Field(ge=1, le=1 << 24)]  # longer sequences are cut
    # ListOps: of the training part, which is as large as asked for. scifar, imdb: what is kept of the training file,
    # its first images or reviews drawn by `seed`; `validation` is cut from it. None is all; test parts stay whole.
    examples: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0  # of what is generated or drawn
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of scifar and imdb; ListOps brings its own
