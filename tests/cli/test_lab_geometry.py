"""kmixer lab geometry: runs beside untrained encoders, the ablation of heads; what it draws, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kmixer.analysis.figures import all_figures
from kmixer.experiments.arms import arms_of
from kmixer.models.model_folder import PACKAGED
from kmixer.runs.lab import lab_file, read_measurement
from kmixer.runs.lab_geometry import GeometryRecord
from kmixer.runs.run_folder import RunFolder
from tests.cli.conftest import Run
from tests.cli.test_lab import run_folder  # noqa: F401

QUICK = ("--windows", "64", "--window", "12", "--inits", "1")
ABLATION = ("--ablation", "--systems", "oscillator", "--mixers", "softmax", "--steps", "2", "--length", "16")


def measured(kmixer: Run, *arguments: object) -> dict[str, Any]:
    answer = kmixer("lab", "geometry", *arguments, "--json")
    assert answer.code == 0, answer
    value: dict[str, Any] = json.loads(answer.out)
    return value


def test_a_run_stands_beside_untrained_encoders(kmixer_command: Run, run_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    figure = tmp_path / "geometry.svg"
    seen = measured(kmixer_command, run_folder, *QUICK, "--reverse", "--figure", figure)
    assert "<svg" in figure.read_text()
    assert seen["perturbations"] == ["1 %", "5 %", "10 %", "reversed"]
    assert (seen["windows"], seen["positions"], seen["trained"]) == (64, 12, True)
    (curve,) = seen["curves"]
    assert len(curve["untrained"]) == 1
    assert 0 < curve["trained"]["distance"][0] < curve["trained"]["distance"][2] < 1
    assert curve["changed"][0] < curve["changed"][1] < curve["changed"][2] < 0.2
    assert measured(kmixer_command, run_folder, *QUICK, "--reverse") == seen
    text = kmixer_command("lab", "geometry", run_folder, *QUICK)
    assert "64 windows" in text.out
    assert "no distance from system or text" in text.out
    assert "fewer than 20 for a channel" in text.err


def test_layers_and_pools_differ(kmixer_command: Run, run_folder: Path) -> None:  # noqa: F811
    asked: tuple[tuple[object, ...], ...] = ((), ("--layer", "0"), ("--layer", "4"), ("--pool", "last"))
    distances = [
        measured(kmixer_command, run_folder, *QUICK, *more)["curves"][0]["trained"]["distance"] for more in asked
    ]
    assert len({tuple(values) for values in distances}) == len(asked)


def test_a_run_is_kept_and_drawn(kmixer_command: Run, run_folder: Path) -> None:  # noqa: F811
    seen = measured(kmixer_command, run_folder, *QUICK, "--save")
    run = RunFolder(run_folder)
    assert json.loads(lab_file(run, "geometry").read_text()).items() > seen.items()
    assert read_measurement(run, GeometryRecord) is not None
    assert "geometry" in [drawn.name for drawn in all_figures(arms_of([run_folder]))]
    lab_file(run, "geometry").write_text('{"curves": []}')
    assert "lab-geometry.json holds no measurement" in kmixer_command("report", run_folder).error()


def test_two_runs_share_windows_and_directions(kmixer_command: Run, run_folder: Path) -> None:  # noqa: F811
    seen = measured(kmixer_command, run_folder, run_folder, *QUICK)
    first, second = seen["curves"]
    assert first == second
    assert "recipe_sha256" not in seen
    assert "--save: got 2 runs" in kmixer_command("lab", "geometry", run_folder, run_folder, "--save").error()


def test_heads_are_trained_and_compared(kmixer_command: Run, tmp_path: Path) -> None:
    figure = tmp_path / "heads.png"
    asked = (*ABLATION, "--seeds", "2", "--codebook", "16", "--learned", "--noise", "0.05")
    answer = kmixer_command("lab", "geometry", *asked, "--figure", figure)
    assert answer.code == 0, answer
    assert figure.stat().st_size > 1000
    for said in ("after 2 steps", "16 learned codes, 2 seeds", "D_8", "R^2", "velocity", "less that of the untrained"):
        assert said in answer.out
    assert answer.err.splitlines()[-1].startswith("4/4: oscillator, softmax, mse, 16 codes, seed 1")


def test_one_head_and_one_seed_claim_nothing(kmixer_command: Run) -> None:
    seen = measured(kmixer_command, *ABLATION, "--heads", "mse", "--seeds", "1", "--pool", "last", "--width", "16")
    (compared,) = seen["comparisons"]
    assert compared["heads"] is None
    assert compared["from_untrained"]["mse"]["interval"] is None
    assert (seen["width"], seen["inputs"], seen["pool"]) == (16, 1024, "last")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--ablation", "--systems", "pendulum"), "--systems: got 'pendulum'; allowed: oscillator, lorenz, sines"),
        (("--ablation", "--mixers", "rnn"), "--mixers: got 'rnn'"),
        (("--ablation", "--heads", "l1"), "--heads: got 'l1'; allowed: ce, mse"),
        (("--ablation", "--codebook", "1"), "--codebook: got 1; allowed: numbers from 2 to 4096"),
        (("--ablation", "--width", "18"), "width"),
        (("--ablation", "--noise", "2"), "--noise: got 2; allowed: shares"),
        (("--ablation", "--noise", "x"), "--noise: got 'x'"),
        (("--ablation", "--pool", "max"), "--pool: got 'max'; allowed: mean, last"),
        (("--ablation", "--layer", "1"), "--layer goes with a run; --ablation has none"),
        (("--ablation", "--save"), "--save goes with a run"),
        (("--ablation", "--figure", "heads.pdf"), "--figure: got heads.pdf"),
        ((), "give one run or two, or --ablation alone"),
        (("a", "b", "c"), "give one run or two"),
        (("somewhere", "--steps", "5"), "--steps goes with --ablation"),
        (("somewhere",), "somewhere"),
        ((PACKAGED / "shakespeare-small",), "is a model without its run, so without data"),
    ],
)
def test_wrong_options_are_one_line(kmixer_command: Run, arguments: tuple[object, ...], why: str) -> None:
    assert why in kmixer_command("lab", "geometry", *arguments).error()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--windows", "16"), "--windows: got 16 for a width of 16"),
        (("--windows", "1000000"), "different ones"),
        (("--window", "1000000"), "--window: got 1000000; the validation part has"),
        (("--layer", "5"), "--layer: got 5; allowed: 0 to 4"),
        (("--systems", "lorenz"), "--systems goes with --ablation"),
    ],
)
def test_what_a_run_does_not_give_is_one_line(
    kmixer_command: Run,
    run_folder: Path,  # noqa: F811
    arguments: tuple[str, ...],
    why: str,
) -> None:
    assert why in kmixer_command("lab", "geometry", run_folder, *arguments).error()
