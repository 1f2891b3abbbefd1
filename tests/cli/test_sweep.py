"""Sweeps: what has ended is not repeated, what was killed goes on, and the table is the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from kmixer.cli.inspect import account_of
from kmixer.errors import InputError
from kmixer.experiments.compare import compare, read_arms, why_not_comparable
from kmixer.experiments.sweep import Sweep, arms_of_grid, load_ablation, packaged_ablations, start_sweep, sweep_runs
from kmixer.training.recipe import load_recipe
from kmixer.training.run_folder import RunFolder
from tests.cli.conftest import Run
from tests.conftest import tiny_recipe_values

GRID = "model.rank=2,3"


@pytest.fixture
def recipe_path(text_file: Path, tmp_path: Path) -> Path:
    values = tiny_recipe_values(text_file)
    values["data"]["test"] = 0.1
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


def arguments(recipe: Path, out: Path, *more: object) -> list[str]:
    return [str(part) for part in ("sweep", recipe, "--seeds", 2, "--grid", GRID, "--out", out, "--threads", 1, *more)]


def table(folder: Path) -> list[dict[str, object]]:
    """The comparison without the time it took."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in compare(read_arms([folder]))]


def test_a_sweep_killed_twice_ends_with_the_same_table(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    answer = kmixer_command(*arguments(recipe_path, whole))
    assert answer.code == 0, answer
    assert "rank=3" in answer.out

    for number in (signal.SIGKILL, signal.SIGINT):
        command = [sys.executable, "-m", "kmixer", *arguments(recipe_path, killed, "--workers", 2)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and not any(killed.glob("rank=*/seed-*/checkpoints/last.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        process.wait()
    deadline = time.monotonic() + 60
    while True:  # processes that a killed sweep left behind save and end
        answer = kmixer_command(*arguments(recipe_path, killed))
        if answer.code == 0:
            break
        assert "is being run by another process" in answer.err
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert table(killed) == [{**row, "arm": str(row["arm"]).replace("whole", "killed")} for row in table(whole)]

    # Nothing is done again.
    times = {path: path.stat().st_mtime_ns for path in whole.glob("*/*/results.json")}
    assert len(times) == 4
    assert kmixer_command(*arguments(recipe_path, whole)).code == 0
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*/*/results.json")} == times


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


def test_what_a_sweep_refuses(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    for wrong, said in (
        (["--seeds", "0"], "allowed: 1 or more"),
        (["--seeds", "a"], "a list such as 42,69,420"),
        (["--seeds", "1,1"], "every seed once"),
        (["--grid", "model.rank"], "write it as key=a,b"),
        (["--grid", "model.rank=2,2"], "give every value once"),
        (["--grid", "model.rnak=2"], "did you mean rank?"),
    ):
        assert said in kmixer_command("sweep", recipe_path, "--out", out, *wrong).error()
        assert not out.exists()
    start_sweep(out, Sweep(recipe=str(recipe_path), settings=[], arms={"base": []}, seeds=[1]))
    start_sweep(out, Sweep(recipe=str(recipe_path), settings=[], arms={"base": []}, seeds=[2]))
    assert Sweep.read(out).seeds == [1, 2]
    with pytest.raises(InputError, match="holds another sweep"):
        start_sweep(out, Sweep(recipe=str(recipe_path), settings=["model.rank=3"], arms={"base": []}, seeds=[1]))
    assert "none of its runs has ended" in kmixer_command("compare", out).error()
    assert "is not a sweep" in kmixer_command("sweep", recipe_path, "--out", tmp_path).error()


def test_arms_are_every_combination(recipe_path: Path, tmp_path: Path) -> None:
    arms = arms_of_grid({"model.rank": ["2", "3"], "model.decay.range": ["[0.05, 0.9]"]})
    assert list(arms) == ["rank=2_range=-0.05,-0.9-", "rank=3_range=-0.05,-0.9-"]
    assert arms["rank=3_range=-0.05,-0.9-"] == ["model.rank=3", "model.decay.range=[0.05, 0.9]"]
    sweep = Sweep(recipe=str(recipe_path), settings=["training.steps=5"], arms=arms, seeds=[1, 2])
    runs = sweep_runs(tmp_path, sweep)
    assert [(run.seed, run.steps) for run in runs] == [(1, 5), (1, 5), (2, 5), (2, 5)]
    assert arms_of_grid({}) == {"base": []}


@pytest.mark.parametrize("name", packaged_ablations())
def test_packaged_ablations_are_recipes_of_one_budget(name: str, tmp_path: Path) -> None:
    sweep = load_ablation(name)
    assert len(sweep.seeds) >= 3
    runs = sweep_runs(tmp_path, sweep)
    recipes = [load_recipe(sweep.recipe, run.settings) for run in runs]
    if name.endswith("equal-flops"):
        costs = [account_of(sweep.recipe, run.settings) for run in runs]
        spent = [each.trained_units * each.forward_flops for each in costs]
        assert max(spent) < 1.003 * min(spent)
        return
    assert len({(recipe.training.steps, recipe.units_per_step) for recipe in recipes}) == 1
    assert len({recipe.training.evaluate_every for recipe in recipes}) == 1


def test_an_ablation_file(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "ablation.toml"
    arms = {"plain": [], "narrow": ["model.width=8"]}
    path.write_text(tomli_w.dumps({"recipe": str(recipe_path), "arms": arms, "seeds": [1]}))
    out = tmp_path / "sweep"
    answer = kmixer_command("sweep", path, "--out", out, "--threads", 1, "--set", "training.steps=2")
    assert answer.code == 0, answer
    assert [row["arm"] for row in compare(read_arms([out]))] == ["sweep/plain", "sweep/narrow"]
    assert "the arms of" in kmixer_command("sweep", path, "--grid", "model.rank=2,3", "--out", out).error()
    assert "no such ablation" in kmixer_command("sweep", "ablations/nothing").error()


def test_a_diverged_run_does_not_stop_the_others(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    grid = ["--grid", "training.learning_rate=0.01,1e30"]
    answer = kmixer_command("sweep", recipe_path, *grid, "--out", tmp_path / "sweep", "--threads", 1)
    assert answer.code == 0
    assert "learning_rate=1e30, seed 42: diverged" in answer.out
    assert [row["arm"] for row in compare(read_arms([tmp_path / "sweep"]))] == ["sweep/learning_rate=0.01"]
