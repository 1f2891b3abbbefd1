"""Running the command line inside the test process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from kmixer.cli.main import main
from kmixer.experiments.sweep import SWEEP, Sweep, sweep_runs
from kmixer.files import write_json
from kmixer.runs.recipe import load_recipe
from kmixer.training.loop import train
from tests.conftest import tiny_recipe_values


@dataclass
class Answer:
    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line of a wrong input."""
        assert self.code == 2, self
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]


Run = Callable[..., Answer]


@pytest.fixture
def kmixer_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["kmixer", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Answer(code or 0, out, err)

    return run


def make_sweep(folder: Path, recipe: Path | str, *, seeds: int = 1, **fields: Any) -> None:
    """The folder that `kmixer sweep` makes, with its runs trained in this process."""
    first = load_recipe(str(recipe)).training.seed
    sweep = Sweep(recipe=str(recipe), seeds=list(range(first, first + seeds)), **{"arms": {"base": []}, **fields})
    folder.mkdir()
    write_json(folder / SWEEP, sweep.model_dump())
    for run in sweep_runs(folder, sweep):
        train(load_recipe(sweep.recipe, run.settings), run.path)


@pytest.fixture
def recipe_file(text_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tiny_recipe_values(text_file)), encoding="utf-8")
    return path


@pytest.fixture
def recipe_path(text_file: Path, tmp_path: Path) -> Path:
    """A recipe that holds out a test part."""
    values = tiny_recipe_values(text_file)
    values["data"]["test"] = 0.1
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path
