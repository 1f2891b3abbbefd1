"""Comparing runs: which weights, parts and protocols, and what may stand side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kmixer.experiments.arms import read_arms
from kmixer.experiments.compare import why_not_comparable
from kmixer.runs.recipe import load_recipe
from kmixer.runs.run_folder import RunFolder
from kmixer.tensor_files import load_tensors, save_tensors
from tests.cli.conftest import Run, make_sweep


def test_results_are_of_the_best_and_of_the_last_weights(
    kmixer_command: Run, recipe_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    kmixer_command("train", recipe_path, "--out", out)
    results = RunFolder(out).results()
    assert results is not None
    losses = [line["validation"][0]["loss"] for line in RunFolder(out).read_metrics() if "validation" in line]
    assert results["best"]["validation"][0]["loss"] == pytest.approx(min(losses), rel=1e-6)
    assert results["last"]["validation"][0]["loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert results["best"]["test"][0]["tokens"] > 1000
    assert results["tokens"] == 8 * 4 * 32
    measured = [(each["protocol"], each["window"]) for each in results["best"]["validation"]]
    assert measured == [("windows", 32), ("windows", 256), ("windows", 1024), ("stream", None)]
    by_position = results["best"]["loss_by_position"]
    assert len(by_position) == 32
    assert sum(by_position) / 32 == pytest.approx(results["best"]["validation"][0]["loss"], rel=1e-6)
    rows = json.loads(kmixer_command("compare", out, "--part", "test", "--json").out)
    assert rows[0]["loss"] == results["best"]["test"][0]["loss"]
    assert kmixer_command("compare", out, "--markdown").out.startswith("| arm |")

    kmixer_command("train", recipe_path, "--out", tmp_path / "choosing", "--set", "evaluation.test=false")
    assert (
        "has no test part that was measured"
        in kmixer_command("compare", tmp_path / "choosing", "--part", "test").error()
    )


def test_different_protocols_are_not_compared(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    kmixer_command("train", recipe_path, "--out", tmp_path / "a")
    kmixer_command("train", recipe_path, "--out", tmp_path / "b", "--set", "evaluation.window=16")
    refused = kmixer_command("compare", tmp_path / "a", tmp_path / "b").error()
    assert "differ in window: 32 and 16" in refused
    both = kmixer_command("compare", tmp_path / "a", tmp_path / "b", "--anyway", "--reach", 0.1)
    assert (both.code, "a: 0.1 not reached" in both.out) == (0, True)
    assert why_not_comparable(read_arms([tmp_path / "a", tmp_path / "a"])) is None


def test_a_perplexity_too_large_for_a_number_is_left_out(
    kmixer_command: Run, recipe_path: Path, tmp_path: Path
) -> None:
    kmixer_command("train", recipe_path, "--out", tmp_path / "run")
    tensors, about = load_tensors(tmp_path / "run" / "model.safetensors")
    name = next(key for key in tensors if "embedding" in key)
    save_tensors(tmp_path / "run" / "model.safetensors", tensors | {name: tensors[name] * 1e6}, about)
    file = tmp_path / "run" / "results.json"
    results = json.loads(file.read_text())
    file.unlink()  # it holds the sha256 of the weights
    measured = kmixer_command("eval", tmp_path / "run", "--json")
    assert json.loads(measured.out)["loss"] > 710
    assert '"perplexity": null' in measured.out
    assert "\nperplexity  " not in kmixer_command("eval", tmp_path / "run").out  # beside that a word

    results["best"]["validation"][0] |= {"loss": 1e6, "perplexity": None}
    RunFolder(tmp_path / "run").write_results(results)
    assert json.loads(kmixer_command("compare", tmp_path / "run", "--json").out)[0]["perplexity"] is None
    assert "1,000,000.0000" in kmixer_command("compare", tmp_path / "run").out


def test_seeds_without_a_partner_are_told(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    make_sweep(tmp_path / "one", recipe_path)
    make_sweep(tmp_path / "two", recipe_path, seeds=2)
    rows = json.loads(kmixer_command("compare", tmp_path / "one", tmp_path / "two", "--json").out)
    assert [(row["n"], row["pairs"]) for row in rows] == [(1, None), (2, 1)]
    assert f"{rows[1]['difference']:+.4f} (1 of 2)" in kmixer_command("compare", tmp_path / "one", tmp_path / "two").out
    assert " of 1)" not in kmixer_command("compare", tmp_path / "two", tmp_path / "one", "--markdown").out


def test_training_until_a_loss_is_counted(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    kmixer_command("train", recipe_path, "--out", tmp_path / "a")
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    step, loss = [(line["step"], line["validation"][0]["loss"]) for line in lines if "validation" in line][-1]
    recipe = load_recipe(str(recipe_path))
    answer = kmixer_command("compare", tmp_path / "a", tmp_path / "a", "--reach", loss, "--json")
    for row in json.loads(answer.out):
        assert row["reach"]["units"] == step * recipe.units_per_step
        assert (row["reach"]["seeds"], row["reach"]["of"]) == (1, 1)
    said = kmixer_command("compare", tmp_path / "a", tmp_path / "a", "--reach", loss).out
    assert "(1.00 and 1.00 of the first)" in said


def test_other_windows_tokenizers_and_tasks(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    chars, short, words = tmp_path / "chars", tmp_path / "short", tmp_path / "words"
    kmixer_command("train", recipe_path, "--out", chars)
    kmixer_command("train", recipe_path, "--out", short, "--set", "evaluation.window=16")
    settings = ["tokenizer.kind=sentencepiece", "tokenizer.vocabulary_size=120"]
    answer = kmixer_command("train", recipe_path, "--out", words, *(part for s in settings for part in ("--set", s)))
    assert answer.code == 0, answer
    for choice, key in ((["--window", 256], "window"), (["--protocol", "stream"], "protocol")):
        rows = json.loads(kmixer_command("compare", chars, short, *choice, "--json").out)
        assert {row[key] for row in rows} == {choice[1]}
    assert "was not measured by this protocol" in kmixer_command("compare", chars, "--window", 77).error()
    assert "give one of them" in kmixer_command("compare", chars, "--window", 256, "--protocol", "stream").error()

    rows = json.loads(kmixer_command("compare", chars, words, "--json", "--learned").out)
    assert rows[1]["difference"] == pytest.approx(rows[1]["bits_per_byte"] - rows[0]["bits_per_byte"])
    assert rows[0]["learned"]["base share"]
    assert "the tokenizers differ" in kmixer_command("compare", chars, words).out
    assert "not comparable: " in kmixer_command("compare", chars, short, "--anyway").out

    twins = [tmp_path / "a/seed-1", tmp_path / "b/seed-1"]
    for twin in twins:
        shutil.copytree(chars, twin)
    assert [arm.name for arm in read_arms(twins)] == [str(twin) for twin in twins]
