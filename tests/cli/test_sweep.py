"""Sweeps: what has ended is not repeated, what was killed goes on, and the table is the same."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from kmixer.cli.experiments import plan
from kmixer.cli.inspect import account_of
from kmixer.errors import InputError
from kmixer.experiments.arms import read_arms
from kmixer.experiments.compare import compare
from kmixer.experiments.sweep import (
    SWEEP,
    Sweep,
    arms_of_grid,
    check_sweep,
    command_of,
    load_ablation,
    packaged_ablations,
    sweep_runs,
)
from kmixer.files import write_json
from kmixer.runs.recipe import load_recipe
from tests.cli.conftest import Run, make_sweep
from tests.conftest import threads_of_torch

GRID = "model.rank=2,3"


def arguments(recipe: Path, out: Path, *more: object) -> list[str]:
    return [str(part) for part in ("sweep", recipe, "--seeds", 2, "--grid", GRID, "--out", out, "--threads", 1, *more)]


def table(folder: Path) -> list[dict[str, object]]:
    """The comparison without the time it took."""
    return [{k: v for k, v in row.to_json().items() if k != "seconds"} for row in compare(read_arms([folder]))]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kmixer", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def checkpoints(folder: Path) -> dict[Path, int]:
    """When each run last saved."""
    found: dict[Path, int] = {}
    for path in folder.glob("*/seed-*/checkpoints/last.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # replaced between the two looks
            found[path] = path.stat().st_mtime_ns
    return found


def finish(kmixer_command: Run, words: list[str]) -> None:
    """Run a sweep to its end, once the processes that a killed one left behind have saved and ended."""
    deadline = time.monotonic() + 60
    while (answer := kmixer_command(*words)).code != 0:
        assert "is being run by another process" in answer.err
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_sweep_killed_twice_ends_with_the_same_table(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with threads_of_torch(1):  # as many as the killed sweep's runs have: sums depend on it
        make_sweep(whole, recipe_path, seeds=2, arms=arms_of_grid({"model.rank": ["2", "3"]}))
    for number in (signal.SIGKILL, signal.SIGINT):
        before = checkpoints(killed)
        process = start(arguments(recipe_path, killed, "--workers", 2))
        deadline = time.monotonic() + 60
        while process.poll() is None and checkpoints(killed) == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        process.wait()
    finish(kmixer_command, arguments(recipe_path, killed))
    assert table(killed) == table(whole)

    # Nothing is done again.
    times = {path: path.stat().st_mtime_ns for path in killed.glob("*/*/results.json")}
    assert len(times) == 4
    answer = kmixer_command(*arguments(recipe_path, killed))
    assert answer.code == 0
    assert "rank=3" in answer.out
    assert {path: path.stat().st_mtime_ns for path in killed.glob("*/*/results.json")} == times


def test_what_a_sweep_refuses(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    for wrong, said in (
        (["--seeds", "0"], "allowed: 1 or more"),
        (["--seeds", "a"], "a list such as 42,69,420"),
        (["--seeds", "1,1"], "every seed once"),
        (["--grid", "model.rank"], "write it as key=a,b"),
        (["--grid", "model.rank=2,2"], "give every value once"),
        (["--grid", "model.rnak=2"], "did you mean rank?"),
        (["--grid", "model.rank=2", "--grid", "model.rank=3"], "got model.rank more than once"),
        (["--grid", "training.seed=1,2"], "choose them with --seeds"),
    ):
        assert said in kmixer_command("sweep", recipe_path, "--out", out, *wrong).error()
        assert not out.exists()
    there = Sweep(description="as it was", recipe=str(recipe_path), settings=[], arms={"base": []}, seeds=[1])
    write_json(out / SWEEP, there.model_dump())
    assert check_sweep(out, there.model_copy(update={"seeds": [2], "description": "reworded"})).seeds == [1, 2]
    with pytest.raises(InputError, match="holds another sweep"):
        check_sweep(out, there.model_copy(update={"settings": ["model.rank=3"]}))
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
    assert [row.arm for row in compare(read_arms([out]))] == ["plain", "narrow"]
    assert "the arms of" in kmixer_command("sweep", path, "--grid", "model.rank=2,3", "--out", out).error()
    assert "no such ablation" in kmixer_command("sweep", "ablations/nothing").error()


def test_a_diverged_run_does_not_stop_the_others(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    grid = ["--grid", "training.learning_rate=1e30,0.01", "--threads", 1]
    for _ in range(2):  # what diverged is not tried again, and is still said
        answer = kmixer_command("sweep", recipe_path, *grid, "--out", tmp_path / "sweep")
        assert answer.code == 0
        assert "learning_rate=1e30, seed 42: diverged" in answer.out
        assert "learning_rate=1e30 has no result: of 1 runs 1 diverged" in answer.out
    log = (tmp_path / "sweep/learning_rate=1e30/seed-42.log").read_text()
    assert log.count("training stopped") == 1
    (row,) = json.loads(kmixer_command("compare", tmp_path / "sweep", "--json").out)
    # The first arm is the baseline; without it there are no differences, rather than those from another.
    assert (row["arm"], row["difference"]) == ("learning_rate=0.01", None)
    assert kmixer_command("report", tmp_path / "sweep").code == 0
    assert "1 diverged" in (tmp_path / "sweep/report.html").read_text()


def test_a_sweep_does_not_mix_recipes(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    assert kmixer_command("sweep", recipe_path, "--out", out, "--threads", 1).code == 0
    before = (out / SWEEP).read_text()
    recipe_path.write_text(recipe_path.read_text().replace("rank = 2", "rank = 3"))
    answer = kmixer_command("sweep", recipe_path, "--seeds", 2, "--out", out, "--threads", 1)
    assert "model.rank is 2 in the run and 3 now" in answer.error()
    assert (out / SWEEP).read_text() == before


def test_two_processes_do_not_run_one_sweep(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words = ["sweep", str(recipe_path), "--out", str(out), "--threads", "1"]
    process = start(words)
    deadline = time.monotonic() + 60
    while not (out / SWEEP).is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before = (out / SWEEP).read_text()
    answer = kmixer_command(*words, "--seeds", 3)
    assert "is being run by another process" in answer.error()
    assert (out / SWEEP).read_text() == before
    process.send_signal(signal.SIGINT)
    process.wait()
    finish(kmixer_command, words)


def test_the_command_of_a_sweep_makes_it_again(recipe_path: Path) -> None:
    recipe = str(recipe_path)
    grid = {"model.rank": ["2", "3"], "model.decay.range": ["[0.05, 0.9]", "[0.15, 0.9]"]}
    settings = ["training.steps=5"]
    sweep = Sweep(recipe=recipe, settings=settings, arms=arms_of_grid(grid), seeds=[1, 7])
    for made in (sweep, sweep.model_copy(update={"arms": {"base": []}})):
        assert plan_of(shlex.split(command_of(made))) == made
    ablation = load_ablation("ablations/rank")
    more = ablation.model_copy(update={"seeds": [5], "settings": [*ablation.settings, "training.steps=5"]})
    assert command_of(ablation) == "kmixer sweep ablations/rank"
    assert plan_of(shlex.split(command_of(more))) == more
    own = Sweep(recipe=recipe, arms={"a": [], "b": ["model.rank=2"]}, seeds=[1])
    assert command_of(own) == "kmixer sweep FILE.toml"
    assert plan_of(shlex.split(command_of(sweep.model_copy(update={"begin_from": "runs/x"})))).begin_from == "runs/x"
    going_on = {"recipe": "runs/{seed}/recipe.toml", "begin_from": "runs/{seed}"}
    assert command_of(sweep.model_copy(update=going_on)).startswith("kmixer sweep --from 'runs/{seed}' --seeds 1,7 ")


def test_a_sweep_goes_on_from_runs(kmixer_command: Run, recipe_path: Path, tmp_path: Path) -> None:
    """Every run begins with the weights of the run of its seed; the same command finds it all done."""
    first, out = tmp_path / "first", tmp_path / "out"
    make_sweep(first, recipe_path, seeds=2)
    seeds = Sweep.read(first).seeds
    command = ["sweep", "--from", first / "base/seed-{seed}", "--seeds", ",".join(map(str, seeds)), "--out", out]
    command += ["--grid", "model.output_gate=false,true", "--set", "training.steps=3", "--threads", 1]
    assert kmixer_command(*command).code == 0
    for arm in Sweep.read(out).arms:
        for seed in seeds:
            began = json.loads((out / arm / f"seed-{seed}/environment.json").read_text())["from"]
            assert began["path"] == str(first / f"base/seed-{seed}")
            assert bool(began["fresh"]) == ("true" in arm)
    before = checkpoints(out)
    assert kmixer_command(*command).code == 0
    assert checkpoints(out) == before
    assert "list them, for example --seeds 1,2,3" in kmixer_command(*command[:3], "--seeds", 2).error()
    assert "got neither RECIPE nor --from RUN" in kmixer_command("sweep").error()


def plan_of(words: list[str]) -> Sweep:
    """What a command line `kmixer sweep RECIPE --option value ...` plans."""
    options: dict[str, list[str]] = {}
    for option, value in zip(words[3::2], words[4::2], strict=True):
        options.setdefault(option, []).append(value)
    (seeds,) = options.get("--seeds", [None])
    (begin_from,) = options.get("--from", [None])
    return plan(words[2], seeds, options.get("--grid", []), options.get("--set", []), begin_from)
