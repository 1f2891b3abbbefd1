"""kmixer analyze and report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kmixer.experiments.sweep import arms_of_grid
from tests.cli.conftest import Run, make_sweep

REFINED = ["--set", "model.refinement.steps=2"]


@pytest.fixture
def sweep(recipe_file: Path, tmp_path: Path) -> Path:
    out = tmp_path / "sweep"
    arms = arms_of_grid({"model.base_kernel.kind": ["conv", "none"]})
    make_sweep(out, recipe_file, seeds=2, arms=arms, settings=["model.refinement.steps=2"])
    return out


def test_the_page_holds_everything_and_needs_nothing(kmixer_command: Run, sweep: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    answer = kmixer_command("report", sweep, "--figures", figures)
    assert answer.code == 0, answer
    page = (sweep / "report.html").read_text()
    for name in ("loss-curves", "final-losses", "refinement", "base-share-kind-conv", "decays-kind-none"):
        assert f'<figure id="{name}">' in page.replace("kind=", "kind-"), name
    assert "base-share-kind=none" not in page
    assert "kind=none" in page
    # Nothing is fetched: the only addresses are names of namespaces and of licences inside the drawings.
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert "<script" not in page
    names = {path.name for path in figures.iterdir()}
    assert {"loss-curves.svg", "loss-curves.png"} <= names


def test_a_run_that_is_not_finished_has_a_page_too(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kmixer_command("train", recipe_file, "--out", run)
    (run / "results.json").unlink()
    page = tmp_path / "page.html"
    assert kmixer_command("report", run, "--out", page).out.strip() == str(page)
    assert "1 run had not ended" in page.read_text()
    assert "ends in .html" in kmixer_command("report", run, "--out", tmp_path / "page.txt").error()
    assert "holds no run" in kmixer_command("report", tmp_path / "nothing").error()


def test_records_without_weights_have_a_page(kmixer_command: Run, sweep: Path) -> None:
    for path in sweep.rglob("*.safetensors"):
        path.unlink()
    assert kmixer_command("report", sweep).code == 0
    page = (sweep / "report.html").read_text()
    assert '<figure id="loss-curves">' in page
    assert "Samples" not in page
    assert kmixer_command("compare", sweep).code == 0


def test_pieces_of_words_and_dense_kernels_have_a_page(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    run, page = tmp_path / "run", tmp_path / "page.html"
    settings = ["tokenizer.kind=sentencepiece", "tokenizer.vocabulary_size=120", "model.base_kernel.kind=dense"]
    settings += ["model.base_kernel.size=64", "training.evaluate_every=2"]
    kmixer_command("train", recipe_file, "--out", run, *(part for s in settings for part in ("--set", s)))
    answer = kmixer_command("report", run, "--out", page)
    assert answer.code == 0, answer
    for part in ("What was learned", "base share", 'id="base-kernel-matrix"', 'id="positions-over-training"'):
        assert part in page.read_text(), part


def test_analyze_prints_what_training_recorded(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kmixer_command("train", recipe_file, "--out", run, *REFINED, "--set", "training.evaluate_every=8")
    found = json.loads(kmixer_command("analyze", run, "--json").out)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    recorded = {line["step"]: line["dynamics"] for line in lines if "dynamics" in line}
    best = json.loads((run / "results.json").read_text())["best"]
    assert found["decay"] == recorded[best["step"]]["decay"]
    assert found["effective_window"][0][0] == pytest.approx(1 / (1 - found["decay"][0][0]))
    assert found["eta"] == pytest.approx(recorded[best["step"]]["eta"])
    assert found["loss_by_position"] == pytest.approx(best["loss_by_position"], rel=1e-6)
    evaluated = [line for line in lines if line.get("gradient_norms")]
    assert evaluated
    assert evaluated[0]["gradient_norms"].keys() == evaluated[0]["update_norms"].keys()
    text = kmixer_command("analyze", run).out
    assert "effective windows" in text
    assert "eta 0." in text
