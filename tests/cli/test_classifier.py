"""The commands of a run, on a classifier."""

from __future__ import annotations

import json
import math
from pathlib import Path

from kmixer.runs.recipe import ImageRecipe
from kmixer.training.loop import train
from tests.cli.conftest import Run
from tests.training.test_images import recipe  # noqa: F401  (a fixture)


def test_the_commands_take_a_classifier(
    recipe: ImageRecipe,  # noqa: F811
    tmp_path: Path,
    kmixer_command: Run,
) -> None:
    train(recipe, tmp_path / "run")
    answer = json.loads(kmixer_command("eval", str(tmp_path / "run"), "--json").out)
    assert math.isfinite(answer["loss"])
    assert answer["examples"] > 0
    assert "sigma" in json.loads(kmixer_command("analyze", str(tmp_path / "run"), "--json").out)
    said = kmixer_command("analyze", str(tmp_path / "run")).out
    assert "effective keys" in said
    assert "class token, per cent held of each patch" in said
    kmixer_command("report", str(tmp_path / "run"), "--figures", str(tmp_path / "figures"))
    assert "What the class token" in (tmp_path / "run/report.html").read_text()
    assert (tmp_path / "figures/class-token.png").stat().st_size > 1000
    assert kmixer_command("pack", str(tmp_path / "run"), "--out", str(tmp_path / "run.tar.gz")).code == 0
    assert kmixer_command("unpack", str(tmp_path / "run.tar.gz"), "--out", str(tmp_path / "again")).code == 0
    assert json.loads(kmixer_command("eval", str(tmp_path / "again"), "--json").out) == answer
    assert "is a classifier and has no copy memory" in kmixer_command("eval", tmp_path / "run", "--memory", 64).error()
    assert (
        "is a classifier and has none"
        in kmixer_command("eval", tmp_path / "run", "--figure", tmp_path / "a.svg").error()
    )
    said = kmixer_command("generate", str(tmp_path / "run"), "--prompt", "x").error()
    assert "holds a classifier, not a language model" in said
