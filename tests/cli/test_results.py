"""kmixer results: the page of published figures beside ours."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import tomli_w

from kmixer.experiments.sections import short_commit
from kmixer.experiments.sweep import arms_of_grid
from tests.cli.conftest import Run, make_sweep


def test_the_page_is_made_from_sweeps_and_again_without_them(
    kmixer_command: Run, recipe_file: Path, tmp_path: Path
) -> None:
    sweep, run = tmp_path / "sweep", tmp_path / "run"
    make_sweep(sweep, recipe_file, seeds=2, arms=arms_of_grid({"model.rank": ["2", "3"]}))
    kmixer_command("train", recipe_file, "--out", run)
    entries = [
        {"name": "ranks", "title": "Two ranks", "published": "3.2 nats", "sweep": "sweep", "note": "No reason."},
        {"name": "one", "title": "One run", "sweep": "run", "baseline": "sweep", "reach": 100.0},
        {"name": "denoise", "title": "Denoising", "denoise": "denoise.json"},
    ]
    answer = kmixer_command("task", "denoise", "--seeds", 2, "--steps", 1, "--json")
    (tmp_path / "denoise.json").write_text(answer.out)
    file, out = tmp_path / "results.toml", tmp_path / "docs" / "results.md"
    file.write_text(tomli_w.dumps({"title": "Results", "introduction": "Made by a test.", "result": entries}))
    assert kmixer_command("results", file, "--out", out).code == 0
    page = out.read_text()
    for part in (
        "# Results",
        "## Two ranks",
        "Published: 3.2 nats",
        "sweep/rank=3",
        "No reason.",
        "- sweep/rank=2: 100.0 reached by 2 of 2 runs after 0 tokens",
        "- run: 100.0 reached by 1 of 1 run after 0 tokens",
        "| softmax attention | 9,456 | 2 |",
    ):
        assert part in page
    assert "windows of 32 | windows of 256 | windows of 1,024 | one stream" in page
    assert "| arm | gate | base share | alpha | decay |" in page
    command = re.search(r"`(kmixer sweep \S+ --seeds 42,43 --grid model.rank=2,3)`; (cpu|cuda): ", page)
    assert command, page

    shutil.rmtree(sweep)
    answer = kmixer_command("results", file, "--out", out)
    assert "ranks: its sweep is not here" in answer.out
    assert out.read_text() == page
    out.with_suffix(".json").unlink()
    assert "holds no table of it" in kmixer_command("results", file, "--out", out).error()
    file.write_text(tomli_w.dumps({"title": "Results", "result": [{"name": "none", "title": "Nothing"}]}))
    assert "give one of sweep and denoise" in kmixer_command("results", file, "--out", out).error()


def test_classifiers_have_accuracies_and_no_windows(kmixer_command: Run, tmp_path: Path) -> None:
    sizes = {"steps": 2, "warmup_steps": 1, "evaluate_every": 1, "batch_size": 8}
    settings = ["model.layers=1", *(f"training.{key}={value}" for key, value in sizes.items())]
    make_sweep(tmp_path / "sweep", "vit-digits", settings=settings)
    file, out = tmp_path / "results.toml", tmp_path / "results.md"
    entry = {"name": "digits", "title": "Digits", "sweep": "sweep"}
    file.write_text(tomli_w.dumps({"title": "Results", "result": [entry]}))
    assert kmixer_command("results", file, "--out", out).code == 0
    page = out.read_text()
    assert page.count("| arm | n | accuracy | loss | last |") == 2  # validation and test
    assert "window" not in page


def test_the_page_is_not_written_over_anything_else(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    kmixer_command("train", recipe_file, "--out", tmp_path / "run")
    before = (tmp_path / "run/results.json").read_bytes()
    file = tmp_path / "results.toml"
    file.write_text(tomli_w.dumps({"title": "R", "result": [{"name": "x", "title": "X", "sweep": "run"}]}))
    said = kmixer_command("results", file, "--out", tmp_path / "run/results.md").error()
    assert "holds a run or a sweep" in said
    for out in (file, tmp_path / "run/results.json"):
        assert "allowed: a Markdown page" in kmixer_command("results", file, "--out", out).error()
    assert (tmp_path / "run/results.json").read_bytes() == before


def test_a_commit_that_the_checkout_was_not_stays_marked() -> None:
    assert short_commit("0123456789abcdef") == "0123456789"
    assert short_commit("0123456789abcdef-dirty") == "0123456789-dirty"
    assert short_commit("None") == "None"
