"""kmixer generate --draft and kmixer bench speculate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kmixer
from kmixer.generation import Speculation
from tests.cli.conftest import Run


@pytest.fixture
def run(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> Path:
    assert kmixer_command("train", recipe_file, "--out", tmp_path / "run", "--set", "training.steps=2").code == 0
    return tmp_path / "run"


def test_a_draft_changes_no_letter(kmixer_command: Run, run: Path, tmp_path: Path) -> None:
    options = ["generate", run, "--prompt", "The ", "--max-new-tokens", 40, "--seed", 3, "--stop", "zq"]
    plain = kmixer_command(*options).out
    counts = tmp_path / "counts.safetensors"
    assert kmixer_command("ngram", run, "--order", 3, "--out", counts).code == 0
    for draft in (run, "ngram:3", counts, "lookup", "self:1"):
        answer = kmixer_command(*options, "--draft", draft, "--draft-tokens", 3)
        assert (answer.out, answer.err) == (plain, "")
    measured = kmixer_command(*options, "--draft", "ngram:3", "--draft-tokens", "auto", "--stats")
    assert measured.out == plain
    lines = measured.err.splitlines()
    assert (
        lines[0].startswith("40 tokens in ")
        and lines[0].endswith(" a second without a draft")
        and lines[1].startswith("kept ")
    )
    assert "nats per token" in lines[2] and lines[3].startswith("seconds: draft ")
    lossy = kmixer_command(
        *options, "--draft", run, "--draft-tokens", 3, "--accept", "cactus", "--delta", 0.5, "--stats"
    )
    assert lossy.code == 0 and "; acceptance " in lossy.err

    model = kmixer.load(run)
    drafted = model.generate("The ", 40, temperature=0.8, seed=3, draft="ngram:3", speculation=Speculation(tokens=2))
    assert drafted + "\n" == plain


def test_wrong_options_are_one_line(kmixer_command: Run, run: Path, tmp_path: Path) -> None:
    options = ["generate", run, "--prompt", "The "]
    for more, message in (
        (["--draft", "nothing"], "--draft: got 'nothing', which is no run folder; allowed: a run, ngram:N, lookup"),
        (["--draft", "ngram"], "draft: got 'ngram'; allowed: ngram:N, lookup"),
        (["--draft", "ngram:0"], "order: got 0; allowed: 1 to 16"),
        (["--draft", "self:5"], "draft: got self:5; allowed: 1 to 1"),
        (["--draft", "shakespeare-small"], "draft: it has other tokens (char, 65 tokens)"),
        (["--draft", "lookup", "--accept", "cactus"], "delta: got none; rule 'cactus' has no default"),
        (["--draft", "lookup", "--accept", "cactus", "--delta", -1], "delta: got -1.0; allowed: 0 (exact) or more"),
        (["--draft", "lookup", "--accept", "bounded", "--bound", -1], "bound: got -1.0; allowed: 0 (exact) or more"),
        (["--draft", "lookup", "--accept", "best"], "--accept: got 'best'; allowed: coupled, exact"),
        (["--draft", "lookup", "--draft-tokens", "x"], "--draft-tokens: got 'x'; allowed: 1 to 1,024, or auto"),
        (["--stats"], "--stats go with --draft"),
        (["--accept", "exact"], "go with --draft; add it"),
    ):
        assert message in kmixer_command(*options, *more).error()
    assert "--draft goes with --prompt" in kmixer_command("generate", run, "--interactive", "--draft", "lookup").error()
    bench = ["bench", "speculate", run]
    assert "repeats: got 0; allowed: 1 or more" in kmixer_command(*bench, "--repeats", 0).error()
    assert "drafted: got (0,); allowed: 1 or more" in kmixer_command(*bench, "--draft-tokens", 0).error()
    assert "bench speculate: got a text of" in kmixer_command(*bench, "--context", 5000).error()


def test_bench_says_what_is_accepted_and_what_it_costs(
    kmixer_command: Run, run: Path, text_file: Path, tmp_path: Path
) -> None:
    few = ["--context", 20, "--positions", 60, "--tokens", 8, "--repeats", 1, "--draft-tokens", 1, "--draft-tokens", 3]
    options = ["bench", "speculate", run, *few]
    rows = json.loads(kmixer_command(*options, "--draft", "ngram:2", "--json").out)["rows"]
    sections = [row["section"] for row in rows]
    assert sections == ["cost"] * 4 + ["acceptance"] + ["gain"] * 3
    assert [row["n"] for row in rows[:4]] == [0, 1, 2, 4] and all(row["seconds"] > 0 for row in rows[:4])
    accepted = rows[4]
    assert accepted["positions"] == 60 and accepted["proposed"] == 1
    assert 0 < accepted["rule"] == accepted["coupled"] <= accepted["exact"] <= 1
    assert [row["m"] for row in rows[5:]] == [1, 3, "auto"]
    for row in rows[5:]:
        assert row["tokens_per_second"] > 0 and row["plain_tokens_per_second"] > 0 and row["verification_seconds"] > 0
    assert all(row["measured"] > 0 for row in rows[5:]) and all(row["predicted"] > 0 for row in rows[5:7])

    itself = json.loads(kmixer_command(*options, "--draft", run, "--accept", "exact", "--json").out)["rows"]
    assert itself[4]["rule"] == pytest.approx(1, abs=1e-4)
    assert itself[6]["mean_emitted"] == 4
    page = kmixer_command(*options, "--draft", "lookup", "--accept", "bounded", "--bound", 0.1).out
    assert "x step" in page and "predicted x" in page and "proposed" in page

    moved = text_file.rename(tmp_path / "moved.txt")
    assert "--corpus FILE says where it is now" in kmixer_command(*options, "--draft", "ngram:2").error()
    again = json.loads(kmixer_command(*options, "--draft", "ngram:2", "--corpus", moved, "--json").out)["rows"]
    assert again[4] == accepted
