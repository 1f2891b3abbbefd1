"""kmixer lab ecology: sources beside each other, a model's eyes on them, the rescue; what is drawn, kept, refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from kmixer.analysis.figures import all_figures
from kmixer.data.brackets import library_text
from kmixer.experiments import rescue
from kmixer.experiments.arms import arms_of
from kmixer.runs.lab import lab_file, read_measurement
from kmixer.runs.lab_ecology import EcologyRecord
from kmixer.runs.recipe import load_recipe
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from tests.cli.conftest import Run
from tests.conftest import tiny_recipe_values

QUICK = ("--context", "suffix:1", "--blocks", "20", "--min-count", "10")


@pytest.fixture
def sources(tmp_path: Path, text: str) -> list[Path]:
    """Two halves of one text, shuffled in blocks, and another."""
    blocks = [text[i : i + 200] for i in range(0, len(text), 200)]
    texts = {"one": "".join(blocks[::2]), "two": "".join(blocks[1::2]), "code": library_text()[:12_000]}
    for name, of_source in texts.items():
        (tmp_path / f"{name}.txt").write_text(of_source, encoding="utf-8")
    return [tmp_path / f"{name}.txt" for name in texts]


@pytest.fixture
def run_folder(sources: list[Path], tmp_path: Path) -> Path:
    return trained(sources[0], tmp_path / "run")


def trained(corpus: Path, folder: Path, **model: Any) -> Path:
    values = tiny_recipe_values(corpus)
    values["tokenizer"] = {"kind": "byte"}
    values["model"] |= model
    path = folder.with_suffix(".toml")
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    train(load_recipe(str(path)), folder)
    return folder


def measured(kmixer: Run, *arguments: object) -> dict[str, Any]:
    answer = kmixer("lab", "ecology", *arguments, "--json")
    assert answer.code == 0, answer
    value: dict[str, Any] = json.loads(answer.out)
    return value


def test_sources_differ_and_halves_of_one_text_do_not(kmixer_command: Run, sources: list[Path], tmp_path: Path) -> None:
    figure = tmp_path / "ecology.svg"
    one = measured(kmixer_command, *sources, *QUICK, "--figure", figure)
    assert "<svg" in figure.read_text()
    assert (one["sources"], one["unit"], one["exact"]) == (["one", "two", "code"], "characters", True)
    assert one["tokens"] == 10_000
    differ = {(row["first"], row["second"]): row["differs"] for row in one["pairs"]}
    assert differ == {(0, 1): False, (0, 2): True, (1, 2): True}
    assert one["path"][0]["cells"] == [[0], [1], [2]]
    assert [step["cells"] for step in one["path"]][1:] == [[[0, 1], [2]], [[0, 1, 2]]]
    assert [step["noise"] for step in one["path"]] == [False, True, False]
    assert len(one["cuts"]) == 5
    assert measured(kmixer_command, *sources, *QUICK) == one
    text = kmixer_command("lab", "ecology", *sources, *QUICK).out
    assert "none found" in text and "3 sources of 10,000 characters" in text
    assert "Nothing here says what training does" in text.replace("\n", " ")


def test_permuting_sources_permutes_what_comes_out_and_one_twice_is_no_difference(
    kmixer_command: Run, sources: list[Path]
) -> None:
    first, _, code = sources
    one, other = measured(kmixer_command, first, code, *QUICK), measured(kmixer_command, code, first, *QUICK)
    assert one["pairs"][0]["corrected"] == pytest.approx(
        other["pairs"][0]["corrected"], abs=3 * one["pairs"][0]["error"]
    )
    assert one["contexts"] == other["contexts"]
    (twice,) = measured(kmixer_command, first, first, *QUICK)["pairs"]
    assert not twice["differs"] and twice["corrected"] <= 0


def test_letters_and_lengths(kmixer_command: Run, sources: list[Path]) -> None:
    one = measured(kmixer_command, *sources, *QUICK, "--letters")
    assert one["followers"] <= 27 and one["letters"]
    of_lengths = measured(kmixer_command, *sources, *QUICK, "--context", "length:3,5,8")
    assert of_lengths["contexts"] == 3 and of_lengths["coverage"] == [1.0, 1.0, 1.0]


def test_many_sources_are_merged_one_by_one(kmixer_command: Run, tmp_path: Path, text: str) -> None:
    paths = []
    for index in range(9):
        paths.append(tmp_path / f"part{index}.txt")
        paths[-1].write_text(text[2000 * index : 2000 * (index + 1)], encoding="utf-8")
    one = measured(kmixer_command, *paths, "--context", "none", "--blocks", "8")
    assert not one["exact"] and len(one["path"]) == 9
    assert "greedy" in kmixer_command("lab", "ecology", *paths, "--context", "none", "--blocks", "8").out


def test_a_model_is_measured_kept_and_drawn(kmixer_command: Run, sources: list[Path], run_folder: Path) -> None:
    asked = (*sources, *QUICK, "--model", run_folder, "--window", "32")
    one = measured(kmixer_command, *asked, "--save")
    model = one["model"]
    assert (one["unit"], model["splits"], model["window"]) == ("tokens", 20, 32)
    assert model["laws"] > 1000 and 0 < model["coverage"] <= 1
    said = {(row["first"], row["second"]): row["says"] for row in model["pairs"]}
    assert said[0, 1] == "nothing to separate"
    assert {said[0, 2], said[1, 2]} <= {"separated", "merged", "unclear"}
    assert json.loads(lab_file(RunFolder(run_folder), "ecology").read_text()).items() > one.items()
    assert read_measurement(RunFolder(run_folder), EcologyRecord) is not None
    assert "ecology" in [drawn.name for drawn in all_figures(arms_of([run_folder]))]
    assert "nothing to separate" in kmixer_command("lab", "ecology", *asked).out
    lab_file(RunFolder(run_folder), "ecology").write_text('{"sources": []}')
    assert "lab-ecology.json holds no measurement" in kmixer_command("report", run_folder).error()


def test_fast_weights_are_measured_frozen_alone(kmixer_command: Run, sources: list[Path], tmp_path: Path) -> None:
    run = trained(sources[0], tmp_path / "fast", fast_weights={"layers": "every", "chunk": 8})
    asked = ("lab", "ecology", *sources[1:], *QUICK, "--window", "32", "--model", run)
    assert "--adapt off freezes it" in kmixer_command(*asked).error()
    answer = kmixer_command(*asked, "--adapt", "off")
    assert answer.code == 0, answer


def test_the_rescue_stands_beside_counters(
    kmixer_command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rescue, "library_text", lambda: library_text()[:300_000])
    small = functools.partial(rescue.Setting, batch_size=4, training=100, measured=20, width=16, layers=1, heads=2)
    monkeypatch.setattr("kmixer.analysis.rescue.Setting", small)
    asked = ("lab", "ecology", "--rescue", "--alpha", "0,1", "--seeds", "2", "--steps", "2")
    figure = tmp_path / "rescue.svg"
    answer = kmixer_command(*asked, "--figure", figure, "--json")
    assert answer.code == 0, answer
    assert "16 trainings of 2 steps" in answer.err and "0 trainings left" in answer.err
    one = json.loads(answer.out)
    assert [evaluation["name"] for evaluation in one["evaluations"]] == ["chunks", "separated"]
    assert all(evaluation["null"]["discrimination"] > 0 for evaluation in one["evaluations"])
    assert "counter, 3 characters" in figure.read_text()
    text = kmixer_command(*asked, "--mixers", "k2", "--seeds", "1", "--alpha", "1").out
    assert "counter, 5 characters" in text and "ranked right" not in text


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--context", "suffix:0"), "--context: got 'suffix:0'; allowed: none, suffix:2"),
        (("--context", "suffix:30"), "no context occurs 30 times in every source of 10,000 tokens"),
        (("--blocks", "1001"), "10,000 tokens; 1001 blocks need 10,010 or more"),
        (("--alpha", "1"), "--alpha: only with --rescue"),
        (("--save", "--adapt", "off"), "--adapt off, --save: only with --model"),
        (("--figure", "ecology.pdf"), "--figure: got ecology.pdf"),
        (("--model", "nowhere"), "nowhere"),
        (("--rescue",), "--rescue makes its own texts and models; leave sources out"),
        (("nowhere.txt",), "'nowhere.txt': no such file or folder"),
    ],
)
def test_wrong_options_are_one_line(
    kmixer_command: Run, sources: list[Path], arguments: tuple[str, ...], why: str
) -> None:
    assert why in kmixer_command("lab", "ecology", *sources, *arguments).error()


def test_what_cannot_be_compared_is_refused(
    kmixer_command: Run, sources: list[Path], run_folder: Path, text_file: Path, recipe_file: Path, tmp_path: Path
) -> None:
    assert "sources: got none; allowed: two texts" in kmixer_command("lab", "ecology").error()
    assert "alone; allowed: two texts" in kmixer_command("lab", "ecology", sources[0]).error()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    assert "latin.txt is not UTF-8" in kmixer_command("lab", "ecology", sources[0], tmp_path / "latin.txt").error()
    model = ("--model", run_folder)
    assert "leave it out" in kmixer_command("lab", "ecology", *sources, *model, "--adapt", "off").error()
    assert "--letters changes the texts" in kmixer_command("lab", "ecology", *sources, *model, "--letters").error()
    assert "--window: got" in kmixer_command("lab", "ecology", *sources, *QUICK, *model, "--window", "99999").error()
    train(load_recipe(str(recipe_file)), tmp_path / "characters")
    (tmp_path / "greek.txt").write_text("αβγ " * 5000, encoding="utf-8")
    greek = ("lab", "ecology", text_file, tmp_path / "greek.txt", "--model", tmp_path / "characters")
    assert "greek: the model's tokenizer does not know 'α'" in kmixer_command(*greek).error()


@pytest.mark.parametrize("text", ["", "2", "0,x", "-1", "nan"])
def test_wrong_shares_are_one_line(kmixer_command: Run, text: str) -> None:
    error = kmixer_command("lab", "ecology", "--rescue", "--alpha", text or ",").error()
    assert "--alpha: got" in error and "allowed: numbers from 0 to 1" in error


def test_other_mixers_are_one_line(kmixer_command: Run) -> None:
    assert "--mixers: got 'sinkhorn'" in kmixer_command("lab", "ecology", "--rescue", "--mixers", "sinkhorn").error()
