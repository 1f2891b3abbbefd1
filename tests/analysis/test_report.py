"""The page about runs: what stands in it, and what it leaves out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kmixer.analysis.report import write_report
from kmixer.errors import InputError
from kmixer.experiments.arms import read_arms
from kmixer.experiments.compare import compare
from kmixer.experiments.sweep import arms_of_grid
from kmixer.runs.recipe import LanguageRecipe
from kmixer.training.loop import train
from tests.cli.conftest import make_sweep, recipe_file  # noqa: F401
from tests.conftest import tiny_recipe_values


@pytest.fixture
def sweep(recipe_file: Path, tmp_path: Path) -> Path:  # noqa: F811
    out = tmp_path / "sweep"
    arms = arms_of_grid({"model.base_kernel.kind": ["conv", "none"]})
    make_sweep(out, recipe_file, seeds=2, arms=arms, settings=["model.refinement.steps=2"])
    return out


def test_the_page_holds_everything_and_needs_nothing(sweep: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    write_report([sweep], sweep / "report.html", figures)
    page = (sweep / "report.html").read_text()
    for name in ("loss-curves", "final-losses", "refinement", "base-share-kind=conv", "decays-kind=none"):
        assert f'<figure id="{name}">' in page, name
    assert "base-share-kind=none" not in page
    # Nothing is fetched: the only addresses are names of namespaces and of licences inside the drawings.
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert "<script" not in page
    names = {path.name for path in figures.iterdir()}
    assert {"loss-curves.svg", "loss-curves.png"} <= names

    for path in sweep.rglob("*.safetensors"):
        path.unlink()
    write_report([sweep], sweep / "report.html")  # a record without weights has a page too
    page = (sweep / "report.html").read_text()
    assert '<figure id="loss-curves">' in page
    assert "Samples" not in page
    assert len(compare(read_arms([sweep]))) == 2


def test_pieces_of_words_and_dense_kernels_have_a_page(text_file: Path, tmp_path: Path) -> None:
    values = tiny_recipe_values(text_file)
    values["tokenizer"] = {"kind": "sentencepiece", "vocabulary_size": 120}
    values["model"]["base_kernel"] = {"kind": "dense", "size": 64}
    values["training"]["evaluate_every"] = 2
    run = tmp_path / "run"
    train(LanguageRecipe.parse(values, source="test"), run)
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for part in (
        "What was learned",
        "base share",
        'id="base-kernel-matrix"',
        'id="positions-over-training"',
        "<h2>Samples</h2>",
    ):
        assert part in page, part
    (run / "results.json").unlink()
    write_report([run], tmp_path / "page.html")
    assert "1 run had not ended" in (tmp_path / "page.html").read_text()
    with pytest.raises(InputError, match="holds no run"):
        write_report([tmp_path / "nothing"], tmp_path / "page.html")
