"""kmixer task."""

from __future__ import annotations

import json
from pathlib import Path

from kmixer.experiments.denoise import BLOCKS
from tests.cli.conftest import Run
from tests.data.test_images import write_npz


def test_denoising(kmixer_command: Run) -> None:
    rows = json.loads(kmixer_command("task", "denoise", "--seeds", 1, "--steps", 2, "--json").out)
    assert [row["mixer"] for row in rows] == list(BLOCKS)
    assert "allowed: 1 or more" in kmixer_command("task", "denoise", "--seeds", 0).error()


def test_recall(kmixer_command: Run, tmp_path: Path) -> None:
    small = ["--pairs", "2,3", "--seeds", 1, "--steps", 2, "--batch-size", 2]
    figure = tmp_path / "recall.svg"
    rows = json.loads(kmixer_command("task", "recall", *small, "--json", "--figure", figure, "--gaps", "128").out)
    assert [(row["pairs"], row["fast_weights"]) for row in rows] == [
        (pairs, fast) for pairs in (2, 3) for fast in (False, True, False, True, False)
    ]
    assert {at["gap"] for row in rows for at in row["by_distance"]} == {64, 128}
    assert figure.read_text().count("<svg") == 1
    answer = kmixer_command("task", "recall", *small, "--no-fast-weights", "--mixers", "k2")
    assert [line.split()[:3] for line in answer.out.splitlines()[1:3]] == [["2", "of", "16"], ["2", "of", "16"]]
    assert "fast" not in answer.out.splitlines()[1]
    for wrong, said in (
        (["--pairs", "x"], "allowed: whole numbers, such as 8,64"),
        (["--pairs", "0"], "pairs: got 0; allowed: 1 or more"),
        (["--mixers", "k3"], "--mixers: got 'k3'; allowed: softmax"),
        (["--gaps", "8"], "gap: got 8; allowed: 30 or more"),
        (["--figure", tmp_path / "a.txt"], "ends in .svg or .png"),
    ):
        assert said in kmixer_command("task", "recall", *wrong).error()


def test_classification_is_a_sweep_over_mixers(kmixer_command: Run, tmp_path: Path) -> None:
    write_npz(tmp_path)
    small = ["data.length=64", "model.length=64", "model.width=8", "model.heads=2", "model.layers=1"]
    small += ["training.steps=2", "training.warmup_steps=1", "training.batch_size=4", "training.evaluate_every=2"]
    options = [part for setting in small for part in ("--set", setting)]
    options += ["--mixers", "softmax,k2", "--seeds", "1", "--data-dir", str(tmp_path)]
    out = tmp_path / "sweep"
    answer = kmixer_command("task", "scifar", "--out", out, *options)
    assert "  mixers=k2  1  " in answer.out
    assert "Accuracy and cross-entropy" in answer.out
    assert (out / "mixers=softmax/seed-1/results.json").is_file()
    assert "kmixer task scifar --mixers softmax,gaussian" in kmixer_command("task", "scifar", "--help").out
