"""Runs that several processes, or several lives of one process, share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from tests.conftest import tiny_recipe_values
from tests.training.test_loop import metrics_without_times


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
