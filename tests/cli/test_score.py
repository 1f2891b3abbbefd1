"""kmixer score, eval and generate on any text: files, standard input, packaged models."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kmixer
from tests.cli.conftest import Answer, Run

MODEL = "shakespeare-small"
TEXT = "KING:\nWhat is the matter, my good lord?\n\nQueen:\nNothing but the zzzqqqxx of the night.\n"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text(TEXT)
    return path


def type_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def objects(answer: Answer) -> list[dict[str, Any]]:
    assert answer.code == 0, answer
    return [json.loads(line) for line in answer.out.splitlines()]


def test_the_most_surprising_lines_come_first(kmixer_command: Run, other: Path) -> None:
    answer = kmixer_command("score", MODEL, other, "--top", 2)
    assert answer.code == 0, answer
    head, columns, first, second = answer.out.splitlines()
    assert head.startswith(f"5 lines, {len(TEXT)} bytes, {len(TEXT) - 1} tokens: ")
    assert "most surprising first" in columns
    assert first.split()[0] == "5"
    assert float(first.split()[1]) > float(second.split()[1])
    assert len(kmixer_command("score", MODEL, other, "--top", 0).out.splitlines()) == 1


def test_lines_and_tokens_as_json_lines_from_standard_input(
    kmixer_command: Run, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        json.loads(line) for line in kmixer_command("score", MODEL, other, "--per", "line", "--json").out.splitlines()
    ]
    assert [line["text"] for line in lines] == TEXT.splitlines()
    type_in(monkeypatch, TEXT.encode())
    streamed = kmixer_command("score", MODEL, "-", "--per", "line", "--json").out.splitlines()
    assert [json.loads(line) for line in streamed] == lines
    tokens = [
        json.loads(line) for line in kmixer_command("score", MODEL, other, "--per", "token", "--json").out.splitlines()
    ]
    assert "".join(token["token"] for token in tokens) == TEXT
    assert tokens[0] == {"line": 1, "token": "K", "nats": None}
    assert sum(token["nats"] or 0 for token in tokens) == pytest.approx(sum(line["nats"] for line in lines), rel=1e-5)
    summary, *top = objects(kmixer_command("score", MODEL, other, "--json"))
    assert summary["nats"] == pytest.approx(sum(line["nats"] for line in lines))
    assert top[0]["line"] == 5
    measured = json.loads(kmixer_command("eval", MODEL, "--text", other, "--protocol", "stream", "--json").out)
    assert measured["loss"] == pytest.approx(summary["nats_per_token"], rel=1e-5)
    assert "What is the matter" in kmixer_command("score", MODEL, other, "--per", "line").out
    assert "'\\n'" in kmixer_command("score", MODEL, other, "--per", "token").out


def test_a_line_is_printed_as_soon_as_it_is_known() -> None:
    program = [sys.executable, "-m", "kmixer", "score", MODEL, "-", "--per", "line", "--json"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        for number in (1, 2):
            process.stdin.write(b"What is the matter?\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["line"] == number
        process.stdin.close()
        assert process.wait(timeout=300) == 0


def test_what_cannot_be_scored_is_one_line(
    kmixer_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.txt"
    for content, message in {
        b"": "fewer than 2 tokens",
        b"K": "fewer than 2 tokens",
        b"KING\n12\n": "line 2: the tokenizer does not know '1', '2'",
        b"caf\xe9": "is not UTF-8 text at byte 3",
    }.items():
        path.write_bytes(content)
        assert message in kmixer_command("score", MODEL, path).error()
        type_in(monkeypatch, content)
        assert message in kmixer_command("score", MODEL, "-").error()
    os.mkfifo(tmp_path / "pipe")
    for source, message in {
        tmp_path / "none": "no such file",
        tmp_path / "pipe": "not a regular file; give a file, or - for standard input",
        Path("/dev/zero"): "not a regular file",
        tmp_path: "not a regular file",
    }.items():
        assert message in kmixer_command("score", MODEL, source).error()
        assert message in kmixer_command("eval", MODEL, "--text", source).error()
        assert message in kmixer_command("generate", MODEL, "--prompt-file", source).error()
    assert "--top: got -1" in kmixer_command("score", MODEL, path, "--top", -1).error()
    assert "--window: got 1; allowed: 2 or more" in kmixer_command("score", MODEL, path, "--window", 1).error()


def test_any_text_is_measured_with_any_model(
    kmixer_command: Run, other: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = kmixer_command("eval", MODEL, "--text", other)
    assert shown.out.startswith(f"{other}, {len(TEXT) - 1} tokens, windows of {len(TEXT) - 1}, state reset")
    type_in(monkeypatch, TEXT.encode())
    assert kmixer_command("eval", MODEL, "--text", "-").out.splitlines()[1:] == shown.out.splitlines()[1:]
    assert json.loads(kmixer_command("eval", MODEL, "--text", other, "--window", 16, "--json").out)["window"] == 16
    assert "has no data beside it; give a text" in kmixer_command("eval", MODEL).error()
    assert "give one of them" in kmixer_command("eval", MODEL, "--text", other, "--corpus", other).error()
    (tmp_path / "empty").touch()
    assert "the text is empty" in kmixer_command("eval", MODEL, "--text", tmp_path / "empty").error()


def test_perplexity_a_word_has_four_digits_or_a_reason(kmixer_command: Run, other: Path, tmp_path: Path) -> None:
    from kmixer.cli.evaluate import per_word

    assert [per_word(value) for value in (3.14159, 1234.56, 98765.4, 0.9)] == ["3.142", "1,235", "98,770", "0.9"]
    for value in (None, 1e7, 1e300):
        assert per_word(value).startswith("left out: ")
    (tmp_path / "letters").write_text("ACGT" * 500)
    assert "perplexity per word left out" in kmixer_command("eval", MODEL, "--text", tmp_path / "letters").out


def test_a_run_is_measured_where_its_corpus_is_now(
    kmixer_command: Run, recipe_file: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert kmixer_command("train", recipe_file, "--out", run, "--set", "training.steps=2").code == 0
    there = kmixer_command("eval", run, "--json").out
    moved = text_file.rename(tmp_path / "moved.txt")
    assert kmixer_command("eval", run, "--corpus", moved, "--json").out == there
    moved.write_text(moved.read_text() + "more")
    assert "is not what" in kmixer_command("eval", run, "--corpus", moved).error()
    other = kmixer_command("eval", run, "--text", moved, "--json")
    assert json.loads(other.out)["tokens"] > json.loads(there)["tokens"]
    assert kmixer_command("score", run, moved).code == 0


def test_bytes_are_measured_and_scored(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "raw.bin").write_bytes(bytes(range(256)) * 20)
    run = tmp_path / "run"
    settings = ["tokenizer.kind=byte", "tokenizer.vocabulary_size=256", "training.steps=2", "data.encoding=bytes"]
    options = [part for setting in [*settings, f"data.corpus={tmp_path / 'raw.bin'}"] for part in ("--set", setting)]
    answer = kmixer_command("train", recipe_file, "--out", run, *options)
    assert answer.code == 0, answer
    for extra in ([], ["--text", tmp_path / "raw.bin"]):
        answer = kmixer_command("eval", run, *extra)
        assert "bits per byte" in answer.out
        assert "bits per character" not in answer.out
    assert kmixer_command("score", run, tmp_path / "raw.bin").out.startswith("21 lines, 5,120 bytes, 5,119 tokens")


def test_a_prompt_comes_from_a_file_or_standard_input(
    kmixer_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max-new-tokens", 12, "--seed", 1]
    given = kmixer_command("generate", MODEL, "--prompt", "KING:\nNo", *options)
    (tmp_path / "prompt.txt").write_text("\ufeffKING:\nNo", encoding="utf-8")
    assert kmixer_command("generate", MODEL, "--prompt-file", tmp_path / "prompt.txt", *options).out == given.out
    type_in(monkeypatch, b"KING:\nNo")
    assert kmixer_command("generate", MODEL, "--prompt-file", "-", *options).out == given.out
    for wrong in ([], ["--prompt", "a", "--interactive"], ["--prompt", "a", "--prompt-file", "-"]):
        assert "give one of --prompt TEXT" in kmixer_command("generate", MODEL, *wrong).error()
    assert "does not know '#'" in kmixer_command("generate", MODEL, "--prompt", "#").error()


def test_lines_are_continued_in_turn_with_the_state_carried(
    kmixer_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--max-new-tokens", 10, "--temperature", 0]
    type_in(monkeypatch, b"KING:\nW#rong\nROMEO:\n\nnot read\n")
    answer = kmixer_command("generate", MODEL, "--interactive", *options)
    assert answer.code == 0, answer
    assert answer.err == "error: the tokenizer does not know '#'\n"
    first = kmixer_command("generate", MODEL, "--prompt", "KING:", *options).out
    whole = kmixer_command("generate", MODEL, "--prompt", first + "ROMEO:", *options).out
    assert answer.out == first.removeprefix("KING:") + whole.removeprefix(first + "ROMEO:")
    type_in(monkeypatch, b"KING:")
    assert kmixer_command("generate", MODEL, "--interactive", *options).out == first.removeprefix("KING:")


def test_a_terminal_is_asked(kmixer_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import pty

    master, slave = pty.openpty()
    with os.fdopen(slave, encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(master, b"KING:\n\n")
        answer = kmixer_command("generate", MODEL, "--interactive", "--max-new-tokens", 5)
    os.close(master)
    assert answer.code == 0
    assert len(answer.out) == 6
    assert answer.err == "> > "


def test_the_version_is_said(kmixer_command: Run) -> None:
    assert kmixer_command("--version").out == f"kmixer {kmixer.__version__}\n"
