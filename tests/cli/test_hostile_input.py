"""What a shell, a file system or a terminal can do to a command: one line, no hang, nothing ignored."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from kmixer.cli.main import run as run_command
from tests.cli.conftest import Run
from tests.conftest import tiny_recipe_values


def recipe_of(folder: Path, corpus: Path, **training: Any) -> Path:
    values = tiny_recipe_values(corpus)
    values["training"] |= {"steps": 2, "evaluate_every": 1, "warmup_steps": 1} | training
    (folder / "tiny.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    return folder / "tiny.toml"


@pytest.fixture
def cyrillic(tmp_path: Path) -> Path:
    """A text whose letters no ASCII terminal can show."""
    (tmp_path / "книга.txt").write_text("в начале было слово, и слово было у бога. " * 100, encoding="utf-8")
    return tmp_path / "книга.txt"


HUGE = [
    ("model.width=2147483648", "model.width: got 2147483648; it should be less than or equal to 65536"),
    ("model.layers=1000000", "model.layers: got 1000000; it should be less than or equal to 1024"),
    ("model.rank=99999999999", "model.rank: got 99999999999"),
    ("tokenizer.vocabulary_size=2147483648", "tokenizer.vocabulary_size: got 2147483648"),
    ("training.batch_size=99999999999999999999999", "training.batch_size: got 99999999999999999999999"),
    ("training.window=9223372036854775808", "training.window: got 9223372036854775808"),
    ("training.seed=18446744073709551616", "training.seed: got 18446744073709551616"),
    ("model.width=" + "9" * 5_000, "it holds a number of too many digits"),
    ("model.width=" + "[" * 10_000, "is nested more than 32 deep"),
    ("model.width=" + "[" * 40 + "]" * 40, "is nested more than 32 deep"),
    ("training.steps=1\nfoo=2", r"--set training.steps=1\nfoo=2: it sets more than one key; give --set once for each"),
    ("training.steps=1\n[model]\nwidth=8", "it sets more than one key"),
    ("model" + ".a" * 5_000 + "=1", "unknown key"),
]


@pytest.mark.parametrize(("setting", "message"), HUGE)
def test_settings_beyond_any_model(
    kmixer_command: Run, recipe_file: Path, tmp_path: Path, setting: str, message: str
) -> None:
    for command in (["params", recipe_file], ["train", recipe_file, "--out", tmp_path / "run"]):
        error = kmixer_command(*command, "--set", setting).error()
        assert message in error
        assert len(error) < 1000
    assert not (tmp_path / "run").exists()


def test_where_a_key_is_text_the_text_is_taken(kmixer_command: Run, recipe_file: Path) -> None:
    for text in ("1984", "2024-01-01", "0.5", "true", "[1, 2]", "nan"):
        answer = kmixer_command("train", recipe_file, "--set", f"data.corpus={text}", "--out", "unused")
        assert f"corpus '{text}': no such file or folder" in answer.error()
    answer = kmixer_command("params", recipe_file, "--set", "model.width=16", "--set", "description=2024")
    assert answer.code == 0, answer
    answer = kmixer_command("train", recipe_file, "--set", 'data.corpus="1984"', "--out", "unused")
    assert "corpus '1984': no such file or folder" in answer.error()


def test_a_number_in_a_file_says_how_to_write_text(kmixer_command: Run, recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("corpus = ", "corpus = 1984 #"))
    assert "data.corpus: got 1984; it should be text, in quotes" in kmixer_command("params", recipe_file).error()


def test_sweeps_are_counted_before_they_are_built(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "sweep"]
    answer = kmixer_command("sweep", recipe_file, "--seeds", 200_000_000, *out)
    assert "the sweep would have 200,000,000 runs; allowed: 10,000 or fewer" in answer.error()
    values = ",".join(map(str, range(20)))
    grid = [part for key in range(10) for part in ("--grid", f"model.key{key}={values}")]
    answer = kmixer_command("sweep", recipe_file, *grid, *out)
    assert "the sweep would have 10,240,000,000,000 runs" in answer.error()
    answer = kmixer_command("sweep", recipe_file, "--seeds", 5_000, "--grid", "model.rank=1,2,3", *out)
    assert "the sweep would have 15,000 runs" in answer.error()
    assert not (tmp_path / "sweep").exists()


def test_recipes_and_sweeps_that_are_no_files(kmixer_command: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    for name, message in {
        "fifo": "is a FIFO, not a regular file",
        "loop": "Too many levels of symbolic links",
        "folder": "is a folder, not a regular file",
        "zero": "is a device, not a regular file",
    }.items():
        file = tmp_path / f"{name}.toml"
        for command in (["train", file], ["sweep", file], ["params", file], ["recipes", file]):
            assert message in kmixer_command(*command).error()
        assert message in kmixer_command("results", file, "--out", tmp_path / "page.md").error()


@pytest.mark.parametrize("text", ["[]", "5", "null", "[" * 10_000, '{"recipe": "tiny"}', '{"arms": 1}', "\x00"])
def test_sweeps_of_another_shape(kmixer_command: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(text)
    for command in ("compare", "report"):
        assert "sweep.json" in kmixer_command(command, tmp_path / "sweep").error()


def test_a_sweep_of_a_huge_grid_is_not_multiplied(kmixer_command: Run, tmp_path: Path) -> None:
    arms = {f"arm{index}": [f"model.key{index % 20}={index}"] for index in range(400)}
    sweep = {"recipe": "shakespeare-quick", "settings": [], "arms": arms, "seeds": [1]}
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(sweep))
    assert "no run has begun yet" in kmixer_command("report", tmp_path / "sweep").error()
    from kmixer.experiments.sweep import Sweep, command_of

    assert command_of(Sweep.read(tmp_path / "sweep")) == "kmixer sweep FILE.toml"


def test_names_that_lead_nowhere(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    loop, long = tmp_path / "loop", tmp_path / ("a" * 300)
    loop.symlink_to("loop")
    for path in (loop, long):
        for command in (
            ["eval", path],
            ["generate", path, "--prompt", "a"],
            ["compare", path],
            ["report", path],
            ["pack", path, "--out", tmp_path / "x.tar.gz"],
            ["unpack", path, "--out", tmp_path / "y"],
            ["train", recipe_file, "--out", path / "run"],
            ["train", recipe_file, "--out", path],
            ["params", f"{path}.toml"],
        ):
            error = kmixer_command(*command).error()
            assert "--debug" not in error
            assert path.name[:50] in error
    home = "data.corpus=~nosuchuser/text"
    answer = kmixer_command("train", recipe_file, "--set", home, "--out", tmp_path / "run")
    assert "there is no home folder ~nosuchuser" in answer.error()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_files_without_rights(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.chmod(0)
    assert f"cannot read {recipe_file}: Permission denied" in kmixer_command("params", recipe_file).error()
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    for command in (["eval", folder], ["generate", folder, "--prompt", "a"], ["compare", folder]):
        error = kmixer_command(*command).error()
        assert "Permission denied" in error
        assert "--debug" not in error


class Terminal(io.TextIOWrapper):
    """A terminal of an encoding, and what it was sent."""

    def __init__(self, encoding: str) -> None:
        self.sent = io.BytesIO()
        super().__init__(self.sent, encoding=encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_cannot_show_is_spelled_out(
    encoding: str, kmixer_command: Run, cyrillic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = tmp_path / "прогон", recipe_of(tmp_path, cyrillic)
    commands = [
        ["train", recipe, "--out", run],
        ["generate", run, "--prompt", "слово", "--max-new-tokens", 20, "--seed", 1],
        ["eval", run],
        ["compare", run],
        ["report", run],
    ]
    for command in commands:
        terminal = Terminal(encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            assert run_command([str(word) for word in command]) == 0, command
        shown = terminal.sent.getvalue().decode(encoding)
        assert "\\u04" in shown
        if command[0] == "generate":
            plain = kmixer_command(*command).out
            assert shown == plain.encode(encoding, "backslashreplace").decode(encoding)


def test_a_full_terminal_is_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["recipes"], ["generate", "shakespeare-small", "--prompt", "KING:", "--max-new-tokens", "2"]):
        full = open("/dev/full", "w")  # noqa: PTH123, SIM115
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert run_command(command) == 2
        assert capfd.readouterr().err == "error: cannot write the output: No space left on device\n"
        with contextlib.suppress(OSError):
            full.close()


def test_folders_whose_names_are_no_text(kmixer_command: Run, text_file: Path, tmp_path: Path) -> None:
    """Bytes that are not UTF-8, a formula of matplotlib's that is none, signs that a terminal obeys."""
    plain = tmp_path / "plain"
    assert kmixer_command("train", recipe_of(tmp_path, text_file), "--out", plain).code == 0
    for name in (os.fsdecode(b"run-\xff"), "$x_{$", "\x1b[31m\nred"):
        run = tmp_path / name
        assert kmixer_command("train", tmp_path / "tiny.toml", "--out", run).code == 0
        assert kmixer_command("eval", run).code == 0
        assert kmixer_command("pack", run, "--out", tmp_path / "run.tar.gz").code == 0
        answer = kmixer_command("compare", plain, run, "--json")
        assert answer.code == 0, answer
        assert json.loads(answer.out)[1]["arm"].encode()
        answer = kmixer_command("report", plain, run, "--out", tmp_path / "report.html")
        assert answer.code == 0, answer
        (run / "config.json").write_text("{")
        assert len(kmixer_command("eval", run).error()) < 500
        shutil.rmtree(run)
        (tmp_path / "run.tar.gz").unlink()


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.a\nb", 1), ("x" * 100_000, 1), ("description", "\x1b[31m" * 1000), ("data.corpus", "\x1b[2J" + "x" * 300)],
)
def test_messages_quote_and_cut_what_a_file_says(
    kmixer_command: Run, recipe_file: Path, tmp_path: Path, key: str, value: Any
) -> None:
    values = tiny_recipe_values(tmp_path / "none")
    part, _, last = key.rpartition(".")
    values.get(part, values)[last] = value
    recipe_file.write_text(tomli_w.dumps(values))
    error = kmixer_command("train", recipe_file, "--out", tmp_path / "run").error()
    assert len(error) < 1500
    assert not any(character < " " for character in error)


def test_too_little_memory_is_one_line(kmixer_command: Run, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:130] . DefaultCPUAllocator: can't allocate memory: ...")

    monkeypatch.setattr("kmixer.cli.inspect.packaged_recipes", lacking)
    assert "not enough memory for what was asked" in kmixer_command("recipes").error()
