"""Runs that several processes, or several lives of one process, share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
import torch

from kmixer.errors import InputError
from kmixer.training.distributed import COUNTS, OneProcess, check_sharing, open_processes, pieces_of
from tests.conftest import tiny_recipe_values
from tests.training.test_loop import make_recipe, metrics_without_times


def test_killed_runs_resume_bit_for_bit() -> None:
    script = Path(__file__).parent / "kill_and_resume.py"
    answer = subprocess.run([sys.executable, str(script), "--kills", "2"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "2 kills" in answer.stdout


def test_two_processes_train_like_one(text_file: Path, tmp_path: Path) -> None:
    """accelerate launch over gloo: the same global batch gives the same loss curve and the same weights."""
    values = tiny_recipe_values(text_file)
    del values["model"]["dropout"]
    values["training"]["precision"] = "float64"
    values["training"]["accumulation"] = 2
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # --multi_gpu makes accelerate start one process a rank; kmixer's --cpu keeps them on the CPU.
    options = f"--multi_gpu --num_machines 1 --num_processes 2 --main_process_port {port}"
    options += " --mixed_precision no --dynamo_backend no --module"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # a rank would ask for a GPU of its own
    for name, prefix in (("one", [sys.executable, "-m"]), ("two", launch)):
        command = [*prefix, "kmixer", "train", str(recipe), "--out", str(tmp_path / name), "--cpu"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=no_gpu)
        assert answer.returncode == 0, answer.stdout + answer.stderr
    assert '"processes": 2' in (tmp_path / "two" / "environment.json").read_text()
    one, two = (metrics_without_times(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        if "train_loss" in first:
            assert second["train_loss"] == pytest.approx(first["train_loss"], abs=1e-10)
            assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], abs=1e-10)
        else:
            assert second["validation"][0]["loss"] == pytest.approx(first["validation"][0]["loss"], abs=1e-10)


def test_batches_that_cannot_be_shared_are_named(text_file: Path) -> None:
    with pytest.raises(InputError, match="batch_size 4 cannot be shared evenly by 3 processes"):
        check_sharing(make_recipe(text_file), 3)


def test_one_process_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COUNTS:
        monkeypatch.delenv(name, raising=False)
    one = open_processes(cpu=True)
    assert isinstance(one, OneProcess)
    assert (one.rank, one.count, one.is_main, one.device.type) == (0, 1, True, "cpu")
    batch, value = torch.arange(12).view(6, 2), torch.tensor(2.5)
    assert torch.equal(one.share(batch), batch)
    assert one.mean(value) is value
    assert [one.any(flag) for flag in (False, True)] == [False, True]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_and_pieces_are_the_batch_once(count: int) -> None:
    """Over all processes and pieces every example is there once, inputs beside their targets."""
    inputs = torch.arange(12)
    pieces = []
    for rank in range(count):
        one = OneProcess(cpu=True)
        one.rank, one.count = rank, count
        pieces += pieces_of((inputs, -inputs), one, 2)
    assert len(pieces) == 2 * count
    assert len({len(piece) for piece, _ in pieces}) == 1
    assert sorted(torch.cat([piece for piece, _ in pieces]).tolist()) == inputs.tolist()
    assert all(torch.equal(piece, -targets) for piece, targets in pieces)
