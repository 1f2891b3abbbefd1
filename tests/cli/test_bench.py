"""kmixer bench measures what it says, on shapes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kmixer.bench.copy import CopySizes
from kmixer.bench.mixer import Shape, add_peaks, bench_mixer
from kmixer.bench.operators import operator_of
from kmixer.models.mixers.registry import CARDS
from tests.cli.conftest import Run


@pytest.fixture(autouse=True)
def low_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roofs of small matrices: those of the usual size take seconds without instructions for bfloat16."""
    monkeypatch.setattr("kmixer.bench.measure.MATRIX", 64)
    monkeypatch.setattr("kmixer.bench.measure.COPIED_BYTES", 1 << 16)


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
    answer = json.loads(kmixer_command("bench", "length", *settings, "--figure", plot, "--json").out)
    assert [(row["window"], row["batch_size"]) for row in answer["rows"]] == [(64, 2), (128, 1)] * 4
    drawn = plot.read_text()
    assert "<svg" in drawn and drawn.count("<path") > 4
    stopped = kmixer_command("bench", "length", *settings, "--longest-step", 0, "--json")
    assert [row["window"] for row in json.loads(stopped.out)["rows"]] == [64] * 4
    refused = kmixer_command("bench", "length", "--figure", tmp_path / "length.jpg")
    assert refused.error().endswith("allowed: a file that ends in .svg or .png")


CASES = [(True, None), (True, 256), (False, None)]


def test_a_mixer_by_operator_layer_and_block(kmixer_command: Run) -> None:
    options = ["--t", 300, "--width", 64, "--batch", 1, "--window", 256, "--repeats", 1, "--json"]
    rows = json.loads(kmixer_command("bench", "mixer", "gaussian", *options).out)["rows"]
    cases = [[row for row in rows if (row["causal"], row["window"]) == case] for case in CASES]
    assert [len(case) for case in cases] == [10, 10, 8]  # positions that see both ways stand in no block of a stream
    ways = ["naive", "one product", "sdpa", "auto"]
    for case in cases:
        assert [row["what"] for row in case[:6]] == ["softmax, torch", "softmax", *ways]
        assert all(row["error"] < 1e-4 for row in case[:6])
        assert case[2]["times_faster"] == case[0]["relative"] == case[6]["relative"] == 1.0
        assert [row["what"] for row in case[6:8]] == ["softmax layer", "gaussian layer"]
    for case in cases[:2]:
        assert [row["what"] for row in case[8:]] == ["softmax block", "gaussian block"]
        assert case[8]["cache"] == 2 * case[9]["cache"] == 128


@pytest.mark.parametrize("mixer", CARDS)
def test_every_mixer_is_timed_beside_the_baseline(mixer: str, kmixer_command: Run) -> None:
    options = ["--t", 70, "--width", 64, "--repeats", 1]
    rows = json.loads(kmixer_command("bench", "mixer", mixer, *options, "--json").out)["rows"]
    layers = [row["what"] for row in rows if row["what"].endswith("layer")]
    both = dict.fromkeys(["softmax layer", f"{mixer} layer"])
    ways = (not CARDS[mixer].refuses_causal) + CARDS[mixer].sees_both_ways
    assert layers == [*both] * ways
    assert "softmax, torch" in {row["what"] for row in rows}
    assert all(row["seconds"] > 0 for row in rows)


def test_hierarchical_attention_by_backend(kmixer_command: Run) -> None:
    options = ["--t", 70, "--width", 64, "--repeats", 1]
    answer = kmixer_command("bench", "mixer", "hierarchical", *options, "--json").out
    assert {"softmax", "naive", "blocked"} <= {row["what"] for row in json.loads(answer)["rows"]}
    assert "of softmax" in kmixer_command("bench", "mixer", "hierarchical", *options).out


def test_peaks_are_those_of_processes_of_their_own(kmixer_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    of = {"t": 40, "width": 16, "b": 1, "causal": True, "window": None}
    rows = [{"what": what, **of} for what in ("naive", "gaussian layer")]
    add_peaks("gaussian", rows, 2)
    assert [row.get("peak_bytes", -1) >= 0 for row in rows] == [True, False]

    monkeypatch.setattr("kmixer.bench.mixer.peak_of", lambda program, *arguments: int(arguments[2]))
    options = ["--t", 70, "--width", 64, "--repeats", 1, "--peaks", "--json"]
    rows = json.loads(kmixer_command("bench", "mixer", "gaussian", *options).out)["rows"]
    assert {row["what"]: row["peak_bytes"] for row in rows if "peak_bytes" in row} == dict.fromkeys(
        ["naive", "one product", "sdpa", "auto"], 70
    )


def test_a_mixer_that_is_not_there_and_a_window_that_it_has_not(kmixer_command: Run) -> None:
    refused = kmixer_command("bench", "mixer", "mamba").error()
    assert refused.endswith("mixer: got 'mamba'; allowed: gaussian, hierarchical, k2, sinkhorn, softmax")
    refused = kmixer_command("bench", "mixer", "k2", "--window", 8).error()
    assert refused.endswith("--window: mixer k2 has no window")


def test_a_way_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = operator_of("gaussian")
    assert operator is not None
    monkeypatch.setitem(operator.ways, "sdpa", lambda inputs, causal, window: inputs[0])
    with pytest.raises(RuntimeError, match="sdpa differs from the definition"):
        bench_mixer("gaussian", Shape(t=20, width=16, heads=2, batch=1), (None,), 1)


def test_the_copy_memory_on_a_text(kmixer_command: Run, monkeypatch: pytest.MonkeyPatch, text_file: Path) -> None:
    monkeypatch.setattr(
        "kmixer.cli.bench.COPY_SIZES", CopySizes(windows=2, window=30, row=80, hard=90, prompt=9, steps=3)
    )
    options = ["bench", "copy", "--corpus", text_file, "--repeats", 1]
    answer = json.loads(kmixer_command(*options, "--json").out)
    rows = {row["what"]: row for row in answer["rows"]}
    assert rows["text"]["token_relative_to_text"] == 1
    models = [row for row in answer["rows"] if row["section"] != "matches"]
    assert [row["relative_to_without"] for row in models if row["what"] == "without copies"] == [1] * 5
    assert {(row["section"], row["rows"]) for row in models} == {
        ("training", 4), ("steps", 1), ("steps", 64), ("steps and drawing", 1), ("steps and drawing", 64)
    }  # fmt: skip
    assert rows["one token"]["vocabulary"] == 1 and rows["text, windows"]["rows"] == 2
    assert "x text" in kmixer_command(*options).out


def test_models_of_other_libraries_take_turns_with_ours(kmixer_command: Run, tmp_path: Path) -> None:
    plot = tmp_path / "peers.svg"
    answer = kmixer_command(
        *["bench", "peers", "--sizes", "0.17M", "--windows", "8", "--context", 8, "--rounds", 1, "--precision", "both"],
        *["--without", "transformers Mamba-2", "--figure", plot, "--json"],
    )
    rows = json.loads(answer.out)["rows"]
    works = [("train", "float32"), ("train", "bfloat16"), ("decode", "float32")]
    assert list(dict.fromkeys((row["what"], row["precision"]) for row in rows)) == works
    models = {row["model"] for row in rows}
    assert {"kmixer K-Stack", "kmixer transformer", "torch LSTM", "torch GRU"} <= models
    assert len(rows) == len(works) * len(models)
    assert all(row["of_ours"] == 1 for row in rows if row["model"] == "kmixer K-Stack")
    refused = [row for row in rows if "refused" in row]
    assert all(row["precision"] == "bfloat16" and row["model"].startswith("torch") for row in refused)
    measured = [row for row in rows if row not in refused]
    assert all(row["tokens_per_second"] > 0 for row in measured)
    assert all((row["part_of_roof"] is None) == (row["what"] == "decode") for row in measured)
    sizes = [row["parameters"] for row in rows]
    assert max(sizes) < 1.2 * min(sizes)
    assert "</svg>" in plot.read_text()
