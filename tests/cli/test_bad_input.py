"""Every wrong input is one clear line and exit code 2, and nothing is lost or half-written."""

from __future__ import annotations

import errno
import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> Path:
    assert kmixer_command("train", recipe_file, "--out", tmp_path / "run", "--set", "training.steps=4").code == 0
    return tmp_path / "run"


def train(recipe_file: Path, out: Path, *settings: str) -> list[object]:
    return ["train", recipe_file, "--out", out, *(part for setting in settings for part in ("--set", setting))]


def test_corpora(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "short.txt").write_text("too short for a window of thirty-two characters" * 2)
    (tmp_path / "folder").mkdir()
    for corpus, message in {
        "missing.txt": "no such file or folder, and not one of tiny-shakespeare, plays",
        "empty.txt": "is empty",
        "latin.txt": "is not UTF-8 text at byte 3; convert it first",
        "short.txt": "has 10 tokens; a window of 32 needs 33 or more: give more text or a shorter window",
        "folder": "holds no .md or .txt files",
    }.items():
        answer = kmixer_command(*train(recipe_file, tmp_path / "out", f"data.corpus={tmp_path / corpus}"))
        assert message in answer.error()
    assert not (tmp_path / "out").exists()


def test_recipes_and_keys(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    assert "no such recipe; allowed: deit-b" in kmixer_command("train", "shakspeare").error()
    assert "got neither RECIPE nor --from RUN" in kmixer_command("train").error()
    for setting, message in {
        "model.rnak=2": "unknown key model.rnak; did you mean rank?",
        "model.decay.backend=fast": "allowed: 'auto', 'recurrent', 'mask', 'block'",
        "training.steps=many": "training.steps: got 'many'; it should be a valid integer",
        "training.steps": "write it as key=value",
    }.items():
        assert message in kmixer_command(*train(recipe_file, tmp_path / "out", setting)).error()
    for name, allowed in {
        "transformer-plays": "and a language model sees the past only; allowed: gaussian, hierarchical, k2, softmax",
        "listops": "allowed: causal = false",
    }.items():
        refused = kmixer_command(*train(Path(name), tmp_path / "out", "model.mixers=sinkhorn")).error()
        assert "sinkhorn needs all queries to normalise a key" in refused and refused.endswith(allowed)
    assert "unknown key" in kmixer_command("params", "shakespeare-quick", "--set", "modle.rank=1").error()
    assert "not registered; allowed: tiny-shakespeare" in kmixer_command("data", "get", "plys", "--from", "x").error()
    assert "no such file or folder" in kmixer_command("data", "get", "plys").error()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["frobnicate"], ["eval"], ["eval", "run", "--protocol", "batches"], ["--what"]])
def test_commands_and_options(kmixer_command: Run, arguments: list[str]) -> None:
    answer = kmixer_command(*arguments)
    assert answer.code == 2
    assert "Traceback" not in answer.err
    assert answer.err.splitlines()[-1].startswith("Error: ")


def test_existing_runs(kmixer_command: Run, recipe_file: Path, run: Path) -> None:
    before = snapshot(run)
    assert "add --resume to continue it, --force to replace it" in kmixer_command(*train(recipe_file, run)).error()
    changed = kmixer_command(*train(recipe_file, run, "training.learning_rate=0.5"), "--resume")
    assert "training.learning_rate is 0.01 in the run and 0.5 now" in changed.error()
    both = kmixer_command(*train(recipe_file, run), "--resume", "--force")
    assert "give one of them" in both.error()
    forced = kmixer_command(*train(recipe_file, run, "data.corpus=nothing.txt"), "--force")
    assert "no such file" in forced.error()
    assert "holds no run" in kmixer_command(*train(recipe_file, run.parent / "none"), "--resume").error()
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("file", "length", "message"),
    [
        ("model.safetensors", -100, "model.safetensors is damaged"),
        ("config.json", 40, "config.json is not valid JSON"),
        ("tokenizer.json", 10, "tokenizer.json is not valid JSON"),
        ("recipe.toml", 50, "recipe.toml"),
    ],
)
def test_truncated_files(kmixer_command: Run, run: Path, file: str, length: int, message: str) -> None:
    (run / file).write_bytes((run / file).read_bytes()[:length])
    assert message in kmixer_command("eval", run).error()


def test_edited_files(kmixer_command: Run, recipe_file: Path, run: Path) -> None:
    weights = bytearray((run / "model.safetensors").read_bytes())
    weights[-3] ^= 4
    (run / "model.safetensors").write_bytes(weights)
    assert "was changed after it was written" in kmixer_command("eval", run).error()
    checkpoint = run / "checkpoints" / "last.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-7])
    answer = kmixer_command(*train(recipe_file, run, "training.steps=4"), "--resume")
    assert "last.safetensors is damaged" in answer.error()


def test_results_of_another_shape(kmixer_command: Run, run: Path) -> None:
    for text in ("[]", '{"best": 1}', "{}"):
        (run / "results.json").write_text(text)
        for command in ("compare", "report"):
            assert "results.json holds no results of a run" in kmixer_command(command, run).error()


def test_edited_metrics(kmixer_command: Run, recipe_file: Path, run: Path) -> None:
    metrics = run / "metrics.jsonl"
    content = metrics.read_text()
    for damaged in (content[: len(content) // 2], content.replace('"step": 3', '"step": 4', 1)):
        metrics.write_text(damaged)
        answer = kmixer_command(*train(recipe_file, run, "training.steps=4"), "--resume")
        assert "metrics.jsonl was shortened or edited since the last checkpoint" in answer.error()
        assert metrics.read_text() == damaged


def test_wrong_shapes(kmixer_command: Run, run: Path) -> None:
    from kmixer.tensor_files import load_tensors, save_tensors

    tensors, metadata = load_tensors(run / "model.safetensors")
    save_tensors(run / "model.safetensors", tensors | {"norm.weight": torch.ones(3)}, metadata)
    assert "tensor norm.weight has shape (3,); this model needs (16,)" in kmixer_command("eval", run).error()


def test_a_full_disk(kmixer_command: Run, recipe_file: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, sync, calls = snapshot(run), os.fsync, [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    answer = kmixer_command(*train(recipe_file, run.parent / "other", "training.steps=4"))
    assert "no space left on the disk for" in answer.error()
    assert snapshot(run) == before
    assert not list((run.parent / "other").rglob(".*.tmp"))


def test_archives(kmixer_command: Run, run: Path, tmp_path: Path) -> None:
    archive = tmp_path / "bad.tar.gz"
    link = tarfile.TarInfo("model.safetensors")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for bad in (link, tarfile.TarInfo("../../evil"), tarfile.TarInfo("weights.pkl")):
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(run / "recipe.toml", "recipe.toml")
            tar.addfile(bad)
        assert "which no run has: refused" in kmixer_command("unpack", archive, "--out", tmp_path / "out").error()
        assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(kmixer_command: Run, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert kmixer_command("pack", run, "--out", tmp_path / "run.tar.gz").code == 0
    answer = kmixer_command("unpack", tmp_path / "run.tar.gz", "--out", tmp_path / "file" / "run")
    assert f"cannot write {tmp_path / 'file' / 'run'}: " in answer.error()


def test_pickles(kmixer_command: Run, run: Path) -> None:
    (run / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    assert "is a pickle or a torch.save file, not safetensors" in kmixer_command("eval", run).error()


def test_prompts_and_folders(kmixer_command: Run, run: Path, tmp_path: Path) -> None:
    answer = kmixer_command("generate", run, "--prompt", "snow ☃ and ☂")
    assert "the tokenizer does not know '☂', '☃'" in answer.error()
    assert "temperature: got -1.0" in kmixer_command("generate", run, "--prompt", "a", "--temperature", "-1").error()
    assert "is not a run or model folder" in kmixer_command("generate", tmp_path / "no", "--prompt", "a").error()
    assert "holds no run" in kmixer_command("eval", tmp_path / "no").error()
    assert "--window: got 0; allowed: 1 or more" in kmixer_command("eval", run, "--window", 0).error()
    assert "a window of 99999 needs 100000 or more" in kmixer_command("eval", run, "--window", 99999).error()


def test_models_that_do_not_stream(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    dense = ["model.base_kernel.kind=dense", "model.base_kernel.size=32", "training.steps=2"]
    assert kmixer_command(*train(recipe_file, tmp_path / "run", *dense)).code == 0
    answer = kmixer_command("eval", tmp_path / "run", "--protocol", "stream")
    assert (
        "cannot stream past position 32; use --protocol windows, or a model with a toeplitz or conv" in answer.error()
    )
    answer = kmixer_command("eval", tmp_path / "run", "--window", 33)
    assert "window 33: the dense base kernel ends at position 32" in answer.error()
    answer = kmixer_command("generate", tmp_path / "run", "--prompt", "The ", "--max-new-tokens", 40)
    assert "the dense base kernel ends at 32: ask for 28 or fewer new tokens" in answer.error()


def test_what_nobody_foresaw_is_one_line_too(
    kmixer_command: Run, recipe_file: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = kmixer_command(*train(recipe_file, "/etc/passwd/x"))
    assert "cannot write" in answer.error()
    answer = kmixer_command("generate", run, "--prompt", "The ", "--seed", 1 << 70)
    assert "seed: got" in answer.error()
    monkeypatch.setattr("kmixer.cli.inspect.packaged_recipes", lambda: 1 / 0)
    answer = kmixer_command("recipes")
    assert answer.code == 1
    assert answer.err == "error: ZeroDivisionError: division by zero (--debug shows where)\n"


def test_a_changed_corpus(kmixer_command: Run, text_file: Path, run: Path) -> None:
    text_file.write_text(text_file.read_text() + "x")
    assert "is not what" in kmixer_command("eval", run).error()
    assert (
        "--window goes with --protocol windows"
        in kmixer_command("eval", run, "--protocol", "stream", "--window", 3).error()
    )


def test_debug_shows_where(kmixer_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from kmixer.cli.main import main
    from kmixer.errors import InputError

    monkeypatch.setattr(sys, "argv", ["kmixer", "eval", "nowhere", "--debug"])
    with pytest.raises(InputError, match="holds no run"):
        main()
