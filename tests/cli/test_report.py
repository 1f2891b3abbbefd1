"""kmixer analyze and report: what they print, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run

REFINED = ["--set", "model.refinement.steps=2"]


def test_a_page_of_a_run(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kmixer_command("train", recipe_file, "--out", run)
    assert kmixer_command("report", run, "--figures", tmp_path / "figures").out.strip() == str(run / "report.html")
    assert (tmp_path / "figures/loss-curves.png").is_file()
    page = tmp_path / "page.html"
    assert kmixer_command("report", run, "--out", page).out.strip() == str(page)
    assert '<figure id="loss-curves">' in page.read_text()
    assert "ends in .html" in kmixer_command("report", run, "--out", tmp_path / "page.txt").error()
    assert "holds no run" in kmixer_command("report", tmp_path / "nothing").error()


def test_analyze_prints_what_was_learned(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kmixer_command("train", recipe_file, "--out", run, *REFINED)
    text = kmixer_command("analyze", run).out
    assert "effective windows" in text
    assert "eta 0." in text
    assert "loss at position 1: " in text
    found = json.loads(kmixer_command("analyze", run, "--json").out)
    assert {"decay", "effective_window", "eta", "loss_by_position"} <= found.keys()


def test_analyze_takes_a_packaged_model(kmixer_command: Run, tmp_path: Path) -> None:
    text = tmp_path / "play.txt"
    text.write_text("KING:\nWhat is thy name?\n" * 10)
    options = ["--text", text, "--window", 32, "--json"]
    assert len(json.loads(kmixer_command("analyze", "shakespeare-small", *options).out)["loss_by_position"]) == 32
    assert "give one with --text FILE" in kmixer_command("analyze", "shakespeare-small").error()
    assert "nothing: no such file" in kmixer_command("analyze", "shakespeare-small", "--text", "nothing").error()
