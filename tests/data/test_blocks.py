"""A text in blocks has the tokens of the whole, in constant memory, whatever its lines."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmixer.data import blocks, tokenizers
from kmixer.data.blocks import LONGEST_WAIT, after_blank, before_word, cut_blocks, cut_line
from kmixer.data.config import DataConfig, TokenizerConfig
from kmixer.data.saved_tokenizers import tokenizer_from_json
from kmixer.data.sentence_pieces import SentencePieceTokenizer
from kmixer.data.token_files import prepare_dataset
from kmixer.data.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer, Tokens


def in_blocks(tokenizer: Tokenizer, text: str, sizes: list[int]) -> Tokens:
    encode, parts, start = tokenizer.encoder(), [], 0
    while start < len(text):
        size = sizes[len(parts) % len(sizes)]
        parts.append(encode(text[start : start + size], False))
        start += size
    return np.concatenate([*parts, encode("", True)])


@pytest.fixture(scope="module")
def pairs(text: str) -> BytePairTokenizer:
    return BytePairTokenizer.train([text], 400)


@pytest.fixture(scope="module")
def pieces(text: str) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(text.splitlines(), 300)


WORDS = st.lists(
    st.sampled_from(["a", "the", "if\n", " ", "\n\n", "\t", "\u3000", "!", "Käse", "日本", "x" * 300, "  "])
)


@given(WORDS.map("".join), st.lists(st.integers(1, 700), min_size=1))
def test_byte_pairs_of_blocks_are_those_of_the_whole(pairs: BytePairTokenizer, text: str, sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "LONGEST_WAIT", 600)
        for tokenizer in (pairs, ByteTokenizer(), CharTokenizer(text or "a")):
            assert in_blocks(tokenizer, text, sizes).tolist() == tokenizer.encode(text).tolist()


@given(WORDS.map("".join), st.lists(st.integers(1, 700), min_size=1))
def test_pieces_of_blocks_give_the_text_of_the_whole(
    pieces: SentencePieceTokenizer, text: str, sizes: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "LONGEST_WAIT", 600)
        assert pieces.decode(in_blocks(pieces, text, sizes)) == pieces.decode(pieces.encode(text))


@given(st.text(alphabet="ab \n\t\u3000"), st.lists(st.integers(1, 9), min_size=1))
def test_cutting_loses_nothing(text: str, sizes: list[int]) -> None:
    starts = np.cumsum([0, *sizes, len(text)]).tolist()
    parts = [text[a:b] for a, b in itertools.pairwise(starts)]
    for cut in (before_word, after_blank):
        assert "".join(cut_blocks(parts, cut)) == "".join(parts)
    assert "".join(cut_line(text, 3)) == text
    assert all(len(part) <= 3 for part in cut_line(text, 3))


def test_words_of_byte_pairs_are_bounded_and_blanks_stay_with_their_words(pairs: BytePairTokenizer) -> None:
    text = "x" * 1000
    assert pairs.decode(pairs.encode(text)) == text
    assert pairs.encode(text).tolist() == 3 * pairs.encode("x" * 256).tolist() + pairs.encode("x" * 232).tolist()
    assert len(BytePairTokenizer.train(["a b" * 500], 300).encode("a b")) < 3


def test_byte_pairs_trained_before_words_were_bounded_still_encode_the_same(text: str) -> None:
    """The description that such a run holds, made as it was made then."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    )
    old = tokenizer_from_json({"kind": "bpe", "model": library.to_str()}, "test")
    sample = text + "x" * 5000
    assert old.encode(sample).tolist() == library.encode(sample).ids
    now = BytePairTokenizer.train([text], 400)
    assert json.loads(now.to_json()["model"])["model"] == json.loads(library.to_str())["model"]
    assert now.encode(text).tolist() == library.encode(text).ids
    long = "ACGT" * 50_000
    assert old.decode(in_blocks(old, long, [70_000])) == long


def test_byte_pairs_train_on_text_without_blanks_in_time_that_grows_with_it() -> None:
    letters = "".join(random.Random(0).choices("ACGT", k=400_000))
    seconds = []
    for length in (100_000, 400_000):
        began = time.process_time()
        tokenizer = BytePairTokenizer.train([letters[:length]], 300)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 10 * seconds[0]  # 4 where it is linear; it was 50
    assert tokenizer.decode(tokenizer.encode(letters)) == letters


def test_few_long_words_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokenizers.LONG_WORDS, "bpe", 250)
    tokenizer = BytePairTokenizer.train(["a" * 100 + " " + "b" * 100 + " " + "c" * 100 + " d e" * 50], 280)
    assert len(tokenizer.encode("a" * 50)) < 20
    assert len(tokenizer.encode("c" * 50)) == 50


@pytest.mark.parametrize("kind", ["lines", "one line", "letters"])
def test_no_training_text_is_unknown_to_pieces_whatever_its_lines(text: str, kind: str, tmp_path: Path) -> None:
    words = text.replace("\n", " ")
    rare = "".join(map(chr, range(0x4E00, 0x4E40)))
    content = {
        "lines": "\n".join(words[i : i + 6000] for i in range(0, len(words), 6000)) + "\n" + rare + words[:5000],
        "one line": words + rare,
        "letters": "".join(random.Random(0).choices("ACGTN", k=48_502)),
    }[kind]
    path = tmp_path / "long.txt"
    path.write_text(content + "\n" + "a" * 5000, encoding="utf-8")
    asked = TokenizerConfig(kind="sentencepiece", vocabulary_size=400)
    dataset = prepare_dataset(DataConfig(corpus=str(path), validation=0.05), asked)
    assert dataset.train.counts.unknown == 0
    assert not any("unknown" in note for note in dataset.notes)
    if kind != "letters":
        assert dataset.tokenizer.vocabulary_size == 400
    assert dataset.train.characters and len(dataset.train.tokens) < dataset.train.characters


def test_a_sample_of_the_lines_still_knows_every_character(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kmixer.data.token_files.TRAINING_CHARACTERS", {"bpe": 4000, "sentencepiece": 4000})
    monkeypatch.setattr("kmixer.data.reading.READ_BYTES", 2000)
    for kind in ("sentencepiece", "bpe"):
        monkeypatch.setitem(tokenizers.LONG_WORDS, kind, 100)
    path = tmp_path / "text.txt"
    path.write_text(text[:15_000] + "x" * 99 + "語" * 100 + "日本語" + text[15_000:], encoding="utf-8")
    for kind in ("sentencepiece", "bpe"):
        asked = TokenizerConfig(kind=kind, vocabulary_size=300)  # type: ignore[arg-type]
        dataset = prepare_dataset(DataConfig(corpus=str(path), validation=0.1), asked)
        assert dataset.train.counts.unknown == 0
        assert "日本語" in dataset.tokenizer.decode(dataset.train.tokens.tolist())


def test_a_vocabulary_that_the_text_does_not_reach_is_said(tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text("a few words, a few words\n" * 40)
    for kind in ("sentencepiece", "bpe"):
        asked = TokenizerConfig(kind=kind, vocabulary_size=900)  # type: ignore[arg-type]
        dataset = prepare_dataset(DataConfig(corpus=str(path)), asked)
        size = dataset.tokenizer.vocabulary_size
        assert dataset.notes == (f"the text gives no more than {size} of the 900 tokens asked for",)
    path.write_text("a few words, ▅ and more\n" * 40)
    dataset = prepare_dataset(DataConfig(corpus=str(path)), TokenizerConfig(kind="sentencepiece", vocabulary_size=40))
    assert "36 tokens of the training part are unknown to the tokenizer" in dataset.notes[-1]


PEAK = """
import resource, sys
from kmixer.data import token_files, tokenizers
from kmixer.data.config import DataConfig, TokenizerConfig
token_files.TRAINING_CHARACTERS = {"bpe": 1 << 16, "sentencepiece": 1 << 16}
tokenizers.LONG_WORDS |= {"bpe": 1 << 16, "sentencepiece": 1 << 13}
kind, path = sys.argv[1:]
config = TokenizerConfig(kind=kind, vocabulary_size=256 if kind == "byte" else 300)
dataset = token_files.prepare_dataset(DataConfig(corpus=path), config)
print(dataset.train.bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "sentencepiece"])
def test_one_line_without_end_is_prepared_in_constant_memory(kind: str, tmp_path: Path) -> None:
    letters = "".join(random.Random(0).choices("ACGT", k=1 << 18))
    peaks = []
    for megabytes in (2, 8):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w") as file:
            for _ in range(4 * megabytes):
                file.write(letters)
        answer = subprocess.run(
            [sys.executable, "-c", PEAK, kind, str(path)], capture_output=True, text=True, check=True
        )
        size, kilobytes = map(int, answer.stdout.split())
        assert size > 0.89 * megabytes * (1 << 20)
        peaks.append(kilobytes / 1024)
    assert peaks[1] - peaks[0] < 5  # megabytes; the text grew by 6


def test_waiting_for_a_blank_ends() -> None:
    for cut in (before_word, after_blank):
        assert cut("x" * (LONGEST_WAIT - 1)) == 0
        assert cut("x" * 2 * LONGEST_WAIT) > LONGEST_WAIT
    assert before_word(" " * 2 * LONGEST_WAIT) > LONGEST_WAIT
