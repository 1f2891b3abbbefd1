"""kmixer bench measures what it says, on shapes that take no time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run
from tests.conftest import threads_of_torch


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    with threads_of_torch(torch.get_num_threads()):
        yield


def test_the_operator_by_backend(kmixer_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kmixer.cli.bench.SHAPES", [(3, 20, 40, 2)])
    answer = json.loads(kmixer_command("bench", "op", "--repeats", 1, "--json").out)
    rows = {row["backend"]: row for row in answer["rows"]}
    assert {"recurrent", "mask", "block"} <= rows.keys()
    assert all(row["relative_error"] < 1e-5 for row in rows.values())
    assert rows["mask"]["times_faster_than_mask"] == 1.0
    assert answer["roofs"].keys() == {
        "threads",
        "matmul_float32_flops_per_second",
        "matmul_bfloat16_flops_per_second",
        "copied_bytes_per_second",
    }
    assert answer["roofs"]["threads"] == 1
    assert "fwd+bwd ms" in kmixer_command("bench", "op", "--repeats", 1).out


def test_training_and_decoding_beside_the_transformer(kmixer_command: Run) -> None:
    small = ["training.batch_size=2", "training.window=16", "model.layers=1"]
    settings = [part for setting in small for part in ("--set", setting)]
    trained = json.loads(
        kmixer_command("bench", "train", "--recipe", "shakespeare-quick", *settings, "--repeats", 1, "--json").out
    )
    assert [(row["model"], row["precision"]) for row in trained["rows"]] == [
        (model, precision) for model in ("recipe", "transformer") for precision in ("float32", "bfloat16")
    ]
    decoded = json.loads(
        kmixer_command(
            *["bench", "decode", "--recipe", "shakespeare-quick", *settings, "--context", 20, "--tokens", 4, "--json"]
        ).out
    )
    assert [row["batch_size"] for row in decoded["rows"]] == [1, 64, 1, 64]
    assert all(row["tokens_per_second"] > 0 for row in decoded["rows"])


def test_time_against_length(kmixer_command: Run, tmp_path: Path) -> None:
    settings = ["--set", "model.layers=1", "--tokens", 128, "--longest", 128, "--repeats", 1]
    plot = tmp_path / "length.svg"
    answer = json.loads(kmixer_command("bench", "length", *settings, "--plot", plot, "--json").out)
    assert [(row["window"], row["batch_size"]) for row in answer["rows"]] == [(64, 2), (128, 1)] * 4
    drawn = plot.read_text()
    assert "<svg" in drawn and drawn.count("<path") > 4
    stopped = kmixer_command("bench", "length", *settings, "--longest-step", 0, "--json")
    assert [row["window"] for row in json.loads(stopped.out)["rows"]] == [64] * 4
    refused = kmixer_command("bench", "length", "--plot", tmp_path / "length.jpg")
    assert refused.error().endswith("allowed: a file that ends in .svg or .png")


def test_gaussian_attention_by_backend_and_block(kmixer_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kmixer.bench.gaussian.WINDOWS", (256,))  # a process measures the peak of each
    answer = json.loads(kmixer_command("bench", "gaussian", "--t", 300, "--width", 64, "--repeats", 1, "--json").out)
    rows = answer["rows"]
    ways, blocks = rows[:4], rows[4:]
    assert [row["what"] for row in ways] == ["naive", "one product", "sdpa", "auto"]
    assert all(row["error"] < 1e-4 and row["peak_bytes"] >= 0 for row in ways)
    assert ways[0]["times_faster"] == blocks[0]["relative"] == 1.0
    assert [row["what"] for row in blocks] == ["softmax block", "gaussian block"]
    assert blocks[0]["cache"] == 2 * blocks[1]["cache"] == 128


def test_hierarchical_attention_by_backend_and_layer(kmixer_command: Run) -> None:
    options = ["--t", 70, "--width", 64, "--repeats", 1]
    rows = json.loads(kmixer_command("bench", "hierarchical", *options, "--json").out)["rows"]
    layers = [row for row in rows if row["what"].endswith("layer")]
    assert [row["what"] for row in layers] == ["softmax layer", "hierarchical layer"] * 2
    assert [row["causal"] for row in layers] == [True, True, False, False]
    assert {"softmax", "naive", "blocked"} <= {row["what"] for row in rows}
    assert all(row["error"] < 1e-4 for row in rows if "error" in row)
    assert "of softmax" in kmixer_command("bench", "hierarchical", *options).out
