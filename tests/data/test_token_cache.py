"""Token files: what was written is read, or made again; and what happens to them later reaches nobody."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kmixer.data.config import DataConfig, TokenizerConfig
from kmixer.data.corpora import Corpus
from kmixer.data.reading import Block
from kmixer.data.token_files import Dataset, prepare_dataset
from kmixer.errors import InputError

CHAR = TokenizerConfig(kind="char", vocabulary_size=1)
MADE_AGAIN = "the token files in the cache were damaged, and were made again"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kmixer" / "tokens"


def prepare(text_file: Path) -> Dataset:
    return prepare_dataset(DataConfig(corpus=str(text_file), validation=0.2, test=0.1), CHAR)


def texts(dataset: Dataset) -> list[str]:
    assert dataset.test
    return [dataset.tokenizer.decode(s.tokens.tolist()) for s in (dataset.train, dataset.validation, dataset.test)]


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def edit_counts(path: Path) -> None:
    meta = json.loads(path.read_text())
    meta["parts"]["validation"]["bytes"] *= 2
    path.write_text(json.dumps(meta))


def drop_a_part(path: Path) -> None:
    meta = json.loads(path.read_text())
    del meta["parts"]["validation"]
    path.write_text(json.dumps(meta))


def other_dtype(path: Path) -> None:
    path.write_text(path.read_text().replace("uint8", "int16"))


def nest(path: Path) -> None:
    path.write_text("[" * 100_000)


def make_fifo(path: Path) -> None:
    """Opening it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


DAMAGES = [
    *((f"{part}.bin", damage) for part in ("train", "validation", "test") for damage in (zero, flip, cut, os.remove)),
    *((name, make_fifo) for name in ("train.bin", "meta.json")),
    *(("meta.json", damage) for damage in (edit_counts, drop_a_part, other_dtype, nest, zero, cut)),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_every_damage_is_noticed_and_made_good(
    text_file: Path, cache: Path, name: str, damage: Callable[[Path], None]
) -> None:
    first = prepare(text_file)
    assert prepare(text_file).notes == ()
    (folder,) = cache.iterdir()
    damage(folder / name)
    again = prepare(text_file)
    assert MADE_AGAIN in again.notes
    assert texts(again) == texts(first)
    assert again.validation.counts == first.validation.counts
    assert prepare(text_file).notes == ()


def test_an_open_dataset_keeps_its_tokens_whatever_happens_to_the_files(text_file: Path, cache: Path) -> None:
    dataset = prepare(text_file)
    before = texts(dataset)
    (folder,) = cache.iterdir()
    for part in ("train", "validation", "test"):
        zero(folder / f"{part}.bin")
        os.truncate(folder / f"{part}.bin", 0)
    assert texts(dataset) == before
    shutil.rmtree(cache)
    assert texts(dataset) == before


def test_a_text_that_changes_between_its_hash_and_its_tokens_is_noticed(
    text_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Corpus.files
    readings = 0

    def changing(self: Corpus) -> Iterator[tuple[int, Block]]:
        nonlocal readings
        readings += 1
        if readings == 2:
            text_file.write_text(text_file.read_text()[::-1])
        return files(self)

    monkeypatch.setattr(Corpus, "files", changing)
    with pytest.raises(InputError, match="changed while it was read; start again"):
        prepare(text_file)
    assert not list(cache.rglob("*.bin")) + list(cache.rglob("*.tmp"))
