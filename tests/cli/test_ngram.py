"""kmixer ngram: counts of a run's training text, in a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import kmixer
from kmixer.generation.ngrams import Ngrams, count_ngrams
from tests.cli.conftest import Run


@pytest.fixture
def run(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> Path:
    assert kmixer_command("train", recipe_file, "--out", tmp_path / "run", "--set", "training.steps=2").code == 0
    return tmp_path / "run"


def test_the_training_part_is_counted(kmixer_command: Run, run: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "counts.safetensors"
    answer = kmixer_command("ngram", run, "--order", 3, "--out", out)
    assert answer.code == 0, answer
    assert answer.out.splitlines()[0].startswith("18,000 tokens; contexts by length: ")
    counted = Ngrams.load(out)
    tokenizer = kmixer.load(run).tokenizer
    assert tokenizer is not None and counted.tokenizer == tokenizer.to_json()
    tokens = tokenizer.encode(text)
    expected = count_ngrams(tokens[:18_000], tokenizer.vocabulary_size, 3)
    for start in range(0, 18_000, 1000):
        assert np.array_equal(counted.row(tokens[:start].tolist()), expected.row(tokens[:start].tolist()))

    assert f"{out} exists; add --force to replace it" in kmixer_command("ngram", run, "--out", out).error()
    figures = json.loads(kmixer_command("ngram", run, "--out", out, "--force", "--json").out)
    assert figures["order"] == Ngrams.load(out).order == 5
    assert figures["bytes"] == out.stat().st_size
    assert len(figures["contexts"]) == 4


def test_wrong_input_is_one_line(kmixer_command: Run, run: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "counts.safetensors"
    assert "order: got 0; allowed: 1 to 16" in kmixer_command("ngram", run, "--order", 0, "--out", out).error()
    assert "holds no run" in kmixer_command("ngram", "shakespeare-small", "--out", out).error()
    moved = text_file.rename(tmp_path / "moved.txt")
    assert "--corpus FILE says where it is now" in kmixer_command("ngram", run, "--out", out).error()
    assert kmixer_command("ngram", run, "--corpus", moved, "--out", out).code == 0
    moved.write_text("another text " * 2000)
    assert "the data is not what" in kmixer_command("ngram", run, "--corpus", moved, "--out", out, "--force").error()
