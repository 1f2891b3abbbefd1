"""Files: atomic writes, and tensor files that notice damage."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import kmixer
from kmixer.errors import InputError
from kmixer.files import atomic_write, write_text
from kmixer.runs.archive import pack, unpack
from kmixer.tensor_files import load_tensors, save_tensors
from kmixer.training.loop import train
from tests.training.test_loop import make_recipe


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"no space left on the disk for .*file; free some, or choose another folder"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    with pytest.raises(InputError, match=r"cannot write .*: "):
        write_text(tmp_path / "file" / "below", "text")


TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.zeros(0)}


def test_tensors_come_back_and_equal_contents_are_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_tensors(tmp_path / name, TENSORS, {"x": [1, 2.5, None], "y": {"z": "é"}})
    tensors, metadata = load_tensors(tmp_path / "one")
    assert metadata == {"x": [1, 2.5, None], "y": {"z": "é"}}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("offset", [-1, -9, 60, 5])
def test_a_changed_byte_is_noticed(offset: int, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, TENSORS, {"x": 1})
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged|changed after it was written|not written by kmixer"):
        load_tensors(path)


@pytest.mark.parametrize("length", [0, 4, 30, -1])
def test_a_truncated_file_is_noticed(length: int, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, TENSORS, {"x": 1})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="damaged"):
        load_tensors(path)


class Trap:
    """A pickle that would leave a file behind if anything unpickled it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    path, trap = tmp_path / "model.safetensors", tmp_path / "sprung"
    path.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(InputError, match=r"is a pickle or a torch.save file, not safetensors; it is refused unread"):
        load_tensors(path)
    torch.save({"weights": TENSORS["a"]}, path)
    with pytest.raises(InputError, match="refused unread"):
        load_tensors(path)
    assert not trap.exists()


@pytest.fixture
def run(text_file: Path, tmp_path: Path) -> Path:
    train(make_recipe(text_file, steps=1), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.json", '"rank": 2', '"rank": 3', r"config\.json was changed: the weights beside it"),
        ("config.json", '"rank": 2', '"rnak": 2', "unknown key model.rnak; did you mean rank"),
        ("config.json", '"rank": 2', '"rank": "two"', r"model\.rank: got 'two'"),
        ("config.json", '"rank": 2', '"rank": 2,,', r"config\.json is not valid JSON \(line"),
        ("tokenizer.json", '"char"', '"chars"', "does not describe a tokenizer"),
        ("tokenizer.json", '"characters": "', '"characters": "\N{SNOWMAN}', r"tokenizer\.json was changed"),
    ],
)
def test_edited_model_folders_are_noticed(run: Path, file: str, old: str, new: str, message: str) -> None:
    content = (run / file).read_text(encoding="utf-8")
    assert old in content
    (run / file).write_text(content.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        kmixer.load(run)


def test_tensors_of_another_shape_are_named(run: Path) -> None:
    tensors, metadata = load_tensors(run / "model.safetensors")
    name = "stack.blocks.0.mixer.query"
    for change, message in (
        ({name: torch.zeros(5, 5)}, rf"tensor {name} has shape \(5, 5\); this model needs \(16, 2\)"),
        ({"extra": torch.zeros(1)}, "tensor extra does not belong to this model"),
    ):
        save_tensors(run / "model.safetensors", tensors | change, metadata)
        with pytest.raises(InputError, match=message):
            kmixer.load(run)
    tensors.pop(name)
    save_tensors(run / "model.safetensors", tensors, metadata)
    with pytest.raises(InputError, match=f"tensor {name} is missing"):
        kmixer.load(run)


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors", "config.json"])
def test_missing_files_are_named(file: str, run: Path) -> None:
    (run / file).unlink()
    with pytest.raises(InputError, match=f"{file}.*missing"):
        kmixer.load(run)


def test_loading_draws_no_random_numbers_and_keeps_what_trains(run: Path) -> None:
    before = torch.random.get_rng_state()
    model = kmixer.load(run)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training


def test_packed_runs_come_back(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "run.tar.gz")
    unpack(tmp_path / "run.tar.gz", tmp_path / "again")
    files = sorted(p.relative_to(run) for p in run.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((run / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    with pytest.raises(InputError, match="holds a run"):
        unpack(tmp_path / "run.tar.gz", tmp_path / "again")
    with pytest.raises(InputError, match="exists; add --force"):
        pack(run, tmp_path / "run.tar.gz")
    with pytest.raises(InputError, match="lies inside the run"):
        pack(run, run / "model.safetensors", force=True)


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("metrics.jsonl", tarfile.SYMTYPE, "/etc/passwd"), "holds the link 'metrics.jsonl', which no run has"),
        (entry("metrics.jsonl", tarfile.LNKTYPE, "recipe.toml"), "holds the link 'metrics.jsonl'"),
        (entry("../evil.txt"), r"holds the file '\.\./evil\.txt', which no run has: refused"),
        (entry("/tmp/evil.txt"), "holds the file '/tmp/evil.txt'"),
        (entry("optimizer.pkl"), "holds the file 'optimizer.pkl'"),
        (entry("checkpoints", tarfile.DIRTYPE), "holds the entry 'checkpoints'"),
        (entry("metrics.jsonl", tarfile.CHRTYPE), "holds the entry 'metrics.jsonl'"),
        (entry("recipe.toml"), "each once"),
        (entry("metrics.jsonl"), r"it needs config\.json, model\.safetensors, recipe\.toml, each once"),
    ],
)
def test_archives_with_anything_else_are_refused(bad: tarfile.TarInfo, message: str, tmp_path: Path) -> None:
    archive = tmp_path / "run.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(entry("recipe.toml"), io.BytesIO(b""))
        tar.addfile(bad, io.BytesIO(b""))
    with pytest.raises(InputError, match=message):
        unpack(archive, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.tar.gz"]


def test_archives_that_cannot_be_read_are_named(run: Path, tmp_path: Path) -> None:
    archive = tmp_path / "run.tar.gz"
    with pytest.raises(InputError, match="is missing"):
        unpack(archive, tmp_path / "out")
    pack(run, archive)
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-200])
    with pytest.raises(InputError, match="cannot be read as a run archive"):
        unpack(archive, tmp_path / "out")
    rng = random.Random(0)
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[rng.randrange(20, len(whole))] ^= 1 << rng.randrange(8)
        archive.write_bytes(damaged)
        with pytest.raises(InputError, match=r"run\.tar\.gz"):
            unpack(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    archive.write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot be read as a run archive"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
